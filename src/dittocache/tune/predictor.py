"""Predictors fitted along the cached run: what the network would have returned, by least squares from what it did.

A predictor that is fitted on uncached runs does not know where cached ones end up. So the cached run is drawn, all
samples at once, beside their uncached ones, and the factors of every step are fitted when it gets there. Wanted is the
prediction that takes the latents back to where the uncached run stands at the next step, so that errors do not pile up.
What a computed step hands on is fitted as well: the newest output is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import clock
from ..cache import enable, transformers_of
from ..calibrate.setup import Setup, check_uncached, draw
from ..fill import Hold, Linear
from ..parts import check_int
from ..recipe import Recipe
from ..when import ReuseSteps
from .errors import weights
from .path import shortest
from .refine import Progress, Replay, equations, go_on, predicted
from .search import computed_steps
from .segments import carried, products, strays
from .trajectory import Trajectories, fed_latents, record, scaled, solution, stepped

RIDGE = 1e-6  # towards holding, of the diagonal
GIVE_UP, WINDOW = 3.0, 4  # times the error of the best plan, within so many steps
OUTPUTS = 4  # that a prediction is made of, at most
DAMPING = (1e-3, 1e-2, 1e-1)  # of refined factors
POWERS = (1.0, 0.5, 0.25)  # of a segment's cost: less than 1 spreads errors, as they compound


@dataclass
class _Fitter(clock.Silent):
    """Fits and hands out the predictions of every step.

    Args:
        runs: where the latents are wanted.
        computed: steps.
        fitted: samples of the batch that are fitted to; the others are only drawn.
        outputs: how many a prediction is made of, at most.
        inputs: whether the network's input is a part of it.
        most: [T] stray of the others (a mean of squares) with which a run is given up.
    """

    runs: Trajectories
    computed: frozenset[int]
    fitted: int
    outputs: int
    inputs: bool
    most: np.ndarray
    rows: list[Tensor] = field(default_factory=list)
    strays: list[float] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)

    def on_begin(self, scheduler: Any) -> None:
        self.rows, self.history, self.strays = [], [], []

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        k = len(self.rows)
        here, there = self.runs.latents[k].to(sample.device), self.runs.latents[k + 1].to(sample.device)
        self.strays.append(float((sample - here)[self.fitted :].square().mean()))
        if self.strays[k] > self.most[k]:
            raise clock.Enough  # given up
        if k in self.computed:
            self.history = [prediction, *self.history[: self.outputs - 1]]
        after = stepped(scheduler, self.history[0], timestep, sample)
        wanted = self.history[0].float() + (there - after) / float(self.runs.gains[k])
        latents = scaled(scheduler, sample, timestep) if self.inputs else None
        bases = self.history if latents is None else [*self.history, latents]
        found = least_squares([one[: self.fitted] for one in bases], wanted[: self.fitted])
        row = torch.zeros(self.outputs + 1, dtype=torch.float64)
        row[: len(self.history)] = torch.tensor(found[: len(self.history)])
        if self.inputs:
            row[-1] = found[-1]
        self.rows.append(row)
        return predicted(row, self.history, latents)


def check_plannable(pipe: Any) -> None:
    """Raises a ValueError unless predictors can stand in for the one network of this pipeline without a cache."""
    check_uncached(pipe)
    if len(transformers_of(pipe)) > 1:
        raise ValueError(
            f"{type(pipe).__name__} has two transformers that take turns: what one returned does not predict the "
            "other, so that plans are not made for it; published methods work (dittocache methods)"
        )


def least_squares(outputs: Sequence[Tensor], wanted: Tensor) -> list[float]:
    """The factors of outputs, newest first, that come closest to what is wanted; a small ridge towards holding."""
    columns = torch.stack([one.flatten().cpu().double() for one in outputs])
    inner = columns @ columns.T
    ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(columns), dtype=torch.float64)
    rest = columns @ (wanted.flatten().cpu().double() - columns[0])
    factors = torch.linalg.solve(inner + ridge, rest)
    factors[0] += 1
    return factors.tolist()


class Predictors:
    """A `Planner` of linear predictors of what the network returns.

    Plans are judged on samples that the predictors are not fitted to, drawn in the same batch: by the squared mean of
    the roots of their squared errors, so that no single picture decides. (A small push may change one altogether.)

    Args:
        pipe: without a cache.
        setup: how the samples are drawn.
        samples: that predictors are fitted to, all at once.
        trial: other samples.
        reference: steps of the run that latents are wanted to follow; None: the setup's own.
        outputs: how many a prediction is made of, at most.
        longest: stretch of predicted steps.

    Raises:
        ValueError: a cache is on, two transformers, no samples, or steps of the scheduler that are not linear in the
            prediction.
    """

    def __init__(
        self,
        pipe: Any,
        setup: Setup,
        samples: Sequence[int],
        trial: Sequence[int],
        *,
        reference: int | None = None,
        outputs: int = OUTPUTS,
        longest: int = 20,
    ) -> None:
        check_plannable(pipe)
        check_int("outputs", outputs, 1)
        if not samples or not trial or set(samples) & set(trial):
            raise ValueError("samples and trial are one or more numbers each, and differ")
        self.pipe, self.setup, self.steps, self.outputs = pipe, setup, setup.num_steps, outputs
        self.samples, self.fitted = [*samples, *trial], len(samples)
        if reference is None:
            self.runs = record(pipe, setup, self.samples)
        else:
            self.runs = solution(pipe, setup, self.samples, reference)
        self.inputs = fed_latents(pipe, setup, self.samples[0])
        # an uncached run of these steps does not end where the solution does
        plain = self.runs.pictures if reference is None else None
        found = weights(pipe, setup, self.samples, batch=len(self.samples), plain=plain)
        carry = carried(found, self.runs.gains.numpy(), self.runs.pictures[0].numel())
        self.edges = strays(products(self.runs), longest, reference is None) * carry[:, None, None]
        self.seen: tuple[float, np.ndarray] | None = None  # error and strays of the best run
        self.paths = [*(shortest(self.edges**power) for power in POWERS), shortest(self.edges, "max")]

    def candidates(self, budget: int) -> list[tuple[int, ...]]:
        check_int("budget", budget, 1)
        return list(dict.fromkeys(paths.steps(budget) for paths in self.paths))

    def loss(self, computed: Sequence[int]) -> float:
        return float(sum(self.edges[at] for at in self._segments(computed)))

    def costs(self, computed: Sequence[int]) -> list[float]:
        """[T] predicted squared error of the picture, a segment's shared out among its filled steps."""
        found = [0.0] * self.steps
        for n, a, p in self._segments(computed):
            for k in range(a + 1, n):
                found[k] = float(self.edges[n, a, p]) / (n - a - 1)
        return found

    def _segments(self, computed: Sequence[int]) -> list[tuple[int, int, int]]:
        """(n, a, p) of every segment, as `strays` numbers them."""
        return list(zip([*computed[1:], self.steps], computed, [self.steps, *computed[:-1]], strict=True))

    def made(self, computed: Sequence[int], most: float = np.inf) -> tuple[Recipe | None, float]:
        filled = tuple(k for k in range(self.steps) if k not in computed)
        limits = self._limits(most)
        fitter = _Fitter(self.runs, frozenset(computed), self.fitted, self.outputs, self.inputs, limits)
        recipe = Recipe(where="model", when=ReuseSteps(filled), fill=Hold())
        try:
            with enable(self.pipe, recipe), clock.observed(self.pipe.scheduler, fitter):
                pictures = torch.as_tensor(draw(self.pipe, self.setup, self.samples))
        except clock.Enough:
            return None, np.inf
        error = self._error(pictures[self.fitted :])
        if 0 < error < most:
            self.seen = error, np.array(fitter.strays)
        return replace(recipe, fill=Linear.of(torch.stack(fitter.rows))), error

    def refined(self, recipe: Recipe, progress: Progress = go_on) -> tuple[Recipe, float]:
        """The recipe with all its factors moved together, and its error; as it was if that is not less.

        See `refine.equations`, which calls `progress` and may be ended by it.
        """
        computed = computed_steps(recipe, self.steps)
        fitted, trial = self.samples[: self.fitted], self.samples[self.fitted :]
        table = recipe.fill.table  # type: ignore[attr-defined]
        found = equations(self.pipe, self.setup, fitted, self.runs, computed, table, self.inputs, progress)
        tables = [table, *map(found.solved, DAMPING)]
        drawn = [Replay(frozenset(computed), one, self.inputs).run(self.pipe, self.setup, trial) for one in tables]
        errors = [self._error(pictures) for pictures in drawn if pictures is not None]
        best = int(np.argmin(errors))
        return replace(recipe, fill=Linear.of(tables[best])), errors[best]

    def _error(self, pictures: Tensor) -> float:
        """Of the trial's pictures."""
        missed = (pictures - self.runs.pictures[self.fitted :]).cpu().double().square().flatten(1).mean(1)
        return float(missed.sqrt().mean() ** 2)

    def _limits(self, most: float) -> np.ndarray:
        """[T] strays with which the error will be far above `most`, by what the best run made of its own."""
        limits = np.full(self.steps, np.inf)
        if self.seen is not None and np.isfinite(most):
            error, strays = self.seen
            late = slice(self.steps // 2, None)
            # they rise from each computed step to the next: what counts is how far they come
            highest = [strays[max(k - WINDOW, 0) : k + WINDOW + 1].max() for k in range(self.steps)]
            limits[late] = GIVE_UP * most / error * np.array(highest)[late]
        return limits
