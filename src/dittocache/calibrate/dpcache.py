"""DPCache's plan: what forecasts of the last hidden state cost, and the cheapest path (arXiv 2602.22654)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..describe import describe
from ..fill import At
from ..methods.dpcache import FirstFull, Order
from ..parameters import Int
from ..parts import check_int
from ..recipe import Recipe, recipe
from . import planners
from .base import Calibrator, See, Seen, add
from .planners import Plan
from .setup import Setup, denoiser, timesteps
from .statistics import Statistics


@dataclass(frozen=True)
class CalibrateDPCache(Calibrator):
    """Sums the costs of forecasting between all computed steps, and plans with their mean.

    What leaves the last block that carries the sample is recorded, of one uncached run for each sample; nothing is
    replaced in it.
    """

    method = "dpcache"
    where = "stack"
    usual = 10

    budget: Annotated[int, Int(1, help="K, steps that are computed")] = 13
    order: Order = 2
    first_full: FirstFull = 3
    last_full: Annotated[int, Int(0, help="steps that are computed at the end of every plan")] = 0
    planner: Annotated[
        Literal["authors", "exact"], "the authors' recurrence, or the cheapest path over the last computed steps"
    ] = "authors"
    history: Annotated[
        Literal["dense", "path"],
        "what lies before the last two computed steps: every step, as the authors measure, or what the path computes "
        "(exact planner only)",
    ] = "dense"
    max_gap: Annotated[int | None, Int(1, help="L, most steps from one computed step to the next; None for 0.3 T")] = (
        None
    )

    def __post_init__(self) -> None:
        if self.history == "path" and self.planner == "authors":
            raise ValueError("history='path' goes with planner='exact'; got planner='authors'")

    def settings(self) -> dict[str, Any]:
        """What the costs are made of; where the path is the history, the forecast's guard is in them."""
        found = {"order": self.order, "max_gap": self.max_gap, "history": self.history}
        return found | ({"first_full": self.first_full} if self.history == "path" else {})

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        num_steps = len(timesteps(pipe, setup))
        check_int("order", self.order, 1, num_steps - 1)
        where = planners.measured(num_steps, self.order, self._gap(num_steps), self.history)
        self._planned(np.where(where, 0.0, np.inf))  # a budget that cannot be met is found before anything is drawn
        last = [span.site.name for span in describe(denoiser(pipe)).stacks if span.main][-1]
        guard = max(self.first_full - 2, 0) if self.history == "path" else 0
        seen: list[Tensor] = []

        def see(at: At, new: Seen, old: Seen | None) -> None:
            if at.site.name == last:
                seen.append(new.output.detach().clone())
            if len(seen) == num_steps:
                features = torch.stack(seen)
                seen.clear()
                costs = planners.segment_costs(features, self.order, self._gap(num_steps), self.history, guard)
                add(sums, "costs", costs[where] * features.shape[1])

        return see

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        num_steps = len(timesteps(pipe, setup))
        where = planners.measured(num_steps, self.order, self._gap(num_steps), self.history)
        costs = torch.full(where.shape, torch.inf, dtype=torch.float64)
        costs[where] = statistics.sum("costs") / len(statistics.samples)
        return recipe(
            "dpcache",
            full_steps=self._planned(costs.numpy()),
            num_steps=num_steps,
            order=self.order,
            first_full=self.first_full,
        )

    def _gap(self, num_steps: int) -> int:
        return max(int(0.3 * num_steps), 1) if self.max_gap is None else self.max_gap

    def _planned(self, costs: np.ndarray) -> Plan:
        """The plan of the planner; a ValueError if there is none that computes so many steps."""
        num_steps = len(costs)
        check_int("budget", self.budget, 1, num_steps)
        forced = planners.forced_steps(num_steps, self.first_full, self.last_full)
        costs = planners.allowed(costs, forced, self._gap(num_steps))
        if self.planner == "exact":
            plan = planners.exact_plan(costs, self.budget)
        else:
            plan = planners.authors_plan(costs, self.budget)
        if not plan or not np.isfinite(planners.path_cost(costs, plan)):
            least = next(k for k in range(1, num_steps + 1) if planners.exact_plan(costs, k))
            raise ValueError(
                f"no plan computes {self.budget} of {num_steps} steps, with first_full={self.first_full}, "
                f"last_full={self.last_full} and at most {self._gap(num_steps)} from one to the next: budget must be "
                f"{least} or more"
            )
        return plan
