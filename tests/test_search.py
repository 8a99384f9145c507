"""The local search, with a planner that knows what every plan costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from dittocache import Recipe
from dittocache.tune import search
from dittocache.when import ReuseSteps

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
    """Some number that has nothing to do with how plans are numbered."""
    return math.sin(sum(37 * (n + 2) * k for n, k in enumerate(steps)))


def apart(steps: Steps, wanted: Steps) -> float:
    return float(sum(abs(a - b) for a, b in zip(steps, wanted, strict=True)))


def neighbours(steps: Steps) -> set[Steps]:
    """One step taken elsewhere."""
    free = set(range(1, STEPS)) - set(steps)
    return {tuple(sorted({*steps, new} - {old})) for old in steps[1:] for new in free}


def test_moves_are_tried_in_the_order_of_their_predicted_loss():
    planner = Known(lambda steps: 1.0, scattered)
    recipe, error = search(planner, 3, tries=100)
    start, *moves = planner.order
    assert start == (0, 1, 2) and error == 1 and recipe.when.steps == (3, 4, 5, 6, 7)
    losses = [scattered(move) for move in moves]
    assert losses == sorted(losses) and losses != sorted(losses, reverse=True)
    assert neighbours(start) <= set(moves), "nothing is better, so that all are tried"


def test_after_a_better_plan_its_own_moves_are_tried_the_likeliest_first():
    """The prediction is right, so that the first move of each round is the best one."""
    wanted = (0, 4, 6)
    planner = Known(lambda steps: apart(steps, wanted), lambda steps: apart(steps, wanted))
    recipe, error = search(planner, 3, tries=100)
    assert error == 0 and recipe.when.steps == (1, 2, 3, 5, 7)
    best, rounds = planner.order[0], 0
    for steps in planner.order[1:]:
        if apart(steps, wanted) < apart(best, wanted):
            assert apart(steps, wanted) == min(apart(one, wanted) for one in neighbours(best))
            best, rounds = steps, rounds + 1
    assert best == wanted and planner.order[1 : 1 + rounds][-1] == wanted and rounds == 2


def test_no_plan_is_drawn_twice_and_the_best_so_far_is_told():
    planner, told = Known(scattered, lambda steps: -scattered(steps), [(0, 1, 2), (0, 3, 5)]), []
    _, error = search(planner, 3, tries=20, tried=lambda count, least: told.append((count, least)))
    assert planner.order[:2] == [(0, 1, 2), (0, 3, 5)] and len(set(planner.order)) == len(planner.order) <= 20
    least = list(itertools.accumulate(map(scattered, planner.order), min))
    assert told == list(enumerate(least, 1)) and error == least[-1]
    assert [most for _, most in planner.asked] == [np.inf, *least[:-1]], "what a plan has to beat"
    for steps in planner.order:
        assert steps[0] == 0 and len(steps) == 3 and steps == tuple(sorted(set(steps))) and steps[-1] < STEPS


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_so_many_plans_and_no_more(tries):
    planner = Known(lambda steps: 1.0, scattered, [(0, 1, 2), (0, 3, 5), (0, 2, 4)])
    search(planner, 3, tries=tries)
    assert len(planner.asked) == tries


def test_a_true_answer_ends_the_search():
    planner = Known(lambda steps: 1.0, scattered)
    search(planner, 3, tries=100, tried=lambda count, least: count == 4)
    assert len(planner.asked) == 4


def test_the_best_of_several_starts_is_the_one_to_move_from():
    starts = [(0, 1, 2), (0, 4, 5), (0, 1, 3)]
    planner = Known(lambda steps: apart(steps, (0, 4, 6)) + 10 * (steps not in starts), scattered, starts)
    recipe, error = search(planner, 3, tries=100)
    assert error == 1 and recipe.when.steps == (1, 2, 3, 6, 7)
    assert neighbours((0, 4, 5)) <= set(planner.order)
    assert not neighbours((0, 1, 2)) <= set(planner.order)


def test_one_computed_step_has_no_moves():
    planner = Known(lambda steps: 1.0, scattered, [(0,)])
    search(planner, 1, tries=10)
    assert planner.order == [(0,)]


def test_pictures_that_are_not_finite():
    with pytest.raises(ValueError, match="no plan gives pictures of finite error"):
        search(Known(lambda steps: np.nan, scattered), 3, tries=3)
