"""Trial runs: how far a recipe's pictures are from the uncached ones, on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import enable
from ..recipe import Recipe
from .setup import Setup, check_uncached, draw


class Trial:
    """Uncached pictures of some samples, to compare recipes with.

    Args:
        pipe: the pipeline, without a cache.
        setup: how the samples are drawn.
        samples: their numbers.
        batch: how many are drawn at once.

    Raises:
        ValueError: a cache is on.
    """

    def __init__(self, pipe: Any, setup: Setup, samples: Sequence[int], batch: int = 16) -> None:
        check_uncached(pipe)
        self.pipe, self.setup = pipe, setup
        self.parts = [samples[n : n + batch] for n in range(0, len(samples), batch)]
        self.reference = self._draw()

    def _draw(self) -> Tensor:
        # some pipelines give arrays for whatever output type
        parts = [torch.as_tensor(draw(self.pipe, self.setup, part)) for part in self.parts]
        return torch.cat(parts).cpu().double()

    def error(self, recipe: Recipe) -> float:
        """Mean squared error of the recipe's pictures."""
        with enable(self.pipe, recipe):
            return float((self._draw() - self.reference).square().mean())

    def worth(self, steps: Iterable[int], correcting: Callable[[set[int]], Recipe]) -> set[int]:
        """The steps whose correction brings the pictures closer, tried in order on top of those kept so far.

        Args:
            steps: candidates.
            correcting: the recipe that corrects some steps only.
        """
        kept: set[int] = set()
        best = self.error(correcting(kept))
        for step in sorted(set(steps)):
            error = self.error(correcting(kept | {step}))
            if error < best:
                kept, best = kept | {step}, error
        return kept
