"""The local search, with a planner that knows what every plan costs."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dittocache import Recipe
from dittocache.tune import search, surrogate
from dittocache.tune.surrogate import expected_gains
from dittocache.when import ReuseSteps

searching = sys.modules["dittocache.tune.search"]  # its function has the same name
Steps = tuple[int, ...]
STEPS = 8


@dataclass
class Known:
    """A `Planner` whose plans have the error that a function says; notes what is asked of it."""

    error: Callable[[Steps], float]
    predicted: Callable[[Steps], float]
    starts: list[Steps] = field(default_factory=lambda: [(0, 1, 2)])
    steps: int = STEPS
    asked: list[tuple[Steps, float]] = field(default_factory=list)

    def candidates(self, budget: int) -> list[Steps]:
        return self.starts

    def loss(self, computed: Sequence[int]) -> float:
        return self.predicted(tuple(computed))

    def made(self, computed: Sequence[int], most: float = np.inf) -> tuple[Recipe | None, float]:
        self.asked.append((tuple(computed), most))
        return Recipe(ReuseSteps(tuple(k for k in range(self.steps) if k not in computed))), self.error(tuple(computed))

    @property
    def order(self) -> list[Steps]:
        return [steps for steps, _ in self.asked]


def scattered(steps: Steps) -> float:
    """Some number from 1 to 3 that has nothing to do with how plans are numbered."""
    return 2 + math.sin(sum(37 * (n + 2) * k for n, k in enumerate(steps)))


def apart(steps: Steps, wanted: Steps) -> float:
    return float(sum(abs(a - b) for a, b in zip(steps, wanted, strict=True)))


def neighbours(steps: Steps) -> set[Steps]:
    """One step taken elsewhere."""
    free = set(range(1, STEPS)) - set(steps)
    return {tuple(sorted({*steps, new} - {old})) for old in steps[1:] for new in free}


def test_what_is_predicted_to_lose_the_least_is_tried_first():
    """With nothing else to go by, and twice what it was before."""
    planner = Known(lambda steps: 2 * scattered(steps), scattered)
    recipe, error = search(planner, 3, tries=2)
    start, first = planner.order
    assert start == (0, 1, 2) and scattered(first) <= min(map(scattered, neighbours(start)))
    assert error == 2 * min(scattered(start), scattered(first))
    assert recipe.when.steps == tuple(k for k in range(STEPS) if k not in min(start, first, key=scattered))


def test_a_prediction_that_is_right_leads_straight_to_the_best_plan():
    wanted = (0, 4, 6)
    planner = Known(lambda steps: 1 + apart(steps, wanted), lambda steps: 1 + apart(steps, wanted))
    recipe, error = search(planner, 3, tries=100)
    assert error == 1 and recipe.when.steps == (1, 2, 3, 5, 7)
    assert wanted in planner.order[:4] and len(planner.order) < 10, "and ends when nothing promises anything"


@pytest.mark.parametrize("seed", range(5))
def test_what_was_tried_tells_where_to_go_on(seed):
    """Predictions are worthless here. A plan of 7 of 30 steps has 138 neighbours, and the best is many moves away."""
    rng = np.random.default_rng(seed)
    wanted, start = ((0, *sorted(rng.choice(np.arange(1, 30), 6, replace=False).tolist())) for _ in range(2))
    weights = rng.uniform(0.5, 2, 7)

    def error(steps: Steps) -> float:
        return math.exp(sum(w * ((a - b) / 8) ** 2 for w, a, b in zip(weights, steps, wanted, strict=True)))

    planner = Known(error, lambda steps: scattered(steps), [start], steps=30)
    _, found = search(planner, 7, tries=50)
    assert math.log(found) < 0.1 * math.log(error(start)) and math.log(found) < 0.5


def test_plans_that_must_not_be_are_not_tried():
    planner = Known(scattered, lambda steps: np.inf if 3 in steps else 1.0)
    search(planner, 3, tries=100)
    assert len(planner.order) > 3 and not any(3 in steps for steps in planner.order)


def test_a_plan_that_is_given_up_is_taken_to_be_bad():
    """All with step 7: it is hardly asked for again."""
    planner = Known(lambda steps: np.inf if 7 in steps else 1 + apart(steps, (0, 3, 5)), lambda steps: 1.0)
    _, error = search(planner, 3, tries=15)
    assert error == 1 and sum(7 in steps for steps in planner.order) <= 5


def test_no_plan_is_drawn_twice_and_the_best_so_far_is_told():
    planner, told = Known(scattered, lambda steps: 4 - scattered(steps), [(0, 1, 2), (0, 3, 5)]), []
    _, error = search(planner, 3, tries=20, tried=lambda count, least: told.append((count, least)))
    assert planner.order[:2] == [(0, 1, 2), (0, 3, 5)] and len(set(planner.order)) == len(planner.order) <= 20
    least = list(itertools.accumulate(map(scattered, planner.order), min))
    assert told == list(enumerate(least, 1)) and error == least[-1]
    assert [most for _, most in planner.asked] == [np.inf, *least[:-1]], "what a plan has to beat"
    for steps in planner.order:
        assert steps[0] == 0 and len(steps) == 3 and steps == tuple(sorted(set(steps))) and steps[-1] < STEPS


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_so_many_plans_and_no_more(tries):
    planner = Known(lambda steps: scattered(steps[::-1]), scattered, [(0, 1, 2), (0, 3, 5), (0, 2, 4)])
    search(planner, 3, tries=tries)
    assert len(planner.asked) == tries


def test_a_true_answer_ends_the_search():
    planner = Known(lambda steps: 1.0, scattered)
    search(planner, 3, tries=100, tried=lambda count, least: count == 4)
    assert len(planner.asked) == 4


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list[Steps], list[float], list[Steps]]]:
    """What is asked of the surrogate: plans, their errors, and others."""
    found = []

    def gains(plans, errors, predicted, others, *rest):
        found.append((list(plans), errors.tolist(), list(others)))
        return expected_gains(plans, errors, predicted, others, *rest)

    monkeypatch.setattr(searching, "expected_gains", gains)
    return found


def test_moves_start_from_the_best_three_plans(asked):
    starts = [(0, 4, 5), (0, 4, 7), (0, 5, 6), (0, 1, 2)]
    search(Known(lambda steps: 1 + apart(steps, (0, 4, 6)), lambda steps: 1.0, starts), 3, tries=5)
    assert (0, 5, 7) in asked[0][2] and (0, 1, 3) not in asked[0][2]
    assert len(starts) == 4, "the planner's own list is left as it is"


def test_a_plan_that_is_given_up_counts_as_the_worst(asked):
    errors = {(0, 1, 2): 4.0, (0, 3, 5): 2.0, (0, 4, 6): np.inf, (0, 4, 5): np.nan}
    search(Known(lambda steps: errors.get(steps, 3.0), lambda steps: 1.0, list(errors)), 3, tries=5)
    plans, told, _ = asked[0]
    assert plans[:2] == [(0, 3, 5), (0, 1, 2)] and told == [2, 4, 4, 4]


def test_a_start_that_must_not_be_tells_nothing(asked):
    starts = [(0, 1, 2), (0, 3, 5)]
    planner = Known(
        lambda steps: 1 + apart(steps, (0, 4, 6)), lambda steps: np.inf if steps == (0, 1, 2) else 1.0, starts
    )
    assert search(planner, 3, tries=40)[1] == 1 and asked[0][0] == [(0, 3, 5)]


@pytest.mark.parametrize(("gain", "tries"), [(0.9e-3, 1), (1.1e-3, 9)])
def test_a_small_gain_is_worth_a_try(monkeypatch, gain, tries):
    monkeypatch.setattr(searching, "expected_gains", lambda *asked: np.full(len(asked[3]), gain))
    planner = Known(lambda steps: 1.0, lambda steps: 1.0)
    search(planner, 3, tries=9)
    assert len(planner.order) == tries


def test_moves_start_from_the_best_plans():
    """Of four starts, the last is far off, and its neighbours are predicted to be as good as all others."""
    starts = [(0, 4, 5), (0, 4, 7), (0, 5, 6), (0, 1, 2)]
    planner = Known(lambda steps: 1 + apart(steps, (0, 4, 6)), lambda steps: 1.0, starts)
    _, error = search(planner, 3, tries=100)
    assert error == 1 and (0, 4, 6) in planner.order[4:7]
    near = set().union(*map(neighbours, planner.order[:3]))
    assert planner.order[4] in near


def test_plans_may_differ_in_length():
    """A cheapest path may compute fewer steps than it might."""
    planner = Known(lambda steps: 1 + abs(sum(steps) - 10) / len(steps), lambda steps: 1.0, [(0, 2), (0, 1, 2)])
    _, error = search(planner, 3, tries=30)
    assert error < 1.5 and {len(steps) for steps in planner.order} == {2, 3}


def test_one_computed_step_has_no_moves():
    planner = Known(lambda steps: 1.0, scattered, [(0,)])
    search(planner, 1, tries=10)
    assert planner.order == [(0,)]


def test_a_perfect_plan_ends_the_search():
    planner = Known(lambda steps: 0.0, scattered)
    assert search(planner, 3, tries=10)[1] == 0 and len(planner.order) == 1


def test_pictures_that_are_not_finite():
    with pytest.raises(ValueError, match="no plan gives pictures of finite error"):
        search(Known(lambda steps: np.nan, scattered), 3, tries=3)


# ---- the surrogate --------------------------------------------------------------------------------------------------
PLANS = [(0, 2, 5), (0, 3, 5), (0, 3, 6), (0, 1, 4), (0, 5, 7)]
ERRORS = np.array([1.0, 0.7, 0.9, 2.0, 1.5])


def test_the_gain_is_that_of_the_conditional_normal_distribution(monkeypatch):
    """The joint covariance of tried and other plans, conditioned, and drawn from."""
    monkeypatch.setattr(surrogate, "LENGTHS", (0.25,))
    monkeypatch.setattr(surrogate, "NOISES", (0.1,))
    others = [(0, 3, 4), (0, 2, 6), (0, 1, 2)]
    predicted, of_others = np.array([3.0, 2.0, 2.5, 4.0, 3.5]), np.array([2.2, 2.4, 5.0])
    found = expected_gains(PLANS, ERRORS, predicted, others, of_others, STEPS)
    x, y = np.log(predicted), np.log(ERRORS)
    slope = (np.cov(x, y, bias=True)[0, 1] * 5 + 0.5) / (x.var() * 5 + 0.5)
    rest = y - y.mean() - slope * (x - x.mean())
    scatter = np.sqrt((rest @ rest + 0.5) / 7)
    points = np.array([*PLANS, *others]) / STEPS
    far = np.linalg.norm(points[:, None] - points[None], axis=2) * np.sqrt(5) / 0.25
    joint = scatter**2 * ((1 + far + far**2 / 3) * np.exp(-far))
    joint[:5, :5] += (0.1 * scatter) ** 2 * np.eye(5)
    gain = joint[5:, :5] @ np.linalg.inv(joint[:5, :5])
    mean = y.mean() + slope * (np.log(of_others) - x.mean()) + gain @ rest
    spread = np.sqrt(np.diag(joint[5:, 5:] - gain @ joint[:5, 5:]))
    drawn = np.random.default_rng(0).normal(mean, spread, (400_000, 3))
    assert found == pytest.approx(np.maximum(y.min() - drawn, 0).mean(0), rel=0.02, abs=1e-4)
    assert found.argmax() == 1


def test_the_length_is_the_likeliest():
    """Errors drawn at one length: the evidence, against the density of the joint normal distribution."""
    points = np.random.default_rng(1).uniform(size=(12, 2))
    for length in surrogate.LENGTHS:
        covariance = surrogate._matern(points, points, length) + 0.1**2 * np.eye(12)
        values = np.random.default_rng(2).multivariate_normal(np.zeros(12), covariance)
        normal = torch.distributions.MultivariateNormal(torch.zeros(12).double(), torch.tensor(covariance))
        wanted = float(normal.log_prob(torch.tensor(values))) + 6 * math.log(2 * math.pi)
        assert surrogate._evidence(points, values, length, 0.1) == pytest.approx(wanted, rel=1e-6)


def test_a_plan_that_was_tried_promises_little():
    tried, other = expected_gains(PLANS, ERRORS, np.ones(5), [(0, 1, 4), (0, 4, 5)], np.ones(2), STEPS)
    assert tried < 0.1 * other


def test_a_step_that_a_plan_does_not_have_is_at_the_end():
    short, long = surrogate._placed([(0, 2)], [(0, 1, 4)], 8)
    assert short.tolist() == [[0, 0.25, 1]] and long.tolist() == [[0, 0.125, 0.5]]


def test_predictions():
    """The wrong way round they do not count, and one of zero is finite."""
    assert surrogate._slope(np.arange(9.0), -np.arange(9.0)) == 0
    less, more = expected_gains(PLANS, ERRORS, 1e-6 * ERRORS, [(0, 1, 7), (0, 1, 7)], np.array([1e-7, 1e-6]), STEPS)
    assert less > 1.5 * more
    with_zero = expected_gains(PLANS, ERRORS, np.array([0, 5, 5, 5, 5.0]), [(0, 3, 4)], np.array([4.0]), STEPS)
    assert np.isfinite(with_zero).all()
