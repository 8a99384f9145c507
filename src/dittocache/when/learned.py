"""Schedules that are learned or listed: L2C's router, EB-Cache's states, a plain list of reused steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parts import check_choice, check_int, check_ints, check_number, show
from ..plan import COMPUTE, REUSE, Site
from ..tensors import Tensors
from .base import When, columns


@dataclass(frozen=True)
class ReuseSteps(When):
    """The steps k in `steps` are reused, all others computed (how EOC and GOC state their schedules)."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints("reuse_steps", self.steps, 1)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Raises a ValueError for a reused step beyond the run's last."""
        check_ints(f"reuse_steps in a run of {num_steps} steps", self.steps, 1, num_steps - 1)
        computed = ~np.isin(np.arange(num_steps), self.steps)
        return columns(computed, sites)


@dataclass(frozen=True)
class Router(When):
    """A learned table of scores (L2C, arXiv 2406.01733): at every second step, sites with a low score are reused.

    A site is computed iff sigmoid(logit) > threshold, strictly. What is reused is never older than one step.

    Args:
        logits: "logits" -> [rows, sites], columns in order of execution (attention and feed-forward of block 0, ...).
        threshold: theta.
        rows: "index": row i of T = i-th step from the end; rows of odd i exist but are not read, steps of odd i are
            full, and with an odd T so is the first step, which has nothing to reuse. "outer": for second-order solvers
            that evaluate a start and a mid point (U-ViT): row r is the start point of outer step r, evaluation k = 2r;
            mid points and r = 0 are full, and so is what an odd T adds.
    """

    logits: Tensors
    threshold: float = 0.1
    rows: str = "index"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 0, 1)
        check_choice("rows", self.rows, ("index", "outer"))
        if not isinstance(self.logits, Tensors):
            object.__setattr__(self, "logits", Tensors(self.logits))
        if set(self.logits) != {"logits"} or self.logits["logits"].ndim != 2:
            found = ", ".join(f"{show(name)} {list(table.shape)}" for name, table in self.logits.items())
            raise ValueError(f"a router is one table 'logits' [rows, sites]; got {found[:80] or 'none'}")

    def fits(self, sites: Sequence[Site]) -> None:
        columns = self.logits["logits"].shape[1]
        if columns != len(sites):
            raise ValueError(f"the router has {columns} columns, but the model has {len(sites)} sites")

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Raises a ValueError for a table of another number of steps or sites."""
        self.fits(sites)
        logits = self.logits["logits"].float()
        needed = num_steps if self.rows == "index" else num_steps // 2
        if len(logits) != needed and not (self.rows == "outer" and len(logits) >= needed):
            raise ValueError(f"the router has {len(logits)} rows, but this run needs {needed}: one for each step")
        computed = (logits.sigmoid() > self.threshold).numpy()
        k = np.arange(num_steps)
        if self.rows == "index":
            row, read = num_steps - 1 - k, ((num_steps - 1 - k) % 2 == 0) & (k > 0)
        else:
            row, read = k // 2, (k % 2 == 0) & (k > 0) & (k // 2 < needed)
        table = np.full((num_steps, len(sites)), COMPUTE)
        table[read] = np.where(computed[row[read]], COMPUTE, REUSE)
        return table


# state of a step -> (attention is computed, feed-forward is computed)
STATES = {0: (True, True), 1: (False, True), 2: (False, False), 3: (True, False)}


@dataclass(frozen=True)
class States(When):
    """One state for every step, all blocks alike (EB-Cache, arXiv 2503.07120).

    0 computes attention and feed-forward, 1 reuses attention, 2 reuses both, 3 reuses the feed-forward (not in the
    authors' release, only in their paper).

    Args:
        states: one for every step; None for the authors' schedule with base interval `interval`.
        interval: the base interval b: by share of the run, i the index from the end, steps are full every 3b for
            i > 0.8 T, every 2b for i > 0.4 T, else every b, and always for i < 0.2 T; the others have state 2.
        order: "sampling": entry k belongs to step k, as the schedule was designed; "index": to step T-1-k, which is
            how the release reads a file that was written in sampling order.
    """

    states: tuple[int, ...] | None = None
    interval: int = 1
    order: str = "sampling"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)
        check_choice("table_order", self.order, ("sampling", "index"))
        if self.states is not None:
            check_ints("table", self.states, 0, len(STATES) - 1)

    def at(self, num_steps: int) -> list[int]:
        """States in sampling order; the first step is always full.

        Raises:
            ValueError: the states are for another number of steps.
        """
        states = designed(num_steps, self.interval) if self.states is None else list(self.states)
        if len(states) != num_steps:
            raise ValueError(f"the table has {len(states)} states, but this run has {num_steps} steps")
        states = states if self.order == "sampling" else states[::-1]
        return [0, *states[1:]]

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        computed = np.array([STATES[state] for state in self.at(num_steps)])
        attention = np.array(["attention" in site.kind for site in sites])
        # a fused site holds both: it is reused only where both are
        fused = np.array([site.kind in ("fused", "stack") for site in sites])
        table = np.where(attention, computed[:, :1], computed[:, 1:])
        table = np.where(fused, computed.any(1, keepdims=True), table)
        return np.where(table, COMPUTE, REUSE)


def designed(num_steps: int, interval: int = 1) -> list[int]:
    """EB-Cache's schedule in sampling order: reuse where it is noisy, a full last fifth."""
    states = []
    for k in range(num_steps):
        i = num_steps - 1 - k
        every = interval * (3 if i > 0.8 * num_steps else 2 if i > 0.4 * num_steps else 1)
        states.append(0 if k % every == 0 or i < 0.2 * num_steps else 2)
    return states
