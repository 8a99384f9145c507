"""The interface of a correction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..parts import Part


class Level(NamedTuple):
    """Where a run stands when its prediction is corrected.

    Attributes:
        step: k.
        num_steps: T.
        time: 1 at pure noise, 0 at the clean end; timestep / number of training timesteps.
        share: share of the sites' table row that was computed in this step; 1 if nothing was skipped.
    """

    step: int
    num_steps: int
    time: float
    share: float


class Fix(Part):
    """Corrects the noise that a network predicts."""

    def fix(self, noise: Tensor, at: Level) -> Tensor:
        """The corrected noise prediction of a step, after guidance; any shape."""
        raise NotImplementedError
