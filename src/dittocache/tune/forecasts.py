"""Plans that fill whole steps, module by module, with forecasts and the like: cheapest paths over measured errors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..calibrate.trial import Trial
from ..fill import Chosen, Trend
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
    """The recipe that computes these steps, each other one filled by what was best for it."""
    filled = _filled(errors, computed)
    best = {k: int(errors.chosen[k, a, p]) for k, a, p in filled}
    used = sorted(set(best.values())) or [0]
    fills = [errors.fills[n] for n in used]
    for i, fill in enumerate(fills):
        if isinstance(fill, Trend):  # not more of its data than the plan needs
            back = [(a if fill.write_back else k - 1, k) for k, a, _ in filled if best[k] == used[i]]
            fills[i] = fill.of(itertools.chain(*(range(a + 1, k + 1) for a, k in back)))
    chosen = tuple(used.index(best.get(k, used[0])) for k in range(len(errors.weights)))
    return Recipe(ReuseSteps(tuple(k for k, _, _ in filled)), fill=Chosen(tuple(fills), chosen))


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
    even = spread(budget, len(errors.weights))
    return list(dict.fromkeys([*paths, *([even] if np.isfinite(loss(errors, even)) else [])]))


def spread(budget: int, steps: int) -> tuple[int, ...]:
    """So many steps, spaced evenly from 0."""
    count = min(budget, steps)
    return tuple(n * steps // count for n in range(count))


@dataclass(frozen=True)
class Forecasts:
    """A `Planner` of what was measured to fill whole steps with: forecasts, EOC, ...

    Args:
        errors: as measured.
        trial: pictures that the recipes are judged on, of other samples than the errors.
    """

    errors: StepErrors
    trial: Trial

    @property
    def steps(self) -> int:
        return len(self.errors.weights)

    def candidates(self, budget: int) -> list[tuple[int, ...]]:
        return candidates(self.errors, budget)

    def loss(self, computed: Sequence[int]) -> float:
        return loss(self.errors, computed)

    def made(self, computed: Sequence[int], most: float = np.inf) -> tuple[Recipe, float]:
        recipe = planned(self.errors, computed)
        return recipe, self.trial.error(recipe)
