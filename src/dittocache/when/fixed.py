"""Schedules that depend on the step number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts import check_choice, check_int
from ..plan import COMPUTE, PARTIAL, REUSE, Plan, Site, align
from .base import When, columns


@dataclass(frozen=True)
class Every(When):
    """Every interval-th step is computed (FORA, arXiv 2407.01425).

    `anchor="end"`, the authors' rule, fixes the grid to the last step (computed iff i = T-1 or i mod interval = 0);
    `"start"` to the first (k mod interval = 0), as other papers' "FORA" baselines do.
    """

    interval: int = 3
    anchor: str = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)
        check_choice("anchor", self.anchor, ("end", "start"))

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        k = np.arange(num_steps)
        i = k if self.anchor == "start" else num_steps - 1 - k
        return columns((i % self.interval == 0) | (k == 0), sites)


@dataclass(frozen=True)
class Counter(When):
    """The first `first_full` steps, then every interval-th after the last full one (ToCa's rule for FLUX)."""

    interval: int = 4
    first_full: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)
        check_int("first_full", self.first_full, 1)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        k = np.arange(num_steps)
        since = k - (self.first_full - 1)
        return columns((since <= 0) | (since % self.interval == 0), sites, otherwise=PARTIAL)


@dataclass(frozen=True)
class ModuleIntervals(When):
    """An interval of its own for every kind of site (ToCa's rule for Open-Sora: 3 / 6 / 3)."""

    attention: int = 3
    cross_attention: int = 6
    mlp: int = 3
    first_full: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention", "cross_attention", "mlp", "first_full"):
            check_int(name, getattr(self, name), 1)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        k = np.arange(num_steps)[:, None]
        by_kind: Mapping[str, int] = {"attention": self.attention, "cross-attention": self.cross_attention}
        interval = np.array([by_kind.get(site.kind, self.mlp) for site in sites])
        return np.where((k < self.first_full) | (k % interval == 0), COMPUTE, PARTIAL)


@dataclass(frozen=True)
class DualModuleIntervals(ModuleIntervals):
    """Between the full steps partial and aggressive ones in turn (DuCa's rule for Open-Sora).

    With intervals 3 / 6 / 3 a cycle of six: F P A F P A, of cross-attention F P A P P A. In an aggressive step no block
    is computed and the state that left the last block in the previous step enters the final layer. Cross-attention has
    no partial steps: whatever the ratio, it is reused.
    """

    uses_stack: ClassVar[bool] = True

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        table = super().table(num_steps, sites)
        k = np.arange(num_steps)
        since = k % self.attention
        aggressive = (k >= self.first_full) & (since > 0) & (since % 2 == 0)
        cross = np.array([site.kind == "cross-attention" for site in sites])
        table[(table == PARTIAL) & cross] = REUSE
        table[aggressive] = REUSE
        stack = [site.kind == "stack" for site in sites]
        table[np.ix_(~aggressive, stack)] = COMPUTE
        return table


@dataclass(frozen=True)
class Table(When):
    """Any plan, entry by entry. A run of another number of steps is refused."""

    plan: Plan

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.plan, Plan):
            object.__setattr__(self, "plan", Plan.from_dict(self.plan))

    @property
    def uses_stack(self) -> bool:  # type: ignore[override]
        return "stack" in self.plan.kinds

    @property
    def head(self) -> int:  # type: ignore[override]
        """That of the schedule whose trace the plan is."""
        return int(self.plan.meta.get("head", 0))

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """The plan's table, columns in the order of `sites`.

        Raises:
            ValueError: the plan was made for another number of steps, or for a model with other sites.
        """
        if num_steps != len(self.plan.steps):
            raise ValueError(
                f"the plan has {len(self.plan.steps)} steps, but this run has {num_steps}: dittocache.tune.resample "
                "makes one of it for other steps"
            )
        return align(self.plan, sites)
