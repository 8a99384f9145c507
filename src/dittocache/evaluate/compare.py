"""The same pictures, drawn in several ways, measured side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .measure import Instruments, Look, measure
from .provenance import provenance
from .rows import Row, Run, cached, fewer, own_guidance, run_row, run_rows, standard_rows, uncached
from .steps import FEW, alike, step_errors
from .summary import summarise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .comparison import Comparison

__all__ = ["Progress", "Row", "cached", "compare", "fewer", "standard_rows", "uncached"]

Progress = Callable[[int, int, str], None]  # runs done, runs in all, what is running


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
    reference time / row time. A run of a few pictures of every row comes first and is not timed: it says how far the
    latents of every step are from the reference's.

    Args:
        pipe: one that draws pictures or videos of classes or prompts, without a cache.
        rows: the first is the reference, and is not cached.
        conditions: class or prompt of every picture.
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
        guidance_scale = own_guidance(pipe)
    if not rows or rows[0].recipe is not None:
        raise ValueError("the first row is the reference and has no recipe")
    if len({row.label for row in rows}) != len(rows):
        raise ValueError(f"every row needs a label of its own; got {', '.join(row.label for row in rows)}")
    starts = range(0, len(conditions), chunk)
    total, done = len(rows) * (1 + len(starts)), 0

    def count(row: Row) -> None:
        nonlocal done
        if progress:
            progress(done, total, row.label)
        done += 1

    def first(row: Row) -> Run:
        count(row)
        part = slice(min(chunk, FEW))
        kept = alike(row, rows[0])
        return run_row(pipe, row, conditions[part], seeds[part], guidance_scale, every_step=kept)

    facts = {"step_errors": step_errors(rows, map(first, rows))}
    look = None if judge is None else _look(judge)
    batches = []
    for number, start in enumerate(starts):
        part = slice(start, start + chunk)
        runs = run_rows(pipe, rows, conditions[part], seeds[part], guidance_scale, number, count)
        samples = range(len(conditions))[part]
        batches.append(measure(rows, runs, samples, conditions[part], Instruments(look=look), facts))
    if progress:
        progress(total, total, "done")
    texts = list(names) if names is not None else [str(condition) for condition in conditions]
    record = provenance(pipe, model, rows[0].steps, guidance_scale, chunk)
    read = None if judge is None else [int(one) for one in wanted]
    return summarise(rows, batches, texts, seeds, record, read, sets=("fd",), resamples=None)


def _look(judge: Any) -> Look:
    def look(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": judge.features(pictures), "probabilities": judge(pictures)}

    return look
