"""From batches of measured pictures to a comparison: means, distances, intervals, differences, speed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..work import Results
from . import metrics
from .bootstrap import RESAMPLES, Interval, Statistic, difference, frechet_of, interval, mean_of, psnr_of
from .comparison import OPTIONAL, Comparison, Result, Score
from .rows import Row

SHOWN = 1000  # pictures of a row that a comparison holds
WIDEST, SET_RESAMPLES = 128, 200  # features of a distance that is resampled, and how often it is
LEARNED = {"lpips": "lpips", "clip": "clip score", "image-reward": "image reward"}  # names on the page


@dataclass
class _Row:
    """All that was measured of one row, sample by sample and batch by batch."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    pictures: list[np.ndarray] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def summarise(
    rows: Sequence[Row],
    batches: Iterable[Results],
    labels: Sequence[str],
    seeds: Sequence[int],
    provenance: Mapping[str, Any],
    classes: Sequence[int] | None = None,
    sets: Sequence[str] = ("fd", "precision-recall"),
    baseline: str | None = None,
    resamples: int | None = RESAMPLES,
) -> Comparison:
    """Adds batches up, which are read one at a time.

    Args:
        rows: the first is the reference.
        batches: what `measure` gave, in the order of the samples.
        labels, seeds: of every sample.
        provenance: how it was made.
        classes: what a judge should read in every sample.
        sets: distances between sets of features: `fd` (Frechet), `precision-recall`.
        baseline: label of the row that differences are taken from; None for no differences.
        resamples: of the bootstrap; None for no intervals.
    """
    found = [_Row() for _ in rows]
    errors: dict[str, Any] = {}
    processes: set[Any] = set()
    frames: dict[str, int] = {}
    for batch in batches:
        _add(found, batch, shown=len(found[0].columns.get("sample", ())) < SHOWN)
        errors |= batch.facts.get("step_errors", {})
        frames |= {"frames": batch.facts["frames"]} if "frames" in batch.facts else {}
        processes.add((batch.timing.get("host"), batch.timing.get("process")))
    measured = [_measured(row, found[0], classes, sets, resamples) for row in found]
    scores = [_scores(one, len(seeds)) for one in measured]
    if "precision-recall" in sets and found[0].features:
        for data, known in zip(found[1:], scores[1:], strict=True):
            shares = metrics.precision_recall(torch.cat(data.features), torch.cat(found[0].features))
            known |= {name: _bare(share) for name, share in zip(("precision", "recall"), shares, strict=True)}
    base = next((n for n, row in enumerate(rows) if row.label == baseline), None)
    results = []
    for number, row in enumerate(rows):
        result = _result(row, found[number], found[0], rows[0].steps, scores[number], resamples is not None)
        if base not in (None, number):
            result = dataclasses.replace(
                result, deltas=_deltas(measured[number], scores[number], measured[base], scores[base], len(seeds))
            )
        apart = errors.get(row.label)
        results.append(dataclasses.replace(result, step_errors=None if apart is None else tuple(apart)))
    pictures = {row.label: np.concatenate(data.pictures)[:SHOWN] for row, data in zip(rows, found, strict=True)}
    told = {**provenance, "samples": len(seeds), "processes": len(processes), **frames}
    told |= {} if baseline is None else {"baseline": baseline}
    return Comparison(tuple(results), pictures, tuple(labels[:SHOWN]), tuple(seeds[:SHOWN]), told)


def _add(found: Sequence[_Row], batch: Results, shown: bool) -> None:
    for name, values in batch.table.items():
        for number, value in zip(batch.table["row"], values, strict=True):
            found[number].columns.setdefault(name, []).append(value)
    for number, row in enumerate(found):
        row.facts.append(batch.facts["rows"][number])
        row.seconds.append(batch.timing["seconds"][number])
        if shown:
            row.pictures.append(batch.arrays[f"pictures/{number}"])
        if f"features/{number}" in batch.arrays:
            row.features.append(torch.from_numpy(batch.arrays[f"features/{number}"]))


