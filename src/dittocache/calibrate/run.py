"""Recording and fitting: progress, resume, shards, provenance."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..evaluate.provenance import machine, versions
from ..parts import check_int, check_ints, show
from ..recipe import Recipe
from ..saved import FILE
from .base import Calibrator, described, make
from .setup import Setup, check_uncached, denoiser, made_for
from .statistics import FILE as STATISTICS
from .statistics import Statistics, merge, peak

if TYPE_CHECKING:
    from ..evaluate.compare import Progress


def calibrate(
    pipe: Any,
    method: str,
    samples: int | Sequence[int] | None = None,
    setup: Setup | None = None,
    *,
    out: str | Path | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    **params: Any,
) -> Recipe:
    """Records uncached runs of a pipeline, and makes the method's recipe of them.

    Args:
        pipe: a diffusers pipeline without a cache.
        method: one that is calibrated: block-caching, dpcache, eb-cache, eoc, goc, icc, lemica, magcache,
            teacache.
        samples: how many, or their numbers; by default as many as are enough for the method, as a rule.
        setup: how they are drawn.
        out: folder for the statistics and the recipe. Statistics are written after every batch, and what is there
            already is not recorded again.
        batch: samples drawn at once; statistics do not depend on it but for rounding.
        progress: called after every batch as progress(samples done, samples in all, method).
        params: the method's calibration parameters.

    Returns:
        The recipe; `dittocache.enable(pipe, recipe)`, or `enable(pipe, out)`.

    Raises:
        ValueError: unknown method or parameter, a value out of range, no samples, a cache is on, the folder holds
            statistics of other settings, or what was recorded is not finite.
    """
    setup, calibrator = setup or Setup(), make(method, params)
    samples = calibrator.usual if samples is None else samples
    statistics = record(pipe, calibrator, samples, setup, out=out, batch=batch, progress=progress)
    found = fit(pipe, calibrator, statistics, setup)
    if out is not None:
        found.save_pretrained(out)
    return found


def record(
    pipe: Any,
    calibrator: Calibrator,
    samples: int | Sequence[int],
    setup: Setup,
    *,
    out: str | Path | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of some samples; arguments and errors as in `calibrate`."""
    check_int("batch", batch, 1)
    numbers = _numbers(samples, calibrator.needs_samples)
    check_uncached(pipe)
    if out is not None:
        check_folder(out, calibrator.method)
    settings = _settings(pipe, calibrator, setup)
    statistics = Statistics(calibrator.method, settings)
    if out is not None and (Path(out) / STATISTICS).exists():
        statistics = Statistics.load(out)
        statistics.check(calibrator.method, settings)
    todo = [n for n in numbers if n not in set(statistics.samples)]
    _watch_memory(pipe)
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        began = time.perf_counter()
        statistics.add(calibrator.collect(pipe, setup, part), part)
        seconds = statistics.record.get("seconds", 0.0) + time.perf_counter() - began
        memory = peak(statistics.record.get("memory", {}), _memory(pipe, statistics))
        statistics.record = {"seconds": round(seconds, 2), "memory": memory, **_made(pipe)}
        if out is not None:
            statistics.save(out)
        if progress:
            progress(len(numbers) - len(todo) + start + len(part), len(numbers), calibrator.method)
    return statistics


def fit(pipe: Any, calibrator: Calibrator, statistics: Statistics, setup: Setup) -> Recipe:
    """The recipe of a calibrator's statistics, with what it was made for and how.

    Raises:
        ValueError: the statistics are for something else, there are none, or (for trial runs) a cache is on.
    """
    statistics.check(calibrator.method, _settings(pipe, calibrator, setup))
    if calibrator.needs_samples and not statistics.samples:
        raise ValueError("these statistics hold no samples: record some first")
    made = calibrator.fit(statistics, pipe, setup)
    provenance = {
        "calibration": described(calibrator),
        "setup": setup.to_dict(),
        "samples": len(statistics.samples),
        **statistics.record,
    }
    return replace(made, made_for=made_for(pipe, setup), provenance=provenance)


