"""LeMiCa's plan: what caching a stretch of steps does to the result, and the path whose largest errors are the least
(arXiv 2511.00090)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from ..cache import enable, wanted
from ..describe import describe
from ..fill import At, Entry, Hold
from ..fill.base import Features
from ..parameters import Int
from ..parts import check_int
from ..plan import COMPUTE, REUSE, Site
from ..recipe import Recipe, recipe
from ..when import Every, When
from .base import Calibrator
from .planners import Plan, segment_plan
from .setup import Setup, denoiser, draw, timesteps
from .statistics import Statistics


@dataclass(frozen=True)
class CalibrateLeMiCa(Calibrator):
    """Measures every segment on the picture: steps i and j are computed, those between them cached, all others full.

    The weight of i -> j is the mean absolute error of the picture against the uncached one. What the network returned
    before step i is played back to the sampler, so that it is in the very state of the full run, and the network is not
    called.
    """

    method = "lemica"
    usual = 2  # every segment is drawn for each

    budget: Annotated[int, Int(2, help="B, steps that are computed, the first and the last among them")] = 17
    max_gap: Annotated[
        int | None,
        Int(
            1, help="G, most steps from one computed step to the next; None for 7 of 50 steps, or what the budget needs"
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        return {"max_gap": self.max_gap}

    def collect(self, pipe: Any, setup: Setup, samples: Sequence[int]) -> dict[str, Tensor]:
        num_steps = len(timesteps(pipe, setup))
        measured = _measured(num_steps, self._gap(num_steps))
        self._planned(np.where(measured, 0.0, np.inf))  # a budget that cannot be met is found before anything is drawn
        stacks = _stacks(pipe)
        told = _Told()
        with enable(pipe, Recipe(Every(1), where="model", fill=told, method="none")):
            uncached = _pictures(pipe, setup, samples)
        weights = torch.zeros(num_steps, num_steps, dtype=torch.float64)
        for i, j in zip(*np.nonzero(measured), strict=True):
            if j > i + 1:
                with enable(pipe, _replay(i, j, stacks, told.outputs)):
                    error = (_pictures(pipe, setup, samples) - uncached).abs()
                weights[i, j] = error.flatten(1).mean(1).sum()
        return {"weights": weights, "counts": len(samples) * torch.from_numpy(measured).double()}

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        weights, counts = statistics.sum("weights"), statistics.sum("counts")
        mean = torch.where(counts > 0, weights / counts.clamp(min=1), torch.inf)
        return recipe("lemica", full_steps=self._planned(mean.numpy()), num_steps=len(mean))

    def _gap(self, num_steps: int) -> int:
        if self.max_gap is not None:
            return self.max_gap
        return max(round(7 * num_steps / 50), -(-(num_steps - 1) // (self.budget - 1)))

    def _planned(self, weights: np.ndarray) -> Plan:
        """The plan; a ValueError if there is none with so many computed steps."""
        num_steps = len(weights)
        check_int("budget", self.budget, 2, num_steps)
        plan = segment_plan(weights, self.budget)
        if not plan:
            i, j = np.nonzero(np.isfinite(weights))
            gap = int((j - i).max())
            raise ValueError(
                f"no plan computes {self.budget} of {num_steps} steps, at most {gap} from one to the next: budget must "
                f"be {-(-(num_steps - 1) // gap) + 1} or more, or max_gap {-(-(num_steps - 1) // (self.budget - 1))}"
            )
        return plan


def _measured(num_steps: int, max_gap: int) -> np.ndarray:
    """[T, T]: the segments that a plan is made of."""
    i, j = np.ogrid[:num_steps, :num_steps]
    return (i < j) & (j - i <= max_gap)


def _stacks(pipe: Any) -> frozenset[str]:
    """Names of the stacks that the method caches."""
    description = describe(denoiser(pipe))
    stacks = wanted(Recipe(Every(1), where="stack", keeps="change"), description)
    return frozenset(description.columns[j].name for j in stacks)


def _pictures(pipe: Any, setup: Setup, samples: Sequence[int]) -> Tensor:
    """Pictures, in float64; some pipelines give arrays for whatever output type."""
    return torch.as_tensor(draw(pipe, setup, samples)).cpu().double()


class _Told(Hold):
    """Notes what the network returned: outputs[k] of every call in step k."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[Features]] = {}

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        self.outputs.setdefault(at.step, []).append(tuple(one.clone() for one in value))
        super().keep(entry, value, at)


def _replay(i: int, j: int, stacks: Collection[str], outputs: dict[int, list[Features]]) -> Recipe:
    """The run that caches between steps i and j, played back up to step i; its network is a site beside the stacks."""
    return Recipe(_Segment(i, j, stacks), where="output*", keeps="change", fill=_Played(outputs), method="none")


class _Segment(When):
    """Steps 1 to i - 1 are played back, those between i and j reuse what the stacks change."""

    uses_stack = True

    def __init__(self, i: int, j: int, stacks: Collection[str]) -> None:
        self.i, self.j, self.stacks = i, j, stacks

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        found = np.full((num_steps, len(sites)), COMPUTE)
        for n, site in enumerate(sites):
            if site.kind == "model":
                found[1 : self.i, n] = REUSE
            elif site.name in self.stacks:
                found[self.i + 1 : self.j, n] = REUSE
        return found


class _Played(Hold):
    """Gives back, call by call, what the network returned; holds everything else."""

    def __init__(self, outputs: dict[int, list[Features]]) -> None:
        self.calls: dict[int, Iterator[Features]] = {step: iter(calls) for step, calls in outputs.items()}

    def fill(self, entry: Entry, at: At) -> Features:
        return next(self.calls[at.step]) if at.site.kind == "model" else super().fill(entry, at)