# ---- measures of a row ----------------------------------------------------------------------------------------------
class _Measure(NamedTuple):
    """A number of some samples, and how often they are resampled for its interval."""

    statistic: Statistic
    resamples: int | None


def _measured(
    row: _Row, reference: _Row, classes: Sequence[int] | None, sets: Sequence[str], resamples: int | None
) -> dict[str, _Measure]:
    """Measures by the name that they have on the page. Of the reference, only those that need no reference."""
    columns, found = row.columns, {}
    if row is not reference:
        found["psnr"] = _Measure(psnr_of(columns["squared error"]), resamples)
        if "ssim" in columns:
            found["ssim"] = _Measure(mean_of(columns["ssim"]), resamples)
        found["latent error"] = _Measure(mean_of(columns["latent error"]), resamples)
        if row.features and "fd" in sets:
            features = torch.cat(row.features)
            # a distance between wide features takes seconds each time
            few = None if resamples is None or features.shape[1] > WIDEST else min(resamples, SET_RESAMPLES)
            found["frechet"] = _Measure(frechet_of(features, torch.cat(reference.features)), few)
    if classes is not None and "class" in columns:
        found["accuracy"] = _Measure(mean_of(np.equal(columns["class"], classes)), resamples)
    for name, title in LEARNED.items():
        if name in columns and not (row is reference and name == "lpips"):
            found[title] = _Measure(mean_of(columns[name]), resamples)
    return found


def _bare(value: float) -> Score:
    return Score(value=value, low=None, high=None)


def _between(found: Interval) -> Score:
    return Score(value=found.value, low=found.low, high=found.high)


def _scores(measured: Mapping[str, _Measure], count: int) -> dict[str, Score]:
    return {
        name: _bare(statistic.of(np.arange(count)))
        if resamples is None
        else _between(interval(statistic, count, resamples=resamples))
        for name, (statistic, resamples) in measured.items()
    }


def _deltas(
    measured: Mapping[str, _Measure],
    scores: Mapping[str, Score],
    base: Mapping[str, _Measure],
    base_scores: Mapping[str, Score],
    count: int,
) -> dict[str, Score]:
    """Paired differences of what both rows have."""
    found = {}
    for name in scores:
        if name not in base_scores:
            continue
        a, b = scores[name]["value"], base_scores[name]["value"]
        found[name] = _bare(0.0 if a == b else a - b)  # infinite ones, too
        statistic, resamples = measured.get(name, (None, None))
        if statistic is not None and resamples is not None:
            found[name] = _between(difference(statistic, base[name].statistic, count, resamples=resamples))
    return found


def _result(
    row: Row, data: _Row, reference: _Row, full_steps: int, scores: Mapping[str, Score], intervals: bool
) -> Result:
    ratios = [theirs / ours for ours, theirs in zip(data.seconds, reference.seconds, strict=True)]
    return Result(
        label=row.label,
        method=row.method,
        steps=row.steps,
        recipe=None if row.recipe is None else row.recipe.to_dict(),
        summary=row.summary,
        seconds=tuple(round(seconds, 4) for seconds in data.seconds),
        compute_fraction=row.steps / full_steps * statistics.fmean(fact["compute_fraction"] for fact in data.facts),
        speedup=statistics.median(ratios),
        speedup_low=min(ratios),
        speedup_high=max(ratios),
        psnr=_value(scores, "psnr"),
        ssim=_value(scores, "ssim"),
        frechet=_value(scores, "frechet"),
        accuracy=_value(scores, "accuracy"),
        bytes_peak=max(fact["bytes_peak"] for fact in data.facts),
        plan=data.facts[0]["plan"],
        warnings=tuple(dict.fromkeys(text for fact in data.facts for text in fact["warnings"])),
        # without intervals those that have a field of their own would only be told twice
        scores={name: score for name, score in scores.items() if intervals or name not in OPTIONAL},
    )


def _value(scores: Mapping[str, Score], name: str) -> float | None:
    return scores[name]["value"] if name in scores else None
