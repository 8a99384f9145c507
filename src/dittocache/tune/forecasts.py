"""From measured errors to a recipe: the cheapest path, then a local search on the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..calibrate.trial import Trial
from ..fill import Orders
from ..parts import check_int, check_number
from ..recipe import Recipe
from ..when import ReuseSteps
from .errors import StepErrors
from .path import Objective, cheapest

# of the path, and the power to which errors are raised first
OBJECTIVES: tuple[tuple[Objective, float], ...] = (
    ("coherent", 1.0),
    ("coherent", 0.5),
    ("sum", 1.0),
    ("sum", 0.5),
    ("sum", 0.25),
)
Tried = Callable[[int, float], None]  # recipes tried, the least error so far


def solve(errors: StepErrors, budget: int, objective: Objective = "coherent", power: float = 1.0) -> Recipe:
    """The recipe of the cheapest path with at most so many computed steps.

    Args:
        errors: as measured.
        budget: computed steps.
        objective: of the path, see `cheapest`.
        power: to which errors are raised first; less than 1 spreads them, as they compound.

    Raises:
        ValueError: a budget that no path meets, or a power out of range.
    """
    check_int("budget", budget, 1)
    check_number("power", power, 0)
    return planned(errors, cheapest(errors.costs**power, objective).steps(budget))


def planned(errors: StepErrors, computed: Sequence[int]) -> Recipe:
    """The recipe that computes these steps, each other one filled by the order that was best for it."""
    filled = _filled(errors, computed)
    orders = [0] * len(errors.weights)
    for at in filled:
        orders[at[0]] = int(errors.orders[at])
    return Recipe(ReuseSteps(tuple(k for k, _, _ in filled)), fill=Orders(tuple(orders)))


def loss(errors: StepErrors, computed: Sequence[int]) -> float:
    """Predicted squared error of the picture: the plain sum over the filled steps."""
    return float(sum(errors.costs[at] for at in _filled(errors, computed)))


def _filled(errors: StepErrors, computed: Sequence[int]) -> list[tuple[int, int, int]]:
    """Every filled step with the last two computed ones before it, as `StepErrors` numbers them."""
    steps, found = len(errors.weights), []
    for k in range(steps):
        if k not in computed:
            before = [a for a in computed if a < k]
            found.append((k, before[-1], before[-2] if len(before) > 1 else steps))
    return found


def candidates(errors: StepErrors, budget: int) -> list[tuple[int, ...]]:
    """Computed steps of several plans for a budget: cheapest paths by different objectives, and even steps.

    Which objective is right depends on the model and on the budget, so they are tried.

    Raises:
        ValueError: a budget that no path meets.
    """
    check_int("budget", budget, 1)
    paths = [cheapest(errors.costs**power, objective).steps(budget) for objective, power in OBJECTIVES]
    steps = len(errors.weights)
    even = tuple(sorted({n * steps // min(budget, steps) for n in range(min(budget, steps))}))
    return list(dict.fromkeys([*paths, *([even] if np.isfinite(loss(errors, even)) else [])]))


def search(
    trial: Trial, errors: StepErrors, budget: int, tries: int = 40, seed: int = 0, tried: Tried | None = None
) -> tuple[Recipe, float]:
    """Begins with the best of the candidates, and moves computed steps as long as that brings pictures closer.

    Every move shifts one computed step by one or two, or two of them by one each; moves that the measured errors find
    the least bad are tried first.

    Args:
        trial: pictures that the recipes are judged on, of other samples than the errors.
        budget: computed steps.
        tries: recipes that are drawn, at most.
        seed: of the moves of two steps.
        tried: called after every one of them.

    Returns:
        The best recipe, and its mean squared error.

    Raises:
        ValueError: a budget that no path meets.
    """
    check_int("tries", tries, 1)
    generator = np.random.default_rng(seed)
    best: tuple[int, ...] = (0,)
    error, seen = np.inf, set[tuple[int, ...]]()

    def better(steps: tuple[int, ...]) -> bool:
        nonlocal best, error
        seen.add(steps)
        found = trial.error(planned(errors, steps))
        improved = found < error
        if improved:
            best, error = steps, found
        if tried:
            tried(len(seen), error)
        return improved

    for start in candidates(errors, budget)[:tries]:
        better(start)
    improved = True
    while improved and len(seen) < tries:
        moves = sorted(_moves(best, len(errors.weights), generator) - seen, key=lambda m: loss(errors, m))
        improved = any(better(moved) for moved in moves[: tries - len(seen)])
    return planned(errors, best), error


def _moves(computed: Sequence[int], steps: int, generator: Any) -> set[tuple[int, ...]]:
    """Neighbours of a plan; step 0 stays computed."""
    shifts = [(n, by) for n in range(1, len(computed)) for by in (-2, -1, 1, 2)]
    found = {_shifted(computed, [shift]) for shift in shifts}
    single = [shift for shift in shifts if abs(shift[1]) == 1]
    for _ in range(len(computed)):
        if len(single) > 1:
            pair = generator.choice(len(single), 2, replace=False)
            found.add(_shifted(computed, [single[i] for i in pair]))
    return {m for m in found if len(set(m)) == len(computed) and m[0] == 0 and m[-1] < steps and min(m) == 0}


def _shifted(computed: Sequence[int], shifts: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    moved = list(computed)
    for n, by in shifts:
        moved[n] += by
    return tuple(sorted(moved))
