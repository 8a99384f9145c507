"""Block Caching's changes: how much what a block adds differs from what it added a step before (arXiv 2312.03209)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ..fill import At
from ..parameters import Number
from ..recipe import Recipe, recipe
from .base import Calibrator, See, Seen, add
from .setup import Setup
from .statistics import Statistics


@dataclass(frozen=True)
class CalibrateBlockCaching(Calibrator):
    """Records one number per block and step: ||C_k - C_(k-1)||_1 / ||C_k||_1 of every sample, averaged over them.

    C is what the block adds to all streams that pass it. The paper averages over 32 prompts with 2 seeds each.
    """

    method = "block-caching"
    where = "block"
    keeps = "change"
    streams = "all"

    delta: Annotated[float, Number(0, help="budget of a block: more leaves out more")] = 0.5

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        def see(at: At, new: Seen, old: Seen | None) -> None:
            column = torch.zeros(at.num_steps, dtype=torch.float64)
            if old is not None:
                size = new.output.double().abs().sum(1)
                change = (new.output.double() - old.output.double()).abs().sum(1)
                column[at.step] = (change / size.clamp(min=1e-30)).sum()
            add(sums, at.site.name, column)

        return see

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        count = len(statistics.samples)
        changes = {name: total / count for name, total in statistics.sums.items()}
        return recipe("block-caching", changes=changes, delta=self.delta)
