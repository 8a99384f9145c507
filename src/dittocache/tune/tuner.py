"""From a budget to a saved recipe: scheduler, number of steps and plan are searched together."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..calibrate.setup import Setup, denoiser, made_for, takes
from ..evaluate.comparison import Comparison
from ..evaluate.measure import Look
from ..evaluate.provenance import provenance, versions
from ..evaluate.rows import Row, fewer, scheduled
from ..fill import Fill
from ..noise import prediction_type
from ..parts import check_int, jsonable
from ..recipe import Recipe, recipe
from . import published
from .contender import SOLVER, Contender, computed_of, distinct, is_fewer, is_published, share_speeds, told
from .effort import Effort
from .goal import Goal
from .journal import Journal
from .judge import OWN, SMALLEST, SOLUTION, Judge
from .predictor import Predictors, check_plannable
from .search import Planner, computed_steps, search
from .trajectory import check_divides, finest
from .tuned import Tuned

SCHEDULERS = {
    "own": None,
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
CHECKS = 4  # plans that are drawn with held-out samples, at most
MARGIN = 1.05  # of speed, so that something is left that meets the goal when it is measured again
Progress = Callable[[int, int, str], None]  # samples drawn, about how many in all, what is going on


class Unreachable(ValueError):
    """No plan meets the budget; the line says what is the best in reach."""


def tune(
    pipe: Any,
    goal: Goal,
    setup: Setup | None = None,
    *,
    schedulers: Sequence[str] = ("own",),
    steps: Sequence[int] = (),
    against: str = OWN,
    solution: int | None = None,
    effort: Effort | None = None,
    out: str | Path | None = None,
    look: Look | None = None,
    model: str = "",
    progress: Progress | None = None,
) -> Tuned:
    """Searches scheduler, number of steps and recipe together for a budget, and checks the winner on other samples.

    Args:
        pipe: a diffusers pipeline without a cache.
        goal: the budget.
        setup: steps, guidance and conditions of the uncached pipeline; by default 50 steps.
        schedulers: keys of `SCHEDULERS`, or names of diffusers' classes: plans are made on top of each.
        steps: numbers of steps of these plans; by default the setup's.
        against: what pictures are compared with: the pipeline's `own` uncached ones, or the many-step `solution`.
        solution: steps of that run; by default about ten times the setup's, if it is wanted.
        effort: how much is drawn.
        out: folder of the journal; a search that was killed goes on there.
        look: features for Frechet distances.
        model: name of the model, for the record.
        progress: told what is going on.

    Raises:
        Unreachable: no plan meets the goal; the best in reach is named.
        ValueError: bad arguments, a journal of another search, a scheduler that plans cannot be made on.
    """
    setup, effort = setup or Setup(), effort or Effort()
    tuner = _Tuner(pipe, goal, setup, schedulers, steps, against, solution, effort, out, look, model, progress)
    return tuner.run()


class _Tuner:
    def __init__(
        self,
        pipe: Any,
        goal: Goal,
        setup: Setup,
        schedulers: Sequence[str],
        steps: Sequence[int],
        against: str,
        solution: int | None,
        effort: Effort,
        out: str | Path | None,
        look: Look | None,
        model: str,
        progress: Progress | None,
    ) -> None:
        check_plannable(pipe)
        takes(pipe)
        if against not in (OWN, SOLUTION):
            raise ValueError(f"pictures are compared with {OWN} or {SOLUTION}; got {against!r}")
        if goal.metric == "fd" and look is None:
            raise ValueError("fd needs features: name a judge")
        if goal.metric == "fd" and min(effort.judged, effort.batch) < 2:
            raise ValueError("fd needs two pictures at once or more: --judged and --batch must be 2 or more")
        for count in steps:
            check_int("a plan's steps", count, 3)
        check_int("steps", setup.num_steps, 3)
        if against == SOLUTION and solution is None:
            solution = finest(pipe.scheduler, setup.num_steps)
        if solution is not None:
            check_int("the steps of the solution", solution, max([setup.num_steps, *steps]) + 1)
        if goal.speedup is not None and goal.speedup > setup.num_steps / 2:
            raise Unreachable(
                f"a speed-up of {goal.speedup:g} is out of reach: plans compute at least 2 of {setup.num_steps} steps, "
                f"so that {setup.num_steps / 2:g} is the most"
            )
        self.pipe, self.goal, self.setup, self.effort, self.look = pipe, goal, setup, effort, look
        self.scheduler = pipe.scheduler
        self.against, self.solution, self.model, self.progress = against, solution, model, progress
        self.drawn = self.whole = 0.0  # samples, so far and in all
        named = [SCHEDULERS.get(name, name) for name in schedulers]
        named = [None if name == type(pipe.scheduler).__name__ else name for name in named]
        self.grids = [
            (name, count) for name in dict.fromkeys(named) for count in dict.fromkeys(steps or [setup.num_steps])
        ]
        for name, _ in self.grids:
            with scheduled(pipe, name):  # one that does not go with the model is refused now
                if name is not None and prediction_type(pipe.scheduler) != prediction_type(self.scheduler):
                    raise ValueError(
                        f"{name} does not predict as {type(self.scheduler).__name__} does: it cannot take its place"
                    )
                if solution is not None:
                    check_divides(pipe.scheduler, solution)
        self.origins = [self._origin(*grid) for grid in self.grids]
        config = {
            "goal": asdict(goal),
            "setup": setup.to_dict(),
            "grids": self.grids,
            "against": against,
            "solution": solution,
            "effort": {k: v for k, v in asdict(effort).items() if k != "seconds"},
            "made_for": self.origins,
            "scheduler": {k: jsonable(v) for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
            "device": f"{denoiser(pipe).device.type} {denoiser(pipe).dtype}",
            "versions": versions(),
        }
        self.journal = Journal(None if out is None else Path(out), config)
        self.began = time.perf_counter()
        self.tried: list[Contender] = []
        self.planners: dict[int, Predictors] = {}
        searched, checked = _split(setup.conditions)
        self.fitting = replace(setup, conditions=searched)
        self.judge = self._judge(replace(self.fitting, seed=setup.seed + 1_000_000), effort.judged)
        self.last = self._judge(replace(setup, seed=setup.seed + 2_000_000, conditions=checked), effort.held_out)

    def _judge(self, setup: Setup, count: int) -> Judge:
        more = {"solution": self.solution, "against": self.against, "look": self.look}
        return Judge(self.pipe, setup, range(count), batch=self.effort.batch, **more)  # type: ignore[arg-type]

    def _origin(self, scheduler: str | None, steps: int) -> dict[str, Any]:
        with scheduled(self.pipe, scheduler):
            return made_for(self.pipe, replace(self.setup, num_steps=steps))

    # ---- stages -----------------------------------------------------------------------------------------------------
    def run(self) -> Tuned:
        self._estimate()
        for number in range(len(self.grids)):
            if not self._late() or not self.tried:
                self._plan(number)
        self._fewer()
        self._published()
        leaders = self._halve()
        leaders = self._polish(leaders)
        return self._check(leaders)

    def _estimate(self) -> None:
        """Draws the first uncached pictures, and says how long everything will take."""
        began = time.perf_counter()
        size = self.judge.warm()
        if self.goal.metric == "ssim" and size < SMALLEST:
            raise ValueError(f"ssim needs pictures of {SMALLEST} pixels or more; these have {size}")
        each = (time.perf_counter() - began) / min(self.effort.batch, self.effort.judged)
        self.whole = self.effort.runs(self.setup.num_steps, len(self.grids))
        most = self.effort.seconds
        limit = "" if most is None else f", but {most:.0f} s of search at most"
        self._say(f"about {_time(each * self.whole)} ({each:.2f} s a picture){limit}")

    def _say(self, text: str, cost: float = 0.0) -> None:
        """Tells what comes next, and how many uncached runs of a sample it is like."""
        if self.progress:
            self.progress(int(min(self.drawn, self.whole)), int(self.whole), text)
        self.drawn += cost

    def _late(self) -> bool:
        return self.effort.seconds is not None and time.perf_counter() - self.began > self.effort.seconds

    def _plan(self, number: int) -> None:
        """The solver's plans on one scheduler and number of steps: as many computed steps as the goal wants."""
        scheduler, steps = self.grids[number]
        self._say(f"recording {self._named(number)}", self.effort.recording(self.grids[number][1]))
        with scheduled(self.pipe, scheduler):
            self.planners[number] = self._planner(steps)

        def judged(budget: int) -> Contender:
            self._say(f"planning {budget} of {self._named(number)}", self.effort.made(budget / steps))
            return self._score(self._best(number, budget, 0))

        self._meet(judged, 2, steps - 1)

    def _planner(self, steps: int) -> Predictors:
        effort = self.effort
        numbers = range(effort.samples + effort.trial)
        return Predictors(
            self.pipe,
            replace(self.fitting, num_steps=steps),
            numbers[: effort.samples],
            numbers[effort.samples :],
            # what the pipeline draws with its own scheduler and steps is followed exactly, all else towards the truth
            reference=self.solution if self.against == SOLUTION else None,
        )

    def _meet(self, judged: Callable[[int], Contender], low: int, high: int) -> None:
        """Judges budgets until the least that keeps the loss, or the largest that keeps the speed, is between two."""
        if self.goal.speedup is not None:
            wanted, seen = MARGIN * self.goal.speedup, set[int]()
            budget = min(high, max(low, int(self.setup.num_steps / self.goal.speedup)))
            while budget not in seen and low <= budget <= high and not (seen and self._late()):
                seen.add(budget)
                measured = judged(budget).numbers["speedup"]
                budget += 1 if measured >= wanted else -max(1, round(budget * (1 - measured / wanted)))
            return
        begun = False
        while low <= high and not (begun and self._late()):
            begun = True
            middle = (low + high) // 2
            if self.goal.met(judged(middle).numbers):
                high = middle - 1
            else:
                low = middle + 1

    def _fewer(self) -> None:
        """The competitor that costs nothing."""
        for scheduler in dict.fromkeys(name for name, _ in self.grids):
            self._say("fewer steps" + (f" of {scheduler}" if scheduler else ""), 2 * self.effort.batch)
            judged = functools.partial(self._fewer_steps, scheduler)
            self._meet(judged, 2, self.setup.num_steps - 1)

    def _fewer_steps(self, scheduler: str | None, count: int) -> Contender:
        return self._score(Contender(fewer(count, scheduler)))

    def _published(self) -> None:
        def judged(name: str, params: Mapping[str, Any]) -> Mapping[str, Any] | None:
            if self._late():
                return None
            label = f"{name} " + " ".join(f"{v:.3g}" for v in params.values() if not isinstance(v, bool))
            self._say(label, 2 * self.effort.batch)
            made = recipe(name, **params)
            try:
                return self._score(Contender(Row(label, name, self.setup.num_steps, made))).numbers
            except ValueError:  # not for this model
                return None

        if self.effort.methods:
            published.explore(judged, self.effort.methods, self.goal.loss, seed=0)

    def _halve(self) -> list[Contender]:
        """Successive halving: all on the first part of the samples (done), the better half on more, and so on."""
        left = self._ranked(self.tried)
        for rung in range(2, len(self.judge.parts) + 1):
            if self._late():
                break
            left = left[: max(3, len(left) // 2)]
            self._say(f"{len(left)} are left", len(left) * self.effort.batch)
            for contender in left:
                self._score(contender, rung / len(self.judge.parts))
            left = self._ranked(left)
        return left

    def _polish(self, leaders: list[Contender]) -> list[Contender]:
        """Local search around the best plan, and around plans of fewer computed steps while they meet the goal."""
        best = next((c for c in leaders if c.grid is not None), None)
        if best is None or best.grid is None or not self.effort.tries:
            return leaders
        budget, found = computed_of(best.row), [self._polished(best.grid, computed_of(best.row))]
        while self.goal.speedup is None and self.goal.met(found[-1].numbers) and budget > 2 and not self._late():
            budget -= max(1, budget // 10)  # a better plan may have something to spare
            self.whole += self.effort.polishing(budget, best.row.steps)
            found.append(self._polished(best.grid, budget))
        return self._ranked([*found, *leaders])

    def _check(self, leaders: Sequence[Contender]) -> Tuned:
        """The winner on samples that nothing has seen, beside the best of the others."""
        others = [next((c for c in self._ranked(self.tried) if test(c)), None) for test in (is_fewer, is_published)]
        checked: list[tuple[Contender, dict[str, Any], Comparison]] = []
        queue = list(leaders[:CHECKS])
        while queue and len(checked) < CHECKS:
            leader = queue.pop(0)
            self._say(f"held-out check of {leader.row.label}", 3 * self.effort.held_out)
            rows = distinct([leader.row, *(c.row for c in others if c is not None), *self._around(leader)])
            names = [str(self.last.setup.condition(self.pipe, j)) for j in range(self.effort.held_out)]
            comparison, numbers = self.last.compare(rows, names, self._made(leader), rows[-1].label)
            checked.append((leader, numbers[0], comparison))
            if self.goal.met(numbers[0]):
                break
            if leader.grid is not None and computed_of(leader.row) > 2:
                queue.insert(0, self._safer(leader, leader.grid, numbers[0]))
        contender, best, comparison = min(checked, key=lambda one: (not self.goal.met(one[1]), self.goal.rank(one[1])))
        if not self.goal.met(best) and not any(self.goal.met(c.numbers) for c in self.tried):
            raise Unreachable(f"nothing reaches {self.goal.text()}; the best here: {told(contender.row.label, best)}")
        everything = [c.to_dict() for c in self._ranked(self.tried)]
        return Tuned(contender.row, best, self.goal.met(best), everything, comparison)

    def _made(self, leader: Contender) -> dict[str, Any]:
        """How a comparison was made, what was tried, and what is shown as found."""
        steps, guidance = self.setup.num_steps, self.setup.guidance_scale
        tried = [
            {"x": c.numbers["speedup"], "y": c.numbers["psnr"], "label": c.row.label}
            for c in self._ranked(self.tried)
            if math.isfinite(c.numbers["psnr"])  # what skipped nothing is equal
        ]
        made = provenance(self.pipe, self.model, steps, guidance, self.effort.batch)
        return made | {"tried": tried, "winner": leader.row.label}

    def _safer(self, leader: Contender, grid: int, numbers: Mapping[str, Any]) -> Contender:
        """A plan that should pass where this one failed: of fewer computed steps if it was slow, else of more."""
        budget = computed_of(leader.row)
        if self.goal.speedup is not None:
            budget = max(2, min(budget - 1, int(budget * numbers["speedup"] / self.goal.speedup)))
        else:
            budget = min(leader.row.steps - 1, budget + max(1, budget // 10))
        return self._polished(grid, budget)

    def _around(self, leader: Contender) -> list[Row]:
        """Fewer steps that are a little faster, and a little slower."""
        steps, speed = self.setup.num_steps, leader.numbers["speedup"]
        counts = (max(1, int(steps / (1.1 * speed))), min(steps - 1, math.ceil(steps / (0.9 * speed))))
        return [fewer(count) for count in counts]

    # ---- pieces -----------------------------------------------------------------------------------------------------
    def _named(self, number: int) -> str:
        scheduler, steps = self.grids[number]
        return f"{steps} steps{self._of(scheduler)}"

    @staticmethod
    def _of(scheduler: str | None) -> str:
        return f", {scheduler.removesuffix('Scheduler')}" if scheduler else ""

    def _best(self, number: int, budget: int, tries: int) -> Contender:
        """The solver's plan for a budget; with `tries`, after a local search."""
        scheduler, steps = self.grids[number]
        planner = self.planners[number]
        memo = _Memo(planner, self.journal, f"made {number}")

        def solved() -> dict[str, Any]:
            def tell(count: int, error: float) -> bool:
                made = self.effort.made(budget / steps)
                self._say(f"search {count} of {tries}: {-10 * np.log10(max(error, 1e-12)):.2f} dB", made)
                return self._late()

            with scheduled(self.pipe, scheduler):
                found, error = search(memo, budget, max(tries, 1), tried=tell if tries else lambda count, error: True)
            return {"recipe": found.to_dict(), "error": error}

        key = f"plan {number} {budget} {tries}"
        found = self.journal.found.get(key) or solved()
        if not self._late():  # a search that was cut short goes on when there is more time
            self.journal(key, lambda: found)
        recipe = Recipe.from_dict(found["recipe"])
        costs = planner.costs(computed_steps(recipe, steps))
        known = {"setup": replace(self.setup, num_steps=steps).to_dict(), "solver": {"costs": costs}}
        recipe = replace(recipe, made_for=self.origins[number], provenance=known)
        label = f"plan {budget}/{steps}" + self._of(scheduler) + (", searched" if tries else "")
        return Contender(Row(label, SOLVER, steps, recipe, scheduler), grid=number)

    def _polished(self, number: int, budget: int) -> Contender:
        """The best plan for a budget after a local search, with its factors refined if that is better."""
        searched = self._score(self._best(number, budget, self.effort.plans(budget / self.grids[number][1])), 1.0)
        if self._late() or not self.effort.tries:
            return searched
        refined = self._score(self._refined(number, budget, searched), 1.0)
        return min((refined, searched), key=lambda one: self.goal.loss(one.numbers))  # they are equally fast

    def _refined(self, number: int, budget: int, searched: Contender) -> Contender:
        """The same steps, all factors moved together."""
        scheduler, steps = self.grids[number]
        planner, before = self.planners[number], searched.row.recipe
        whole = self.effort.refining(budget, steps, planner.outputs)

        def moved() -> dict[str, Any]:
            def tell(done: int, total: int) -> bool:
                self._say(f"refining {budget} of {self._named(number)}: {100 * done // total} %", whole / budget)
                return self._late()

            with scheduled(self.pipe, scheduler):
                return planner.refined(before, tell)[0].fill.to_dict()  # type: ignore[arg-type]

        key = f"refined {searched.row.config()}"
        found = self.journal.found.get(key) or moved()
        if not self._late():
            self.journal(key, lambda: found)
        fill = Fill.from_dict(found)
        row = replace(searched.row, recipe=replace(before, fill=fill), label=f"{searched.row.label} and refined")  # type: ignore[type-var]
        return Contender(row, grid=number)

    def _score(self, contender: Contender, share: float | None = None) -> Contender:
        share = share or 1 / len(self.judge.parts)
        key = f"judge {contender.row.config()} {share:.3f}"
        contender.numbers = self.journal(key, lambda: self.judge.score([contender.row], share)[0])
        contender.alone = contender.numbers["speedup"]
        self.tried = [c for c in self.tried if c.row.label != contender.row.label] + [contender]
        share_speeds(self.tried)
        return contender

    def _ranked(self, contenders: Sequence[Contender]) -> list[Contender]:
        return sorted(contenders, key=lambda c: self.goal.rank(c.numbers))


class _Memo:
    """A planner whose plans stand in a journal."""

    def __init__(self, planner: Planner, journal: Journal, name: str) -> None:
        self.planner, self.journal, self.name, self.steps = planner, journal, name, planner.steps
        self.candidates, self.loss = planner.candidates, planner.loss

    def made(self, computed: Sequence[int], most: float = np.inf) -> tuple[Recipe | None, float]:
        def made() -> dict[str, Any]:
            recipe, error = self.planner.made(computed, most)
            return {"recipe": None if recipe is None else recipe.to_dict(), "error": error}

        found = self.journal(f"{self.name} {list(computed)}", made)
        return None if found["recipe"] is None else Recipe.from_dict(found["recipe"]), found["error"]


def _split(conditions: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
    """Conditions to search with and to check with: other ones, if there are four prompts or more."""
    if len(conditions) < 4 or not isinstance(conditions[0], str):
        return conditions, conditions
    return tuple(c for j, c in enumerate(conditions) if j % 4 != 3), conditions[3::4]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
