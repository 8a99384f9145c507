"""What is corrected outside the network?"""

from __future__ import annotations

from torch import Tensor

from ..parts import Part


class Fix(Part):
    """Corrects the prediction that a scheduler is handed."""

    def fix(self, prediction: Tensor, step: int, num_steps: int, share: float) -> Tensor:
        """The corrected prediction of step k.

        Args:
            prediction: what the pipeline hands to `scheduler.step`, after guidance.
            step: k.
            num_steps: T.
            share: share of the sites' table row that was computed in this step; 1 if nothing was skipped.
        """
        raise NotImplementedError


__all__ = ["Fix"]
