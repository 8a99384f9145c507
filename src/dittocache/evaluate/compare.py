"""The same pictures, drawn in several ways, measured side by side in one run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plan import Plan
from ..when import Table
from . import metrics

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..recipe import Recipe

OPTIONAL = ("psnr", "ssim", "frechet", "accuracy")  # numbers that a row may lack
FORMAT = "dittocache-comparison-1"
NUMBERS, PICTURES = "comparison.json", "pictures.safetensors"
UNCACHED, FEWER_STEPS = "uncached", "fewer steps"  # the two methods that are no recipe

Progress = Callable[[int, int, str], None]  # runs done, runs in all, what is running


# ---- what is compared -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One way to draw the pictures.

    Args:
        label: short and unique, as it stands in charts and tables.
        method: `uncached`, `fewer steps`, or the name of a caching method; rows of one method share a colour.
        steps: sampling steps.
        recipe: what is enabled on the pipeline; None for none.
    """

    label: str
    method: str
    steps: int
    recipe: Recipe | None = None


def uncached(steps: int) -> Row:
    """The reference: the pipeline as it is."""
    return Row("uncached", UNCACHED, steps)


def fewer(steps: int) -> Row:
    """The competitor that costs nothing: the same pipeline with fewer steps."""
    return Row(f"{steps} steps", FEWER_STEPS, steps)


def cached(method: str, steps: int, label: str | None = None, **params: Any) -> Row:
    """A published method, labelled by default with its name and the parameters that differ from the paper's."""
    from .. import recipe

    made = recipe(method, **params)
    return Row(label or made.describe(), method, steps, made)


# name, mild and strong parameters: on either side of the papers' defaults, at about the same compute for all methods
STANDARD_SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fora": ("FORA", {"interval": 2}, {"interval": 4}),
    "toca": ("ToCa", {"interval": 3}, {"interval": 5}),
    "duca": ("DuCa", {"interval": 3}, {"interval": 5}),
}
STANDARD_SHARES = (0.66, 0.5, 0.34, 0.26, 0.2)  # of the steps, for the rows with fewer of them


def standard_rows(steps: int = 50) -> list[Row]:
    """The rows of `dittocache demo`: uncached, fewer steps, and FORA, ToCa, DuCa at a mild and a strong setting."""
    counts = sorted({max(1, round(share * steps)) for share in STANDARD_SHARES} - {steps}, reverse=True)
    rows = [uncached(steps), *(fewer(count) for count in counts)]
    for method, (name, mild, strong) in STANDARD_SETTINGS.items():
        rows += [cached(method, steps, f"{name} mild", **mild), cached(method, steps, f"{name} strong", **strong)]
    return rows


# ---- what is found --------------------------------------------------------------------------------------------------
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

    @property
    def ideal_speedup(self) -> float:
        return 1 / self.compute_fraction if self.compute_fraction > 0 else math.inf

    @property
    def efficiency(self) -> float:
        """Measured over ideal speed-up: the share of the saved compute that became saved time."""
        return self.speedup / self.ideal_speedup

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite PSNR is written as the text "inf"."""
        data = dataclasses.asdict(self)
        data |= {"ideal_speedup": self.ideal_speedup, "efficiency": self.efficiency}
        return {name: "inf" if value == math.inf else value for name, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        names = {f.name for f in dataclasses.fields(cls)}
        values = {name: math.inf if value == "inf" else value for name, value in data.items() if name in names}
        for name in ("compute_fraction", "speedup", "speedup_low", "speedup_high", *OPTIONAL):
            if not isinstance(values[name], (int, float)) and not (values[name] is None and name in OPTIONAL):
                raise ValueError(f"damaged comparison: {name} of row {data['label']!r} is {values[name]!r}")
        return cls(**values | {name: tuple(values[name]) for name in ("seconds", "warnings")})


@dataclass(frozen=True)
class Comparison:
    """All rows of one measured run.

    Args:
        results: one for every row; the first is the reference.
        pictures: label of the row -> uint8 array [n, height, width, channels].
        labels: what was asked for, one text for each picture.
        seeds: seed of each picture's generator.
        provenance: how it was made; JSON values.
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
            for result in results:
                if result.plan is not None:
                    Plan.from_dict(result.plan)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"damaged comparison: {error!r}") from None
        if not results:
            raise ValueError("damaged comparison: it has no rows")
        for result in results:
            found_pictures = pictures.get(result.label)
            if found_pictures is None or found_pictures.ndim != 4 or len(found_pictures) != len(labels):
                raise ValueError(f"damaged comparison: {len(labels)} pictures of row {result.label!r} are needed")
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


# ---- measuring ------------------------------------------------------------------------------------------------------
@dataclass
class _Run:
    """What one row did with one chunk of pictures."""

    pictures: np.ndarray  # float [n, h, w, c] in [0, 1]
    seconds: float
    compute_fraction: float
    bytes_peak: int = 0
    plan: Plan | None = None
    warnings: tuple[str, ...] = ()