def merged(
    pipe: Any, calibrator: Calibrator, folders: Iterable[str | Path], setup: Setup, out: str | Path | None = None
) -> Recipe:
    """The recipe of several folders of statistics, recorded apart from different samples.

    Raises:
        ValueError: a folder is missing or damaged, settings differ, a sample is in two of them, or `out` holds
            statistics of other samples already.
    """
    if out is not None:
        check_folder(out, calibrator.method)
    statistics = merge(Statistics.load(folder) for folder in folders)
    if out is not None and (Path(out) / STATISTICS).exists():
        there = Statistics.load(out)
        there.check(statistics.method, statistics.settings)
        lost = sorted(set(there.samples) - set(statistics.samples))
        if lost:
            raise ValueError(f"{str(out)!r} holds sample {lost[0]}, which is not among those merged: merge it as well")
    found = fit(pipe, calibrator, statistics, setup)
    if out is not None:
        statistics.save(out)
        found.save_pretrained(out)
    return found


def shard(samples: int, text: str) -> list[int]:
    """Numbers of a share of the samples: "1/4" is the first of four.

    Raises:
        ValueError: not of that form, or the share is empty.
    """
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise ValueError(f"a shard is given as NUMBER/OF, such as 1/4; got {text!r}")
    numbers = list(range(int(index) - 1, samples, int(count)))
    if not numbers:
        raise ValueError(f"shard {text} of {samples} samples is empty")
    return numbers


def check_folder(out: str | Path, method: str) -> None:
    """Raises a ValueError if a folder cannot be made, or holds something that calibrating the method did not write."""
    path = Path(out)
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not there.is_dir():
        raise ValueError(f"{str(out)!r} cannot be a folder: {str(there)!r} is a file")
    names = {p.name for p in path.iterdir()} - {f"{STATISTICS}.new"} if path.exists() else set()  # of a killed run
    if names and not names & {STATISTICS, FILE}:
        raise ValueError(f"{str(out)!r} exists and holds something else: choose another folder")
    if FILE in names:
        found = Recipe.from_pretrained(path).method if STATISTICS not in names else method
        if found != method:
            raise ValueError(
                f"{str(out)!r} holds a recipe of {found or 'no method'}: choose another folder for {method}"
            )


def _numbers(samples: Any, needed: bool) -> list[int]:
    """Numbers of the samples, from how many there are or from themselves; none if none are needed."""
    if isinstance(samples, (int, np.integer)) or not hasattr(samples, "__iter__"):
        check_int("samples", samples, 1 if needed else 0)
        numbers = list(range(samples))
    else:
        check_ints("samples", samples, 0)
        numbers = [int(n) for n in samples]
    if needed and (not numbers or len(set(numbers)) < len(numbers)):
        raise ValueError(f"samples are one or more different numbers from 0; got {show(numbers)}")
    return numbers if needed else []


def _settings(pipe: Any, calibrator: Calibrator, setup: Setup) -> dict[str, Any]:
    """All that statistics depend on apart from the samples."""
    return {"parameters": calibrator.settings(), "setup": setup.to_dict(), "made_for": made_for(pipe, setup)}


def _made(pipe: Any) -> dict[str, Any]:
    device = denoiser(pipe).device
    return {"versions": versions(), "machine": machine(device)}


def _watch_memory(pipe: Any) -> None:
    if denoiser(pipe).device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(denoiser(pipe).device)


def _memory(pipe: Any, statistics: Statistics) -> dict[str, int]:
    """Bytes: of the statistics, and the peak of the process or of the GPU."""
    found = {"statistics": statistics.bytes}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["peak of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if denoiser(pipe).device.type == "cuda":
        found["peak of the GPU"] = torch.cuda.max_memory_allocated(denoiser(pipe).device)
    return found
