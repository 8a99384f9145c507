"""Which steps to compute: the cheapest path over the steps of a run, exactly, for every budget at once.

A computed step is a node, the steps that are filled between two of them an edge. What filling a step costs depends on
the last two computed steps (their features are what fills go on from), so these two are the state of a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..parts import check_choice, show

Objective = Literal["sum", "max", "coherent"]
OBJECTIVES: dict[str, Any] = {"sum": np.add, "max": np.maximum, "coherent": np.add}


@dataclass(frozen=True)
class Paths:
    """The cheapest path of every budget.

    Attributes:
        totals: [T + 1] what the cheapest path with exactly b computed steps costs; inf where there is none.
        before: [T + 1, T + 1, T + 1] how they go: before[b, n, a] is the computed step before a, for the cheapest path
            that computes b steps, a the last of them, before it comes to n; -1 for none.
    """

    totals: np.ndarray
    before: np.ndarray

    def steps(self, budget: int) -> tuple[int, ...]:
        """The computed steps of the cheapest path with at most so many of them.

        Raises:
            ValueError: no path computes as few as that; the least is named.
        """
        possible = np.flatnonzero(np.isfinite(self.totals))
        fitting = possible[possible <= budget]
        if not len(fitting):
            raise ValueError(f"no plan computes {show(budget)} steps: at least {possible[0]} of them are needed")
        b = int(fitting[np.argmin(self.totals[fitting])])
        n, found = len(self.totals) - 1, list[int]()
        a = int(self.before[b, n, n])
        while a >= 0:
            found.append(a)
            n, a, b = a, int(self.before[b, n, a]), b - 1
        return tuple(reversed(found))


def cheapest(costs: np.ndarray, objective: Objective = "sum") -> Paths:
    """The cheapest path of every budget; step 0 is always computed.

    Args:
        costs: [T, T, T + 1], costs[k, a, p] of filling step k from the computed steps a and p, p < a < k; p = T stands
            for none, where a is the first. Not negative; inf for what must not be. Other entries are not read.
        objective: of the costs of all filled steps, the "sum" or the largest ("max"). Or "coherent", for costs that are
            squares of errors: between two computed steps errors point into one direction and are added before they are
            squared, and these squares are summed.

    Raises:
        ValueError: costs of another shape, or negative or undefined ones.
    """
    check_choice("objective", objective, tuple(OBJECTIVES))
    costs = np.asarray(costs, dtype=np.float64)
    steps = len(costs)
    if costs.shape != (steps, steps, steps + 1) or not steps:
        raise ValueError(f"costs must be [T, T, T + 1]; got {list(costs.shape)}")
    k, a, p = np.ogrid[:steps, :steps, : steps + 1]
    read = (a < k) & ((p < a) | ((p == steps) & (a == 0)))
    if not (costs[read] >= 0).all():
        raise ValueError("costs must be 0 or more, and not nan")
    join = OBJECTIVES[objective]
    edges = np.full((steps + 1, steps, steps + 1), np.inf)
    filled = np.where(k > a, np.where(read, costs, np.inf), 0.0)
    if objective == "coherent":
        edges[1:] = join.accumulate(np.sqrt(filled), axis=0) ** 2
    else:
        edges[1:] = join.accumulate(filled, axis=0)
    return shortest(edges, "max" if objective == "max" else "sum")


def shortest(edges: np.ndarray, objective: Literal["sum", "max"] = "sum") -> Paths:
    """The cheapest path of every budget, from the costs of whole segments; step 0 is always computed.

    Args:
        edges: [T + 1, T, T + 1], edges[n, a, p] of filling every step between the computed steps a and n (n = T: up to
            the end), with p the computed step before a; p = T for none. Inf for what must not be; n <= a is not read.
        objective: of the costs of all segments, the "sum" or the largest ("max").

    Raises:
        ValueError: edges of another shape, or undefined ones.
    """
    check_choice("objective", objective, ("sum", "max"))
    join = OBJECTIVES[objective]
    steps = edges.shape[1]
    if edges.shape != (steps + 1, steps, steps + 1):
        raise ValueError(f"edges must be [T + 1, T, T + 1]; got {list(edges.shape)}")
    n = np.arange(steps + 1)
    edges = np.where((n[:, None] <= n[:-1])[..., None], np.inf, edges)
    if not (edges >= 0).all():
        raise ValueError("edges must cost 0 or more, and not nan")
    totals = np.full(steps + 1, np.inf)
    before = np.full((steps + 1, steps + 1, steps + 1), -1, dtype=np.int64)
    state = np.full((steps, steps + 1), np.inf)  # what it costs to have computed a last and p before it
    state[0, steps] = 0.0
    for b in range(1, steps + 1):
        through = join(state, edges)
        previous, arrived = through.argmin(2), through.min(2)
        before[b, :, :steps] = np.where(previous == steps, -1, previous)
        totals[b], before[b, steps, steps] = arrived[steps].min(), arrived[steps].argmin()
        state = np.full((steps, steps + 1), np.inf)
        state[:, :steps] = arrived[:steps]
    return Paths(totals, before)
