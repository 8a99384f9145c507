"""What was found: the numbers and pictures of all rows of one measured run, and their files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..plan import Plan

FORMAT = "dittocache-comparison-1"
NUMBERS, PICTURES = "comparison.json", "pictures.safetensors"
UNCACHED, FEWER_STEPS = "uncached", "fewer steps"  # the two methods that are no recipe
OPTIONAL = ("psnr", "ssim", "frechet", "accuracy")  # numbers that a row may lack


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
        values: dict[str, Any] = {
            name: math.inf if value == "inf" else value for name, value in data.items() if name in names
        }
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
