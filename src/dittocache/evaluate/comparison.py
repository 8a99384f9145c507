"""What was found: the numbers and pictures of all rows of one measured run, and their files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..plan import Plan

FORMAT = "dittocache-comparison-1"
NUMBERS, PICTURES = "comparison.json", "pictures.safetensors"
UNCACHED, FEWER_STEPS = "uncached", "fewer steps"  # the two methods that are no recipe
OPTIONAL = ("psnr", "ssim", "frechet", "accuracy")  # numbers that a row may lack


class Score(TypedDict):
    """A measured number and the ends of its 95 % interval, None where it has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Result:
    """What one row gave. Fidelity is against the first row, the reference; None where there is nothing to say.

    Args:
        label, method, steps: as in `Row`.
        recipe: `Recipe.to_dict()`; summary: the recipe in one line of text.
        seconds: wall-clock time of every chunk of pictures, in order.
        compute_fraction: FLOPs done over the FLOPs of the reference; ideal_speedup is its inverse.
        speedup, speedup_low, speedup_high: median, least and largest over the chunks of reference / row seconds.
        psnr: dB, inf for equal pictures. ssim: mean over the pictures. frechet: in the judge's features.
        accuracy: share of pictures that the judge reads as their label.
        bytes_peak: most bytes that the cache held for one chunk.
        plan: `Plan.to_dict()` of what was really computed in the first chunk.
        warnings: what the cache's report complained about.
        scores: further measures by name, such as "latent error"; also intervals of those above, under their names.
        deltas: paired difference to the row `provenance["baseline"]` by measure, this row minus that one.
        step_errors: relative error of the latents after every step, |x - r| / |r| over all samples against the
            reference's r; only for rows with the reference's number of steps.
    """

    label: str
    method: str
    steps: int
    recipe: dict[str, Any] | None
    summary: str
    seconds: tuple[float, ...]
    compute_fraction: float
    speedup: float
    speedup_low: float
    speedup_high: float
    psnr: float | None
    ssim: float | None
    frechet: float | None
    accuracy: float | None
    bytes_peak: int
    plan: dict[str, Any] | None
    warnings: tuple[str, ...] = ()
    scores: dict[str, Score] = field(default_factory=dict)
    deltas: dict[str, Score] = field(default_factory=dict)
    step_errors: tuple[float, ...] | None = None

    @property
    def ideal_speedup(self) -> float:
        return 1 / self.compute_fraction if self.compute_fraction > 0 else math.inf

    @property
    def efficiency(self) -> float:
        """Measured over ideal speed-up: the share of the saved compute that became saved time."""
        return self.speedup / self.ideal_speedup

    def score(self, name: str) -> Score | None:
        """A measure by name, with its interval if there is one."""
        value = getattr(self, name) if name in OPTIONAL else None
        return self.scores.get(name) or (None if value is None else Score(value=value, low=None, high=None))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinite numbers, such as the PSNR of equal pictures, are written as the text "inf"."""
        data = dataclasses.asdict(self)
        data |= {"ideal_speedup": self.ideal_speedup, "efficiency": self.efficiency}
        data |= {kind: {name: _texts(s) for name, s in data[kind].items()} for kind in ("scores", "deltas")}
        return _texts(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        names = {f.name for f in dataclasses.fields(cls)}
        values = _numbers({name: value for name, value in data.items() if name in names})
        for name in ("steps", "compute_fraction", "speedup", "speedup_low", "speedup_high", "bytes_peak", *OPTIONAL):
            if not _is_number(values[name]) and not (values[name] is None and name in OPTIONAL):
                raise ValueError(f"damaged comparison: {name} of row {data['label']!r} is {values[name]!r}")
        if not all(_is_number(value) for value in values["seconds"]):
            raise ValueError(f"damaged comparison: seconds of row {data['label']!r} is {values['seconds']!r}")
        for kind in ("scores", "deltas"):
            values[kind] = {name: _score(name, s, data["label"]) for name, s in values.get(kind, {}).items()}
        errors = values.get("step_errors")
        if errors is not None:
            if not all(_is_number(error) and math.isfinite(error) for error in errors):
                raise ValueError(f"damaged comparison: step_errors of row {data['label']!r} is {errors!r}")
            values["step_errors"] = tuple(errors)
        return cls(**values | {name: tuple(values[name]) for name in ("seconds", "warnings")})


def _texts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Infinite numbers as texts, for JSON."""
    words = {math.inf: "inf", -math.inf: "-inf"}
    return {name: words.get(value, value) if isinstance(value, float) else value for name, value in data.items()}


