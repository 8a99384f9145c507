"""The same pictures, drawn in several ways, measured side by side in one run."""

from __future__ import annotations

import contextlib
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plan import Plan
from . import metrics
from .comparison import FEWER_STEPS, UNCACHED, Comparison, Result
from .provenance import provenance

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..recipe import Recipe

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


# name, mild and strong parameters: the same intervals for all, the papers' defaults for the rest, but for GOC's longer
# interval, which they do not have (there it must take differences of computed features, and less of them), and for
# TaylorSeer's order, which is that for FLUX
STANDARD_SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fora": ("FORA", {"interval": 2}, {"interval": 4}),
    "toca": ("ToCa", {"interval": 2}, {"interval": 4}),
    "duca": ("DuCa", {"interval": 2}, {"interval": 4}),
    "goc": ("GOC", {"interval": 2}, {"interval": 4, "eta": 0.5, "computed_only": True}),
    "taylorseer": ("TaylorSeer", {"interval": 2, "order": 1}, {"interval": 4, "order": 1}),
}
STANDARD_SHARES = (0.8, 0.66, 0.5, 0.34, 0.26, 0.2)  # of the steps, for the rows with fewer of them


def standard_rows(steps: int = 50) -> list[Row]:
    """The rows of `dittocache demo`: uncached, fewer steps, and five methods at a mild and a strong setting."""
    counts = sorted({max(1, round(share * steps)) for share in STANDARD_SHARES} - {steps}, reverse=True)
    rows = [uncached(steps), *(fewer(count) for count in counts)]
    for method, (name, mild, strong) in STANDARD_SETTINGS.items():
        rows += [cached(method, steps, f"{name} mild", **mild), cached(method, steps, f"{name} strong", **strong)]
    return rows


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
    conditions: Sequence[int] | Sequence[str],
    seeds: Sequence[int],
    chunk: int = 12,
    guidance_scale: float | None = None,
    *,
    judge: torch.nn.Module | None = None,
    classes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    model: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Draws the same pictures in every way of `rows` and measures how much faster and how close.

    Paired: picture j has the same condition and seed in every row. Interleaved: the pictures are cut into chunks, and
    for every chunk all rows run one after another, in an order that rotates from chunk to chunk, so that whatever else
    the machine does meets all rows alike. The speed-up of a row is the median over the chunks of the ratio
    reference time / row time. A run of one picture of every row comes first and is not timed.

    Args:
        pipe: called like diffusers' DiTPipeline or PixArtAlphaPipeline.
        rows: the first is the reference, and is not cached.
        conditions: class or prompt of every picture, the pipeline's first argument.
        seeds: seed of every picture's generator.
        chunk: pictures drawn at once.
        guidance_scale: strength of guidance; by default the pipeline's own.
        judge: classifier [n, c, h, w] in [0, 1] -> logits, with a method `features` [n, c, h, w] -> [n, d]; without
            one, accuracy and Frechet distance are left out.
        classes: what the judge should read in every picture; by default the conditions, which are classes then.
        names: text for every picture; by default its condition.
        model: name of the model, for the record.
        progress: called before every run.

    Raises:
        ValueError: conditions and seeds do not fit, a label of a row occurs twice, the reference is cached, or a judge
            is not told what to read.
    """
    if len(conditions) != len(seeds) or len(conditions) < 2:
        raise ValueError(f"one seed for every condition, two pictures or more; got {len(conditions)} and {len(seeds)}")
    wanted = conditions if classes is None else classes
    if judge is not None and any(isinstance(one, str) for one in wanted):
        raise ValueError(f"the judge reads class numbers: pass classes for prompts such as {wanted[0]!r}")
    if guidance_scale is None:
        guidance_scale = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    if not rows or rows[0].recipe is not None:
        raise ValueError("the first row is the reference and has no recipe")
    if len({row.label for row in rows}) != len(rows):
        raise ValueError(f"every row needs a label of its own; got {', '.join(row.label for row in rows)}")
    starts = range(0, len(conditions), chunk)
    total, done = len(rows) * (1 + len(starts)), 0

    def run(row: Row, part: slice) -> _Run:
        nonlocal done
        if progress:
            progress(done, total, row.label)
        done += 1
        return _run(pipe, row, conditions[part], seeds[part], guidance_scale)

    for row in rows:
        run(row, slice(0, 1))
    runs: dict[str, list[_Run]] = {row.label: [] for row in rows}
    for number, start in enumerate(starts):
        first = number % len(rows)
        for row in [*rows[first:], *rows[:first]]:
            runs[row.label].append(run(row, slice(start, start + chunk)))
    if progress:
        progress(total, total, "done")

    results = [_result(row, runs[row.label], runs[rows[0].label], rows[0], wanted, judge) for row in rows]
    pictures = {row.label: np.concatenate([_uint8(part.pictures) for part in runs[row.label]]) for row in rows}
    texts = tuple(names) if names is not None else tuple(map(str, conditions))
    record = provenance(pipe, model, rows[0].steps, guidance_scale, chunk)
    return Comparison(tuple(results), pictures, texts, tuple(seeds), record)


class _Enough(Exception):
    """Ends a run after its first step."""


def _enough(*step: Any) -> Any:
    raise _Enough


def _run(pipe: DiffusionPipeline, row: Row, conditions: Sequence[Any], seeds: Sequence[int], guidance: float) -> _Run:
    from .. import enable

    def draw(**more: Any) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"guidance_scale": guidance, "generator": generators, "output_type": "np"}
        return pipe(list(conditions), num_inference_steps=row.steps, **options, **more).images

    cache = None if row.recipe is None else enable(pipe, row.recipe)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dittocache:")  # they stand in the report
            if row.recipe is not None:
                with contextlib.suppress(_Enough):  # the first forward after `enable` also counts FLOPs
                    draw(callback_on_step_end=_enough)
            begin = time.perf_counter()
            pictures = draw()
            seconds = time.perf_counter() - begin
        if cache is None:
            return _Run(pictures, seconds, 1.0)
        report = cache.report()
        return _Run(pictures, seconds, report.compute_fraction, report.bytes_peak, cache.trace, tuple(report.warnings))
    finally:
        if cache is not None:
            cache.disable()


def _result(
    row: Row, runs: list[_Run], reference: list[_Run], first: Row, classes: Sequence[Any], judge: Any
) -> Result:
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(runs, reference, strict=True)]
    drawn, wanted = _tensor(runs), _tensor(reference)
    is_reference = row is first
    frechet = accuracy = None
    if judge is not None:
        with torch.no_grad():
            accuracy = metrics.accuracy(judge(drawn), torch.tensor(list(classes)))
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
