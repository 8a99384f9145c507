"""MagCache's ratios: how much larger the change of the whole trunk is than at the step before (arXiv 2506.09045)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..describe import describe
from ..fill import At
from ..methods.magcache import MaxSkip, Retention, Threshold
from ..recipe import Recipe, recipe
from .base import Calibrator, See, Seen, add
from .setup import Setup
from .statistics import Statistics


@dataclass(frozen=True)
class CalibrateMagCache(Calibrator):
    """Records one number per step: ||R_k|| / ||R_(k-1)|| of every token, averaged over tokens and samples.

    R is what all main stacks of blocks together change in the stream of the sample: the sum of their changes. One
    sample tells as much as the paper's; more of them are averaged.
    """

    method = "magcache"
    where = "stack"
    keeps = "change"

    threshold: Threshold = 0.06
    max_skip: MaxSkip = 3
    retention: Retention = 0.2

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        return magnitudes(pipe.transformer, sums)

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        mean = statistics.sum("ratios") / len(statistics.samples)
        return recipe(
            "magcache",
            ratios=[round(ratio, 6) for ratio in mean.tolist()],  # float32 tells no more apart
            threshold=self.threshold,
            max_skip=self.max_skip,
            retention=self.retention,
        )


def magnitudes(transformer: nn.Module, sums: dict[str, Tensor]) -> See:
    """A function that adds every step's ratio, summed over the samples, to sums["ratios"] [steps]; the first is 1.

    It is to be shown the changes of all main stacks. Where a stack takes text and image in one sequence, the image is
    at its end.

    Raises:
        ValueError: (that function) stacks do not change one stream: fewer tokens, or other channels.
    """
    stacks = [span.site.name for span in describe(transformer).stacks if span.main]
    seen: dict[str, Tensor] = {}

    def see(at: At, new: Seen, old: Seen | None) -> None:
        change = new.output.float()
        if at.site.name != stacks[0]:
            sofar = seen["change"]
            change = change[..., -sofar.shape[-2] :, :]
            if change.shape != sofar.shape:
                raise ValueError(
                    f"magcache needs one stream of tokens through all stacks; {at.site.name!r} has "
                    f"{list(change.shape)}, those before {list(sofar.shape)}"
                )
            change = sofar + change
        seen["change"] = change
        if at.site.name == stacks[-1]:
            size = change.norm(dim=-1)
            ratio = size / (seen["size"] + 1e-8) if at.step else torch.ones_like(size)
            column = torch.zeros(at.num_steps, dtype=torch.float64)
            column[at.step] = ratio.flatten(1).mean(1).sum()
            add(sums, "ratios", column)
            seen["size"] = size

    return see