def _numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `_texts`."""
    numbers = {"inf": math.inf, "-inf": -math.inf}
    return {name: numbers.get(value, value) if isinstance(value, str) else value for name, value in data.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def _score(name: str, data: Mapping[str, Any], label: str) -> Score:
    """A score out of a file; a ValueError for what is none."""
    score = _numbers(data)
    low, high = score.get("low"), score.get("high")
    if not _is_number(score["value"]) or not all(end is None or _is_number(end) for end in (low, high)):
        raise ValueError(f"damaged comparison: {name} of row {label!r} is {dict(data)!r}")
    return Score(value=score["value"], low=low, high=high)


@dataclass(frozen=True)
class Comparison:
    """All rows of one measured run.

    Args:
        results: one for every row; the first is the reference.
        pictures: label of the row -> uint8 array [n, height, width, channels].
        labels: what was asked for, one text for each picture.
        seeds: seed of each picture's generator.
        provenance: how it was made; JSON values. `baseline`: label of the row that the deltas are from. `tried`: other
            points of a search, a list of {"x": speed-up, "y": PSNR in dB, "label": text}.
    """

    results: tuple[Result, ...]
    pictures: dict[str, np.ndarray]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Result:
        return self.results[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values."""
        return {
            "format": FORMAT,
            "provenance": self.provenance,
            "labels": list(self.labels),
            "seeds": list(self.seeds),
            "results": [result.to_dict() for result in self.results],
        }

    @classmethod
    def from_dict(cls, data: Any, pictures: Mapping[str, np.ndarray]) -> Comparison:
        """Inverse of `to_dict`.

        Raises:
            ValueError: not a comparison of this format, or numbers and pictures do not fit.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"not a comparison: format is {found!r}, expected {FORMAT!r}")
        try:
            results = tuple(Result.from_dict(result) for result in data["results"])
            labels, seeds = tuple(data["labels"]), tuple(data["seeds"])
            provenance = dict(data["provenance"])
            for point in provenance.get("tried", ()):
                if not _is_number(point["x"]) or not _is_number(point["y"]):
                    raise ValueError(f"damaged comparison: what was tried has no place in a chart: {point!r}")
            for result in results:
                if result.plan is not None:
                    Plan.from_dict(result.plan)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"damaged comparison: {error!r}") from None
        if not results:
            raise ValueError("damaged comparison: it has no rows")
        shape = pictures[results[0].label].shape if results[0].label in pictures else ()
        for result in results:
            found = pictures.get(result.label)
            if found is None or found.ndim != 4 or len(found) != len(labels):
                raise ValueError(f"damaged comparison: {len(labels)} pictures of row {result.label!r} are needed")
            if found.dtype != np.uint8 or found.shape != shape:
                raise ValueError(
                    f"damaged comparison: pictures of row {result.label!r} are {found.dtype} {list(found.shape)}, "
                    f"expected uint8 {list(shape)}"
                )
        if len(seeds) != len(labels):
            raise ValueError(f"damaged comparison: {len(seeds)} seeds for {len(labels)} pictures")
        return cls(results, dict(pictures), labels, seeds, provenance)

    def save(self, folder: str | Path) -> Path:
        """Writes `comparison.json` and `pictures.safetensors` into `folder`, which is made; returns the folder."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")
        save_file({name: np.ascontiguousarray(p) for name, p in self.pictures.items()}, folder / PICTURES)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Reads what `save` wrote.

        Raises:
            ValueError: the folder is missing, damaged or of another kind; one line that says which.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        for name in (NUMBERS, PICTURES):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no comparison: {name} is missing")
        try:
            data = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / NUMBERS} is damaged: {error}") from None
        try:
            pictures = load_file(folder / PICTURES)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{folder / PICTURES} is damaged: {error}") from None
        try:
            return cls.from_dict(data, pictures)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None


def side_by_side(comparisons: Sequence[Comparison], names: Sequence[str]) -> Comparison:
    """The rows of several comparisons that drew the same samples, as one.

    Times are not mixed: every row keeps the speed-up over the reference of its own run. A label that occurs twice gets
    the name of its comparison behind it. Paired differences from another baseline than the first comparison's are left
    out.

    Args:
        comparisons: one or more; the reference row is the first one's.
        names: what the comparisons are called, one for each, no two alike.

    Raises:
        ValueError: a name occurs twice, or labels, seeds or pictures of the reference are not those of the first one.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"comparisons that stand side by side need names of their own; got {', '.join(names)}")
    first = comparisons[0]
    results, pictures = list(first.results), dict(first.pictures)
    others = []
    for comparison, name in zip(comparisons[1:], names[1:], strict=True):
        _check_same_samples(first, names[0], comparison, name)
        same_baseline = comparison.provenance.get("baseline") == first.provenance.get("baseline")
        for result in comparison.results[1:]:
            label = result.label if result.label not in pictures else f"{result.label} ({name})"
            results.append(dataclasses.replace(result, label=label, deltas=result.deltas if same_baseline else {}))
            pictures[label] = comparison.pictures[result.label]
        others.append({"name": name} | comparison.provenance)
    made = first.provenance | ({"name": names[0], "others": others} if others else {})
    if tried := [point for c in comparisons for point in c.provenance.get("tried", ())]:
        made["tried"] = tried
    return Comparison(tuple(results), pictures, first.labels, first.seeds, made)


def _check_same_samples(first: Comparison, name: str, other: Comparison, other_name: str) -> None:
    what = f"{name} and {other_name} cannot stand side by side"
    if first.labels != other.labels:
        raise ValueError(f"{what}: they drew other labels")
    if first.seeds != other.seeds:
        raise ValueError(f"{what}: they drew from other seeds")
    if not np.array_equal(first.pictures[first.reference.label], other.pictures[other.reference.label]):
        raise ValueError(f"{what}: the pictures of their references are not equal")
