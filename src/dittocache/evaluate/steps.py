"""Error against step: how far a row's latents have moved from the reference's while a picture is drawn."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache import enable

if TYPE_CHECKING:
    from .compare import Row


def step_errors(
    pipe: Any,
    rows: Sequence[Row],
    conditions: Sequence[int] | Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    chunk: int = 12,
) -> dict[str, tuple[float, ...]]:
    """Relative error |x_t - r_t| / |r_t| of the latents after every step, r the first row's, over all pictures.

    Every row is run once more, untimed; a few pictures are enough.

    Args:
        pipe: a pipeline that takes `callback_on_step_end`.
        rows: the first is the reference; of the others those with its number of steps are measured.
        conditions, seeds: of every picture, as in `compare`.
        guidance_scale: strength of guidance.
        chunk: pictures drawn at once.

    Returns:
        Label of the row -> error after every step; empty if the pipeline tells nobody about its steps (DiTPipeline).
    """
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        return {}
    reference = rows[0]
    others = [row for row in rows[1:] if row.steps == reference.steps]
    squares = {row.label: torch.zeros(reference.steps, dtype=torch.float64) for row in [reference, *others]}
    for start in range(0, len(seeds), chunk):
        part = slice(start, start + chunk)
        wanted = _latents(pipe, reference, conditions[part], seeds[part], guidance_scale)
        squares[reference.label] += _squares(wanted)
        for row in others:
            found = _latents(pipe, row, conditions[part], seeds[part], guidance_scale)
            squares[row.label] += _squares([x - r for x, r in zip(found, wanted, strict=True)])
    norm = squares.pop(reference.label)
    return {label: tuple((square / norm).sqrt().tolist()) for label, square in squares.items()}


def _latents(pipe: Any, row: Row, conditions: Sequence[Any], seeds: Sequence[int], guidance: float) -> list[Tensor]:
    """The latents after every step of one run, in float64."""
    kept: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        kept.append(inputs["latents"].double())
        return inputs

    with contextlib.nullcontext() if row.recipe is None else enable(pipe, row.recipe), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dittocache:")  # they stand in the report
        pipe(
            list(conditions),
            num_inference_steps=row.steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=keep,
        )
    return kept


def _squares(latents: Sequence[Tensor]) -> Tensor:
    """Squared norm at every step: [steps]."""
    return torch.stack([x.square().sum().cpu() for x in latents])
