"""A budget for each site: it is reused until the calibrated changes since it was computed add up to more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parts import check_number
from ..plan import COMPUTE, REUSE, Site
from ..tensors import Tensors
from .base import When


@dataclass(frozen=True)
class ChangeBudget(When):
    """A site is computed at the first step where its changes, summed since it was computed, exceed `budget`.

    Block Caching's rule (arXiv 2312.03209). The sum includes the change into the step that is being decided.

    Args:
        changes: site -> float [T], relative change of its feature from the step before; the first entry is not read.
        budget: delta, 0 or more.
    """

    changes: Tensors
    budget: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("budget", self.budget, 0)
        if not isinstance(self.changes, Tensors):
            object.__setattr__(self, "changes", Tensors(self.changes))
        for name, change in self.changes.items():
            if change.ndim != 1 or not len(change) or not bool((change[1:] >= 0).all()):
                raise ValueError(f"the changes of {name!r} must be one number of 0 or more for every step")

    def fits(self, sites: Sequence[Site]) -> None:
        names, known = {site.name for site in sites}, set(self.changes)
        if names != known:
            where = "this model, but not in the changes" if names - known else "the changes, but not in this model"
            raise ValueError(f"block {min(names - known or known - names)!r} is in {where}")

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Raises a ValueError for a run of another number of steps than was calibrated."""
        table = np.full((num_steps, len(sites)), REUSE)
        table[0] = COMPUTE
        for j, site in enumerate(sites):
            change = self.changes[site.name].double().tolist()
            if len(change) != num_steps:
                raise ValueError(f"the changes are those of {len(change)} steps, but this run has {num_steps}")
            spent = 0.0
            for k in range(1, num_steps):
                spent += change[k]
                if spent > self.budget:
                    table[k, j], spent = COMPUTE, 0.0
        return table
