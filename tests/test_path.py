"""The path over the steps of a run, against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dittocache.tune import cheapest


def price(costs: np.ndarray, computed: tuple[int, ...], objective: str) -> float:
    """What a plan costs, step by step."""
    steps, found = len(costs), {a: [0.0] for a in computed}
    for k in range(steps):
        if k not in computed:
            before = [a for a in computed if a < k]
            found[before[-1]].append(costs[k, before[-1], before[-2] if len(before) > 1 else steps])
    if objective == "coherent":
        return sum(sum(np.sqrt(stretch)) ** 2 for stretch in found.values())
    return (max if objective == "max" else sum)(cost for stretch in found.values() for cost in stretch)


@pytest.mark.parametrize("objective", ["sum", "max", "coherent"])
@given(steps=st.integers(1, 7), seed=st.integers(0, 10**6), forbidden=st.sampled_from([0.0, 0.2, 0.6]))
def test_no_other_plan_is_cheaper(objective, steps, seed, forbidden):
    generator = np.random.default_rng(seed)
    costs = generator.random((steps, steps, steps + 1))
    costs[generator.random(costs.shape) < forbidden] = np.inf
    paths = cheapest(costs, objective)
    for budget in range(1, steps + 1):
        others = itertools.combinations(range(1, steps), budget - 1)
        best = min(price(costs, (0, *rest), objective) for rest in others)
        assert paths.totals[budget] == pytest.approx(best)
        if np.isfinite(paths.totals[: budget + 1]).any():
            found = paths.steps(budget)
            assert len(found) <= budget and found[0] == 0 and found == tuple(sorted(set(found)))
            assert price(costs, found, objective) == pytest.approx(paths.totals[: budget + 1].min())


def test_costs_that_depend_on_the_gap_before():
    """After two neighbours a step is cheap to fill, so the path computes two in a row."""
    steps = 6
    k, a, p = np.ogrid[:steps, :steps, : steps + 1]
    costs = np.where(a - p == 1, 0.1, 1.0) * (k - a) * np.ones((steps, steps, steps + 1))
    assert cheapest(costs).steps(2) == (0, 1)
    assert cheapest(costs).totals[2] == pytest.approx(0.1 * (1 + 2 + 3 + 4))
    assert cheapest(costs).steps(6) == tuple(range(6)) and cheapest(costs).totals[6] == 0


def test_a_budget_that_cannot_be_met():
    costs = np.full((4, 4, 5), np.inf)
    costs[3] = 1.0
    paths = cheapest(costs)
    assert paths.steps(3) == (0, 1, 2) and paths.totals.tolist() == [np.inf, np.inf, np.inf, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"no plan computes 2 steps: at least 3 of them are needed"):
        paths.steps(2)


@pytest.mark.parametrize(
    ("costs", "objective", "message"),
    [
        (np.zeros((3, 3, 3)), "sum", r"costs must be \[T, T, T \+ 1\]; got \[3, 3, 3\]"),
        (np.zeros((0, 0, 1)), "sum", "costs must be"),
        (np.full((3, 3, 4), -1.0), "sum", "costs must be 0 or more, and not nan"),
        (np.full((3, 3, 4), np.nan), "sum", "costs must be 0 or more, and not nan"),
        (np.zeros((3, 3, 4)), "mean", "objective must be one of sum, max, coherent; got 'mean'"),
    ],
)
def test_costs_that_are_none(costs, objective, message):
    with pytest.raises(ValueError, match=message):
        cheapest(costs, objective)
