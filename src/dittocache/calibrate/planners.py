"""The published planners of DPCache and LeMiCa: costs and plans, apart from models.

A plan is the tuple of steps that are computed in full; T is their number in all, and stands for the end of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..fill import Taylor
from ..fill.taylor import coefficients

History = Literal["dense", "path"]
Objective = Literal["minimax", "sum"]
Plan = tuple[int, ...]
END_FORECAST = 0.8  # share of the forecast in what stands for the step after the last; the rest is a mean


# ---- DPCache (arXiv 2602.22654) -------------------------------------------------------------------------------------
class Segment(NamedTuple):
    """Steps that are forecast between two computed ones, whatever the second is.

    Attributes:
        place: where its costs stand, all but the last index: computed steps, oldest first.
        steps: that the forecast is made from, newest first.
        stop: the last next step that may follow.
    """

    place: tuple[int, ...]
    steps: tuple[int, ...]
    stop: int


def segments(num_steps: int, order: int, max_gap: int, history: History = "dense") -> Iterator[Segment]:
    """Every segment whose costs are measured.

    Args:
        num_steps: T.
        order: O, the highest power of the forecast.
        max_gap: L, the most steps from one computed step to the next.
        history: "dense", the authors': a segment is told by its previous and its current computed step, and what lies
            before is taken to be computed step by step. "path": by as many computed steps as the forecast is made from.
    """
    for current in range(order, num_steps):
        if history == "dense":
            for previous in range(max(0, current - max_gap, order - 1), current):
                steps = (current, *range(previous, previous - order, -1))
                yield Segment((previous, current), steps, num_steps)
        else:
            for steps in _chains(current, order, max_gap):
                yield Segment(steps[::-1], steps, min(current + max_gap, num_steps))


def _chains(newest: int, length: int, max_gap: int) -> Iterator[tuple[int, ...]]:
    """Falling steps, so many before the newest, with gaps that are allowed."""
    if not length:
        yield (newest,)
        return
    for older in range(max(0, newest - max_gap, length - 1), newest):
        for rest in _chains(older, length - 1, max_gap):
            yield (newest, *rest)


def blank(num_steps: int, order: int, history: History = "dense") -> Tensor:
    """Costs of no segment yet: inf, but for the first `order` steps, which lead to the next one free of charge.

    Returns:
        [T, T + 1, T + 1] for (previous, current, next), in float64; [T, T + 1, ...] of order + 2 dimensions for whole
        paths. Where less lies behind, the indices in front are 0.
    """
    dimensions = 3 if history == "dense" else order + 2
    costs = torch.full((num_steps, *[num_steps + 1] * (dimensions - 1)), torch.inf, dtype=torch.float64)
    for current in range(order):
        if history == "dense":
            costs[: current + 1, current, current + 1] = 0.0
        else:
            behind = [0] * (order - current) + list(range(current + 1))
            costs[(*behind, current + 1)] = 0.0
    return costs


def end_target(features: Tensor, order: int, share: float = END_FORECAST) -> Tensor:
    """What stands for the features of the step after the last: its forecast and the mean of the last ones, mixed."""
    num_steps, count = len(features), order + 1
    newest = torch.tensor(coefficients(range(num_steps - 1, num_steps - 1 - count, -1), num_steps, order))
    last = features[-count:]
    forecast = torch.tensordot(newest.flip(0).to(last), last, dims=1)
    return share * forecast + (1 - share) * last.mean(0)


def segment_costs(
    features: Tensor,
    order: int,
    max_gap: int,
    history: History = "dense",
    guard: int = 0,
    end_share: float = END_FORECAST,
) -> Tensor:
    """DPCache's path-aware costs: what forecasting between computed steps does to the last hidden state.

    For every next step n, half of the mean absolute errors at all steps after the current one up to n, n included
    although it will be computed, are summed.

    Args:
        features: [T, ...] of an uncached run; the mean is over all of the rest.
        order: O, from 1 to T - 1.
        max_gap: L.
        history: see `segments`.
        guard: no differences are formed at steps up to this one, as in the `Taylor` that the plan is run with. The
            authors' costs do without, though their runs have it.
        end_share: of the forecast in the target of the end.

    Returns:
        As `blank`; inf where no segment is.
    """
    flat = features.flatten(1).float()
    flat = torch.cat([flat, end_target(flat, order, end_share)[None]])
    taylor, costs = Taylor(order, start=guard), blank(len(features), order, history)
    for place, steps, stop in segments(len(features), order, max_gap, history):
        later = range(steps[0] + 1, stop + 1)
        factors = torch.tensor([taylor.factors(steps, step) for step in later]).to(flat)
        error = (factors @ flat[list(steps)] - flat[steps[0] + 1 : stop + 1]).abs().mean(1)
        costs[place][steps[0] + 1 : stop + 1] = error.double().cumsum(0).cpu() / 2
    return costs


def measured(num_steps: int, order: int, max_gap: int, history: History = "dense") -> Tensor:
    """Where `segment_costs` are finite."""
    costs = blank(num_steps, order, history)
    for place, steps, stop in segments(num_steps, order, max_gap, history):
        costs[place][steps[0] + 1 : stop + 1] = 0.0
    return costs.isfinite()


def forced_steps(num_steps: int, first_full: int, last_full: int) -> set[int]:
    """Steps that every plan computes: the first ones, at least step 0, and the last ones; and the end."""
    return {0, *range(min(first_full, num_steps)), *range(max(num_steps - last_full, 0), num_steps + 1)}


def allowed(costs: Any, forced: set[int], max_gap: int) -> np.ndarray:
    """The costs, inf where a segment passes a forced step or is longer than `max_gap`."""
    costs = np.asarray(costs, dtype=np.float64)
    current, following = np.ogrid[: costs.shape[-2], : costs.shape[-1]]
    far = following - current > max_gap
    for step in forced:
        far = far | ((current < step) & (step < following))
    return np.where(far, np.inf, costs)


def authors_plan(costs: np.ndarray, budget: int) -> Plan:
    """The authors' recurrence over (number of computed steps, next step), with one predecessor kept for each.

    Costs depend on the predecessor, so the plan need not be the cheapest. Where the end cannot be reached the plan
    stops early, at the step that is cheapest to come to; see `path_cost`.

    Args:
        costs: [T, T + 1, T + 1], what is not `allowed` is inf.
        budget: K, computed steps; more than T are T.
    """
    num_steps = len(costs)
    budget, currents = min(budget, num_steps), np.arange(num_steps)
    best = np.full(num_steps + 1, np.inf)
    best[0] = 0.0
    before = np.zeros((budget + 1, num_steps + 1), dtype=np.int64)
    for m in range(1, budget + 1):
        totals = best[:-1, None] + costs[before[m - 1, :-1], currents]
        before[m], best = totals.argmin(0), totals.min(0)  # of equal ones, the smallest current step
    n, plan = num_steps if np.isfinite(best[-1]) else int(best.argmin()), list[int]()
    for m in range(budget, 0, -1):
        n = int(before[m, n])
        plan.append(n)
    return tuple(reversed(plan))


def exact_plan(costs: np.ndarray, budget: int) -> Plan:
    """The cheapest plan with exactly so many computed steps; the last ones are the state, as many as costs depend on.

    Args:
        costs: of any number of dimensions, for (..., previous, current, next); what is not `allowed` is inf.
        budget: K, computed steps.

    Returns:
        The plan; empty if the end cannot be reached.
    """
    num_steps = len(costs)
    state = np.full(costs.shape[:-1], np.inf)
    state[(0,) * state.ndim] = 0.0
    oldest: list[np.ndarray] = []
    for _ in range(budget):
        through = state[..., None] + costs
        oldest.append(through.argmin(0))
        arrived = through.min(0)
        state = arrived[:num_steps]
    ended = arrived[..., num_steps]
    if not np.isfinite(ended.min()):
        return ()
    at = (*np.unravel_index(ended.argmin(), ended.shape), num_steps)
    plan = list[int]()
    for before in reversed(oldest):
        at = (before[at], *at[:-1])
        plan.append(int(at[-1]))
    return tuple(reversed(plan))


def path_cost(costs: np.ndarray, plan: Sequence[int]) -> float:
    """What a plan costs with its true predecessors; inf if it does not come to the end."""
    states = costs.ndim
    path = [*[0] * (states - 2), *plan, len(costs)]
    return float(sum(costs[tuple(path[n : n + states])] for n in range(len(plan))))


# ---- LeMiCa (arXiv 2511.00090) --------------------------------------------------------------------------------------
# what a path costs so far, and with one more segment; errors in falling order are compared one by one
PATHS: dict[Objective, tuple[Any, Callable[[Any, float], Any]]] = {
    "minimax": ((), lambda errors, error: tuple(sorted((*errors, error), reverse=True))),
    "sum": (0.0, lambda total, error: total + error),
}


def segment_plan(weights: Any, budget: int, objective: Objective = "minimax") -> Plan:
    """The plan with exactly so many computed steps, the run's first and last among them, with the least errors.

    Adding the same error to two of them leaves their order as it is, so that layer by layer the best path to every step
    is enough.

    Args:
        weights: [T, T], error of the segment from computed step i to computed step j; inf for what must not be.
        budget: B, computed steps.
        objective: "minimax", LeMiCa's: the largest error first, of equal ones the second largest, and so on; or their
            "sum", which the paper compares with.

    Returns:
        The plan; empty if there is none.
    """
    weights = np.asarray(weights, dtype=np.float64)
    nothing, more = PATHS[objective]
    best: dict[int, tuple[Any, Plan]] = {0: (nothing, (0,))}
    for _ in range(budget - 1):
        found: dict[int, tuple[Any, Plan]] = {}
        for i in sorted(best):
            errors, plan = best[i]
            for j in range(i + 1, len(weights)):
                joined = more(errors, float(weights[i, j]))
                if np.isfinite(weights[i, j]) and (j not in found or joined < found[j][0]):
                    found[j] = joined, (*plan, j)
        best = found
    return best.get(len(weights) - 1, (None, ()))[1]


def segment_errors(weights: Any, plan: Sequence[int]) -> list[float]:
    """Errors of a plan's segments, the largest first."""
    weights = np.asarray(weights, dtype=np.float64)
    return sorted((float(weights[i, j]) for i, j in itertools.pairwise(plan)), reverse=True)
