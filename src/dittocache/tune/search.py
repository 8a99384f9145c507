"""Local search for the best steps to compute, judged by the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..parts import check_int
from ..recipe import Recipe

Tried = Callable[[int, float], Any]  # plans tried, the least error so far; what it returns as true ends the search


class Planner(Protocol):
    """Turns computed steps into recipes, and knows beforehand about what they lose."""

    @property
    def steps(self) -> int:
        """T."""

    def candidates(self, budget: int) -> list[tuple[int, ...]]:
        """Computed steps of the plans to begin with, the likeliest first.

        Raises:
            ValueError: a budget that no plan meets.
        """

    def loss(self, computed: Sequence[int]) -> float:
        """Predicted error, to tell likely plans from others."""

    def made(self, computed: Sequence[int], most: float = np.inf) -> tuple[Recipe | None, float]:
        """The recipe, and the squared error of its pictures; None and inf if that will be far more than `most`."""


def computed_steps(recipe: Recipe, steps: int) -> list[int]:
    """Those of T steps that a list of reused ones leaves."""
    return [k for k in range(steps) if k not in recipe.when.steps]  # type: ignore[attr-defined]


def search(
    planner: Planner, budget: int, tries: int = 40, seed: int = 0, tried: Tried | None = None
) -> tuple[Recipe, float]:
    """Begins with the best of the planner's candidates, and moves computed steps while that brings pictures closer.

    Every move takes one computed step elsewhere, or shifts two of them by one each; those that are predicted to lose
    the least are tried first.

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
    best: tuple[tuple[int, ...], Any, float] = ((0,), None, np.inf)
    seen, enough = set[tuple[int, ...]](), False

    def better(steps: tuple[int, ...]) -> bool:
        nonlocal best, enough
        seen.add(steps)
        recipe, error = planner.made(steps, best[2])
        improved = error < best[2]
        if improved:
            best = (steps, recipe, error)
        enough = bool(tried and tried(len(seen), best[2])) or len(seen) >= tries
        return improved

    for start in planner.candidates(budget):
        if not enough:
            better(start)
    improved = True
    while improved and not enough:
        moves = sorted(_moves(best[0], planner.steps, generator) - seen, key=planner.loss)
        improved = any(better(moved) for moved in moves if not enough)
    if best[1] is None:
        raise ValueError("no plan gives pictures of finite error: what the pipeline draws is not finite")
    return best[1], best[2]


def _moves(computed: Sequence[int], steps: int, generator: Any) -> set[tuple[int, ...]]:
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
