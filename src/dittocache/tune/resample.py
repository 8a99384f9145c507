"""A plan for T steps as one for other steps: computed steps stay at their noise levels.

What a network returns depends on how noisy its input is, not on the number of a step, so a plan is carried over by the
half-log-SNR, log(alpha / sigma), of its steps (Lu et al., arXiv 2206.00927, state solvers in it). Nothing is measured
here: a resampled plan is a good start, and one that was tuned for these steps is better.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from .. import noise
from ..fill import Aligned, Chosen, Fill, GradientQueue, Hold, Linear, LowRankIncrement, Taylor
from ..parts import Part, check_choice, check_int, check_number, show
from ..plan import COMPUTE, Site
from ..recipe import Recipe
from ..when import (
    Broadcast,
    Counter,
    DualInterval,
    DualModuleIntervals,
    Every,
    HeadChange,
    ModuleIntervals,
    PowerSteps,
    ProbeChange,
    RatioBudget,
    ReuseSteps,
    SignalChange,
    SoftInterval,
    Table,
    Warmup,
    When,
)

# parts that go with any number of steps
RULES = (
    *(Every, Counter, ModuleIntervals, DualModuleIntervals, Warmup, PowerSteps, SoftInterval, DualInterval),
    *(Broadcast, RatioBudget, HeadChange, ProbeChange, SignalChange),
)
ALL = Site("all", "", "", 0, 1, 0)  # schedules that are lists of steps do not look at sites
FILLS = (Hold, Taylor, Aligned, LowRankIncrement)
CLEAN = 8.0  # half-log-SNR beyond which levels count as the same: pure noise and a clean sample lie at infinity
Keep = Literal["count", "share"]


def resample(recipe: Recipe, scheduler: Any, num_steps: int | None = None, *, keep: Keep = "count") -> Recipe:
    """The recipe for a run of other steps: what belongs to single steps goes to the steps nearest in noise level.

    Step 0 is always computed, and sites that are computed at every step stay so. The fill that was chosen for a step
    is that of the nearest one that was filled; fitted factors are interpolated, if as many steps are computed as
    before. Then a squared error is predicted, too, if `provenance["solver"]["costs"]` has one for every step (0 for
    computed ones): it is interpolated by noise level, and goes with the square of a step's length. It is in
    `provenance["resampled"]`, with all that was known of the recipe.

    Args:
        recipe: a list of steps or a table as its schedule; a rule that goes with any number of steps is left as it is.
        scheduler: of the run; left as it is.
        num_steps: T of the run; None for the timesteps that the scheduler has now, such as those of a call of
            `set_timesteps` with more arguments.
        keep: of every site, the "count" of its computed steps (at most T of them), or their "share".

    Raises:
        ValueError: a recipe that does not say its number of steps, or holds something that was measured or learned step
            by step; a scheduler whose noise levels or timesteps cannot be told.
    """
    check_choice("keep", keep, ("count", "share"))
    timesteps = timesteps_of(scheduler, num_steps)
    if "timesteps" not in recipe.made_for and isinstance(recipe.when, RULES) and isinstance(recipe.fill, FILLS):
        return recipe
    before = recipe.num_steps
    if before is None:
        raise ValueError(f"{recipe.describe()!r} does not say for how many steps it was made: set made_for's timesteps")
    steps = Steps(
        levels(scheduler, _known_timesteps(recipe) or timesteps_of(scheduler, before)),
        levels(scheduler, timesteps),
        keep,
    )
    when, reused = _when(recipe.when, steps, timesteps)
    fill = _fill(recipe.fill, when, steps, reused)
    predicted = _predicted(recipe, when, steps, reused)
    same = (when, fill) == (recipe.when, recipe.fill)
    _warn(before, len(timesteps), predicted)
    made_for = {"scheduler": type(scheduler).__name__, "timesteps": [round(t, 3) for t in timesteps]}
    return dataclasses.replace(
        recipe,
        when=when,
        fill=fill,
        method=recipe.method if same else None,
        params=recipe.params if same else {},
        made_for={**recipe.made_for, **made_for},
        provenance=_provenance(recipe, timesteps, predicted),
    )


def _known_timesteps(recipe: Recipe) -> Sequence[float] | None:
    """Of the run that the recipe was made for, if it says so."""
    traced = recipe.when.plan.meta.get("timesteps") if isinstance(recipe.when, Table) else None
    found: Sequence[float] | None = recipe.made_for.get("timesteps") or traced
    return found


@dataclasses.dataclass(frozen=True)
class Steps:
    """Noise levels of two runs, and what the steps of one are in the other.

    Args:
        old, new: half-log-SNR of every step, [T] and [T'], rising.
        keep: see `resample`.
    """

    old: np.ndarray
    new: np.ndarray
    keep: Keep

    def among(self, these: np.ndarray) -> np.ndarray:
        """[T'] the nearest of some old steps, given as a mask [T]."""
        chosen = np.flatnonzero(these)
        return chosen[np.abs(self.new[:, None] - self.old[chosen]).argmin(1)]

    def computed(self, mask: np.ndarray) -> np.ndarray:
        """[T'] the new computed steps for a mask [T] of the old ones.

        If their number changes, they are spread like the old ones: evenly along their sequence.
        """
        count = int(mask.sum())
        if count == len(mask):
            return np.ones(len(self.new), dtype=bool)
        wanted = count if self.keep == "count" else round(count * len(self.new) / len(self.old))
        wanted = min(max(wanted, 1), len(self.new))
        there = self.old[mask] if count else self.old[:1]
        targets = np.interp(np.linspace(0, len(there) - 1, wanted), np.arange(len(there)), there)
        found = np.zeros(len(self.new), dtype=bool)
        found[assigned(targets, self.new)] = True
        return found


def assigned(targets: np.ndarray, levels: np.ndarray) -> list[int]:
    """A step of its own for each of the rising targets, in order, the first of them step 0.

    The sum of the distances is the least that there is, found exactly by dynamic programming.
    """
    totals = np.abs(targets[:, None] - levels)
    totals[0, 1:] = np.inf
    for n in range(1, len(targets)):
        totals[n, 0] = np.inf
        totals[n, 1:] += np.minimum.accumulate(totals[n - 1])[:-1]
    found, end = list[int](), len(levels)
    for row in totals[::-1]:
        end = int(row[:end].argmin())
        found.append(end)
    return found[::-1]


# ---- noise levels ---------------------------------------------------------------------------------------------------
def timesteps_of(scheduler: Any, num_steps: int | None) -> list[float]:
    """The timesteps of a run of so many steps, or those that the scheduler has.

    Raises:
        ValueError: it has none, or does not know them from their number alone.
    """
    if num_steps is None:
        if getattr(scheduler, "timesteps", None) is None:
            raise ValueError(f"{type(scheduler).__name__} has no timesteps: pass num_steps, or call its set_timesteps")
        return [float(t) for t in scheduler.timesteps]
    check_int("num_steps", num_steps, 1)
    if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "config"):
        raise ValueError(f"the noise levels of steps are those of a diffusers scheduler; got {show(scheduler)}")
    mine = type(scheduler).from_config(scheduler.config)
    try:
        mine.set_timesteps(num_steps)
    except ValueError as error:  # of flow matching, shifted by the size of the picture
        raise ValueError(
            f"the timesteps of {type(scheduler).__name__} do not follow from num_steps ({show(str(error))}): call its "
            "set_timesteps as the pipeline does, and leave num_steps out"
        ) from None
    return [float(t) for t in mine.timesteps]


def levels(scheduler: Any, timesteps: Sequence[float]) -> np.ndarray:
    """Half-log-SNR [T], log(alpha / sigma) within +-8, at timesteps of the network that a scheduler is for.

    A network is told its noise level as a timestep of its training, whatever solver it is used with.

    Raises:
        ValueError: a scheduler that is not understood.
    """
    t = np.asarray(timesteps, dtype=np.float64)
    if noise.prediction_type(scheduler) == "flow_prediction":
        sigma = t / scheduler.config.num_train_timesteps
        alpha = 1 - sigma
    elif getattr(scheduler, "alphas_cumprod", None) is not None:
        kept = scheduler.alphas_cumprod.detach().cpu().double().numpy()
        kept = np.clip(kept, np.exp(-4 * CLEAN), None)  # a schedule that ends in pure noise has 0 there
        half = np.interp(t, np.arange(len(kept)), np.log(kept / (1 - kept)) / 2)
        return np.clip(half, -CLEAN, CLEAN)
    else:
        raise ValueError(f"{type(scheduler).__name__} is not supported: it has no alphas_cumprod, and is no flow")
    smallest = np.exp(-2 * CLEAN)
    return np.clip(np.log(np.maximum(alpha, smallest) / np.maximum(sigma, smallest)), -CLEAN, CLEAN)


# ---- parts ----------------------------------------------------------------------------------------------------------
def _when(when: When, steps: Steps, timesteps: Sequence[float]) -> tuple[When, np.ndarray]:
    """The schedule for the new steps, and which of the old ones [T] it does not compute as a whole."""
    if isinstance(when, RULES):
        return when, np.ones(len(steps.old), dtype=bool)
    if isinstance(when, ReuseSteps):
        computed = when.table(len(steps.old), [ALL])[:, 0] == COMPUTE
        return ReuseSteps(tuple(np.flatnonzero(~steps.computed(computed)))), ~computed
    if isinstance(when, Table):
        plan, rows = when.plan, len(steps.new)
        if len(plan.steps) != len(steps.old):
            raise ValueError(f"the plan has {len(plan.steps)} steps, but the recipe was made for {len(steps.old)}")
        meta = {"num_steps": rows, "timesteps": list(timesteps)}
        made = dataclasses.replace(
            plan,
            table=np.stack([_column(column, steps) for column in plan.table.T], axis=1),
            steps=tuple(range(rows)),
            fills=None if plan.fills is None else plan.fills[:1] * rows,  # a recipe has one fill
            meta={**plan.meta, **{name: value for name, value in meta.items() if name in plan.meta}},
        )
        return Table(made), np.asarray((plan.table < COMPUTE).any(1))
    raise _refused(when, steps)


def _column(column: np.ndarray, steps: Steps) -> np.ndarray:
    """Computed steps to the nearest levels, the others as the nearest one that is not computed."""
    full = column == COMPUTE
    computed = steps.computed(full)
    return np.where(computed, COMPUTE, COMPUTE if full.all() else column[steps.among(~full)])


def _fill(fill: Fill, when: When, steps: Steps, reused: np.ndarray) -> Fill:
    """The fill for the new schedule; `reused` [T] are the old steps that it filled."""
    if isinstance(fill, FILLS) or (isinstance(fill, GradientQueue) and fill.positions is None):
        return fill
    if isinstance(fill, Chosen) and len(fill.chosen) == len(steps.old):
        fills = tuple(_fill(one, when, steps, reused) for one in fill.fills)
        return Chosen(fills, tuple(fill.chosen[k] for k in steps.among(reused))) if reused.any() else Chosen()
    if isinstance(fill, Linear) and len(fill.coefficients) == len(steps.old) and isinstance(when, ReuseSteps):
        computed = np.setdiff1d(np.arange(len(steps.new)), when.steps)
        if len(computed) == int((~reused).sum()):
            table = _coefficients(fill.table.numpy(), steps, np.flatnonzero(~reused), computed)
            return Linear.of(torch.from_numpy(table))
    raise _refused(fill, steps)


def _coefficients(old: np.ndarray, steps: Steps, computed_old: np.ndarray, computed_new: np.ndarray) -> np.ndarray:
    """Fitted factors [T', H + 1] from those of the old steps [T, H + 1], between the same two computed outputs.

    By how far a step lies behind the last computed one, in noise level.
    """
    rows = np.zeros((len(steps.new), old.shape[1]))
    for k, level in enumerate(steps.new):
        n = int(np.searchsorted(computed_new, k, side="right")) - 1
        end = [*computed_old, len(old)][n + 1]
        start, since = computed_old[n], steps.old[computed_old[n] : end] - steps.old[computed_old[n]]
        behind = level - steps.new[computed_new[n]]
        rows[k] = [np.interp(behind, since, column) for column in old[start:end].T]
    return rows


def _refused(part: Part, steps: Steps) -> ValueError:
    return ValueError(
        f"{type(part).__name__} belongs to the {len(steps.old)} steps that it was made for and cannot be resampled: "
        f"calibrate, train or tune for {len(steps.new)} steps"
    )


# ---- what is known of the result ------------------------------------------------------------------------------------
def _predicted(recipe: Recipe, when: When, steps: Steps, reused: np.ndarray) -> tuple[float, float] | None:
    """Squared error of the old recipe and of the new one; None where nothing was measured that would tell it."""
    solver = recipe.provenance.get("solver")
    costs = solver.get("costs") if isinstance(solver, Mapping) else None
    if costs is None or not isinstance(when, ReuseSteps):
        return None
    check_costs(costs, len(steps.old))
    filled = np.array(when.steps, dtype=int)
    if not reused.any() or len(steps.new) - len(filled) != int((~reused).sum()):
        return None
    before, after = (np.gradient(levels) if len(levels) > 1 else np.ones(1) for levels in (steps.old, steps.new))
    rates = np.array(costs, dtype=np.float64)[reused] / before[reused] ** 2
    return float(np.sum(costs)), float((np.interp(steps.new, steps.old[reused], rates) * after**2)[filled].sum())


def check_costs(costs: Any, steps: int) -> None:
    """Raises a ValueError unless there is a number of 0 or more for every step."""
    if not isinstance(costs, (list, tuple)) or len(costs) != steps:
        raise ValueError(f"the solver's costs in the provenance must be {steps} numbers, one a step; got {show(costs)}")
    for cost in costs:
        check_number("every entry of the solver's costs", cost, 0)


def _provenance(recipe: Recipe, timesteps: Sequence[float], predicted: tuple[float, float] | None) -> dict[str, Any]:
    """What still holds of the old one, and all of it as what the new one was made of."""
    made = recipe.provenance
    setup = made.get("setup")
    found = {"model": made["model"]} if "model" in made else {}
    if isinstance(setup, Mapping):
        found["setup"] = {**setup, "num_steps": len(timesteps)}
    return {
        **found,
        "resampled": {
            "from": recipe.num_steps,
            "to": len(timesteps),
            "method": recipe.method,
            "squared error": None if predicted is None else {"before": predicted[0], "predicted": predicted[1]},
            "of": made,
        },
    }


def _warn(before: int, after: int, predicted: tuple[float, float] | None) -> None:
    told = "no predicted loss, as the recipe has no measured costs of its steps"
    if predicted is not None:
        told = f"predicted squared error {predicted[1]:.4g} ({predicted[0]:.4g} with {before} steps)"
    warnings.warn(f"dittocache: resampled from {before} to {after} steps; not measured, {told}", stacklevel=3)
