"""Local search for the best steps to compute, judged by the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..parts import check_int
from ..recipe import Recipe
from .surrogate import expected_gains

ROOTS = 3  # plans that moves start from
LEAST = 1e-3  # gain that is worth a try, as a share of the error
Steps = tuple[int, ...]  # computed ones, rising
Tried = Callable[[int, float], Any]  # plans tried, the least error so far; what it returns as true ends the search


class Planner(Protocol):
    """Turns computed steps into recipes, and knows beforehand about what they lose."""

    @property
    def steps(self) -> int:
        """T."""

    def candidates(self, budget: int) -> list[Steps]:
        """Computed steps of the plans to begin with, the likeliest first.

        Raises:
            ValueError: a budget that no plan meets.
        """

    def loss(self, computed: Sequence[int]) -> float:
        """Predicted error, 0 or more; inf for a plan that must not be. What counts is how those of plans compare."""

    def made(self, computed: Sequence[int], most: float = np.inf) -> tuple[Recipe | None, float]:
        """The recipe, and the squared error of its pictures; None and inf if that will be far more than `most`."""


def computed_steps(recipe: Recipe, steps: int) -> list[int]:
    """Those of T steps that a list of reused ones leaves."""
    return [k for k in range(steps) if k not in recipe.when.steps]  # type: ignore[attr-defined]


def search(
    planner: Planner, budget: int, tries: int = 40, seed: int = 0, tried: Tried | None = None
) -> tuple[Recipe, float]:
    """Begins with the planner's candidates, and moves computed steps of the best plans to bring pictures closer.

    Every move takes one computed step elsewhere, or shifts two of them by one each. Which plan is drawn next is told by
    what was predicted and by all plans so far (`surrogate`); the search ends when none promises anything.

    Args:
        planner: makes and judges recipes.
        budget: computed steps.
        tries: plans that are drawn, at most.
        seed: of the moves of two steps.
        tried: called after every one of them.

    Returns:
        The best recipe, and its squared error.

    Raises:
        ValueError: a budget that no plan meets, or pictures that are not finite.
    """
    check_int("tries", tries, 1)
    generator = np.random.default_rng(seed)
    best: tuple[Any, float] = (None, np.inf)
    errors: dict[Steps, float] = {}
    waiting, losses = list(planner.candidates(budget)), dict[Steps, float]()
    while waiting:
        steps = waiting.pop(0)
        recipe, errors[steps] = planner.made(steps, best[1])
        if errors[steps] < best[1]:
            best = (recipe, errors[steps])
        if (tried and tried(len(errors), best[1])) or len(errors) >= tries:
            break
        waiting = waiting or _next(planner, errors, losses, generator)
    if best[0] is None:
        raise ValueError("no plan gives pictures of finite error: what the pipeline draws is not finite")
    return best


def _next(planner: Planner, errors: Mapping[Steps, float], losses: dict[Steps, float], generator: Any) -> list[Steps]:
    """The plan that promises most, of all that are one move from the best ones; none if no one promises anything.

    Args:
        planner: predicts.
        errors: of the plans that were tried.
        losses: predicted ones, as far as they are known.
        generator: of the moves of two steps.
    """
    ranked = sorted(errors, key=lambda steps: errors[steps] if np.isfinite(errors[steps]) else np.inf)
    if not np.isfinite(errors[ranked[0]]) or errors[ranked[0]] <= 0:
        return []
    moved = set().union(*(_moves(steps, planner.steps, generator) for steps in ranked[:ROOTS])) - set(errors)
    for steps in sorted({*errors, *moved} - set(losses)):
        losses[steps] = planner.loss(steps)
    # one that must not be tells nothing
    plans, others = ([steps for steps in part if np.isfinite(losses[steps])] for part in (ranked, sorted(moved)))
    if not plans or not others:
        return []
    # of a plan that was given up it is known that it is bad
    worst = max(error for error in errors.values() if np.isfinite(error))
    found = np.array([errors[steps] if np.isfinite(errors[steps]) else worst for steps in plans])
    predicted, promised = (np.array([losses[steps] for steps in part]) for part in (plans, others))
    gains = expected_gains(plans, found, predicted, others, promised, planner.steps)
    return [others[int(gains.argmax())]] if gains.max() > LEAST else []


def _moves(computed: Sequence[int], steps: int, generator: Any) -> set[Steps]:
    """Neighbours of a plan; step 0 stays computed."""
    if len(computed) == 1:
        return set()
    free = set(range(1, steps)) - set(computed)
    found = {tuple(sorted({*computed, new} - {old})) for old in computed[1:] for new in free}
    single = [(n, by) for n in range(1, len(computed)) for by in (-1, 1)]
    for _ in range(len(computed)):
        moved = list(computed)
        for i in generator.choice(len(single), 2, replace=False):
            n, by = single[i]
            moved[n] += by
        found.add(tuple(sorted(set(moved))))
    return {m for m in found if len(m) == len(computed) and m[0] == 0 < m[1] and m[-1] < steps}
