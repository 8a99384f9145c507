"""Error against step: how far a row's latents have moved from the reference's while a picture is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .rows import Row, Run

FEW = 4  # samples that are enough


def step_errors(rows: Sequence[Row], runs: Iterable[Run]) -> dict[str, tuple[float, ...]]:
    """Relative error |x_t - r_t| / |r_t| of the latents after every step, r the first row's, over all samples.

    Args:
        rows: the first is the reference; of the others those that are `alike` are measured.
        runs: of every row, with the latents of every step; taken one by one, so they need not all be in memory.

    Returns:
        Label of the row -> error after every step.
    """
    drawn = iter(runs)
    wanted = next(drawn).path
    norms = _squares(wanted)
    found = {}
    for row, run in zip(rows[1:], drawn, strict=True):
        if alike(row, rows[0]):
            apart = _squares(x.double() - r.double() for x, r in zip(run.path, wanted, strict=True))
            found[row.label] = tuple((apart / norms).sqrt().tolist())
    return found


def alike(row: Row, reference: Row) -> bool:
    """Whether the steps of two rows can be compared one by one."""
    return (row.steps, row.scheduler) == (reference.steps, reference.scheduler)


def _squares(latents: Iterable[Tensor]) -> Tensor:
    """Squared norm at every step: float64 [steps]."""
    return torch.stack([x.double().square().sum().cpu() for x in latents])
