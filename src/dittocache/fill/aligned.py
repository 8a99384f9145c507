"""Aligned: along the line through the last two computed outputs, as far as a probe has gone along its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts import check_number
from .base import At, Entry, Features, Fill


@dataclass(frozen=True)
class Aligned(Fill):
    """R2 + g (R1 - R2), g = mean|P - P2| / mean|P1 - P2| within [1, limit] (DiCache, arXiv 2508.17356).

    R1, R2 are the last two computed outputs, P1, P2 the inputs that went with them, and P is the present input: at
    stacks, what the head of the schedule has changed. With one output that is held. g is of each sample.

    Args:
        limit: largest g; 1 holds the last output. The authors have 1.5 for FLUX and HunyuanVideo, 2 for Wan.
    """

    limit: float = 1.5

    name = "aligned"
    keeps_inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("max_gain", self.limit, 1)

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        """Keeps the input as one more tensor of the output, so that both follow their sample.

        Raises:
            ValueError: there is no input.
        """
        older = slice(1, 2) if entry.steps[:1] == [at.step] else slice(0, 1)  # a second output of a step replaces it
        entry.values = [(*value, _probe(at)), *entry.values[older]]
        entry.steps = [at.step, *entry.steps[older]]

    def fill(self, entry: Entry, at: At) -> Features:
        (*newest, last), (*older, before) = entry.values[0], entry.values[-1]
        if len(entry.values) == 1:
            return tuple(newest)

        def size(change: Tensor) -> Tensor:
            return at.samples.gather(change.float()).abs().mean((1, 2))

        # a sample that has one output only holds it twice: 0 / 0, and the gain does not matter
        gain = (size(_probe(at) - before) / size(last - before)).nan_to_num(1.0).clamp(1, self.limit)
        return tuple(torch.addcmul(b, at.samples.like(gain, b), a - b) for a, b in zip(newest, older, strict=True))


def _probe(at: At) -> Tensor:
    if at.inputs is None:
        raise ValueError(
            f"aligned fills go by inputs, and {at.site.name!r} has none: a stack's schedule needs a head of 1 block or "
            "more, as DiCache's has"
        )
    return at.inputs