def compare(
    pipe: DiffusionPipeline,
    rows: Sequence[Row],
    labels: Sequence[int],
    seeds: Sequence[int],
    chunk: int = 12,
    guidance_scale: float = 1.5,
    *,
    judge: torch.nn.Module | None = None,
    names: Sequence[str] | None = None,
    model: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Draws the same pictures in every way of `rows` and measures how much faster and how close.

    Paired: picture j has the same label and the same seed in every row. Interleaved: the pictures are cut into chunks,
    and for every chunk all rows run one after another, in an order that rotates from chunk to chunk, so that whatever
    else the machine does meets all rows alike. The speed-up of a row is the median over the chunks of the ratio
    reference time / row time. A run of one picture of every row comes first and is not timed.

    Args:
        pipe: a class-conditional pipeline, called like diffusers' DiTPipeline.
        rows: the first is the reference, and is not cached.
        labels: class of every picture.
        seeds: seed of every picture's generator.
        chunk: pictures drawn at once.
        judge: classifier [n, c, h, w] in [0, 1] -> logits, with a method `features` [n, c, h, w] -> [n, d]; without
            one, accuracy and Frechet distance are left out.
        names: text for every picture's label; by default its number.
        model: name of the model, for the record.
        progress: called before every run.

    Raises:
        ValueError: labels and seeds do not fit, a label of a row occurs twice, or the reference is cached.
    """
    if len(labels) != len(seeds) or len(labels) < 2:
        raise ValueError(f"one seed for every label, two pictures or more; got {len(labels)} and {len(seeds)}")
    if not rows or rows[0].recipe is not None:
        raise ValueError("the first row is the reference and has no recipe")
    if len({row.label for row in rows}) != len(rows):
        raise ValueError(f"every row needs a label of its own; got {', '.join(row.label for row in rows)}")
    starts = range(0, len(labels), chunk)
    total, done = len(rows) * (1 + len(starts)), 0

    def run(row: Row, part: slice) -> _Run:
        nonlocal done
        if progress:
            progress(done, total, row.label)
        done += 1
        return _run(pipe, row, labels[part], seeds[part], guidance_scale)

    for row in rows:
        run(row, slice(0, 1))
    runs: dict[str, list[_Run]] = {row.label: [] for row in rows}
    for number, start in enumerate(starts):
        first = number % len(rows)
        for row in [*rows[first:], *rows[:first]]:
            runs[row.label].append(run(row, slice(start, start + chunk)))
    if progress:
        progress(total, total, "done")

    results = [_result(row, runs[row.label], runs[rows[0].label], rows[0], labels, judge) for row in rows]
    pictures = {row.label: np.concatenate([_uint8(part.pictures) for part in runs[row.label]]) for row in rows}
    texts = tuple(names) if names is not None else tuple(str(label) for label in labels)
    record = _provenance(pipe, model, rows[0].steps, guidance_scale, chunk)
    return Comparison(tuple(results), pictures, texts, tuple(seeds), record)


def _run(pipe: DiffusionPipeline, row: Row, labels: Sequence[int], seeds: Sequence[int], guidance_scale: float) -> _Run:
    from .. import enable

    def draw(steps: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"guidance_scale": guidance_scale, "generator": generators, "output_type": "np"}
        return pipe(class_labels=list(labels), num_inference_steps=steps, **options).images

    cache = None if row.recipe is None else enable(pipe, row.recipe)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dittocache:")  # they stand in the report
            if row.recipe is not None and not isinstance(row.recipe.when, Table):
                draw(1)  # the first forward after `enable` also counts FLOPs
            begin = time.perf_counter()
            pictures = draw(row.steps)
            seconds = time.perf_counter() - begin
        if cache is None:
            return _Run(pictures, seconds, 1.0)
        report = cache.report()
        return _Run(pictures, seconds, report.compute_fraction, report.bytes_peak, cache.trace, tuple(report.warnings))
    finally:
        if cache is not None:
            cache.disable()


def _result(row: Row, runs: list[_Run], reference: list[_Run], first: Row, labels: Sequence[int], judge: Any) -> Result:
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(runs, reference, strict=True)]
    drawn, wanted = _tensor(runs), _tensor(reference)
    is_reference = row is first
    frechet = accuracy = None
    if judge is not None:
        with torch.no_grad():
            accuracy = metrics.accuracy(judge(drawn), torch.tensor(list(labels)))
            if not is_reference:
                frechet = metrics.frechet_distance(judge.features(drawn), judge.features(wanted))
    plan = runs[0].plan
    return Result(
        label=row.label,
        method=row.method,
        steps=row.steps,
        recipe=None if row.recipe is None else row.recipe.to_dict(),
        summary=f"{row.steps} steps" if row.recipe is None else row.recipe.describe(),
        seconds=tuple(round(run.seconds, 4) for run in runs),
        compute_fraction=row.steps / first.steps * statistics.fmean(run.compute_fraction for run in runs),
        speedup=statistics.median(ratios),
        speedup_low=min(ratios),
        speedup_high=max(ratios),
        psnr=None if is_reference else metrics.psnr(drawn, wanted),
        ssim=None if is_reference else metrics.ssim(drawn, wanted),
        frechet=frechet,
        accuracy=accuracy,
        bytes_peak=max(run.bytes_peak for run in runs),
        plan=None if plan is None else plan.to_dict(),
        warnings=tuple(dict.fromkeys(text for run in runs for text in run.warnings)),
    )


def _tensor(runs: list[_Run]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([run.pictures for run in runs])).permute(0, 3, 1, 2).float()


def _uint8(pictures: np.ndarray) -> np.ndarray:
    return np.rint(pictures.clip(0, 1) * 255).astype(np.uint8)


# ---- provenance -----------------------------------------------------------------------------------------------------
def _provenance(pipe: DiffusionPipeline, model: str, steps: int, guidance_scale: float, chunk: int) -> dict[str, Any]:
    network = pipe.transformer
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "model": model,
        "network": f"{type(network).__name__}, {parameters / 1e6:.1f} M parameters, {str(network.dtype)[6:]}",
        "scheduler": type(pipe.scheduler).__name__,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "chunk": chunk,
        "machine": machine(network.device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


def machine(device: torch.device) -> str:
    """Name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("dittocache", "torch", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
