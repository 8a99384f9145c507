"""EOC's prior: mean trends of features, and which reused steps they are worth applying at (arXiv 2501.19243)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..fill import At
from ..parameters import Int, Number
from ..recipe import Recipe, recipe
from ..when import Router
from .base import OnSchedule, See, Seen, add, digest
from .setup import Setup, timesteps
from .statistics import Statistics
from .trial import Trial

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CalibrateEOC(OnSchedule):
    """Sums the change of every module's output since the step before, at the steps that the schedule reuses.

    The judgment table M of the abstract ("decide which caching steps are worth correcting") is not public; `judge`
    is a rule of our own. "none" corrects everything, as the authors' released bytecode does. "trial" keeps a step's
    correction only if a run with it, on calibration samples, comes closer to the uncached pictures; steps are tried in
    the order of sampling, on top of those kept so far. `size_quantile` leaves out the sites and steps with the smallest
    ||E|| / ||A|| beforehand.
    """

    method = "eoc"

    theta: Annotated[float, Number(-float("inf"), help="strength of the correction")] = 0.01
    judge: Annotated[
        Literal["none", "trial"], "correct everything, or only the steps that trial runs show to be worth it"
    ] = "none"
    size_quantile: Annotated[
        float, Number(0, 1, help="share of sites and steps with the smallest relative trend that is not corrected")
    ] = 0.0
    trial_samples: Annotated[int, Int(1, help="calibration samples in every trial run")] = 16
    precision: Annotated[Literal["float32", "float16", "bfloat16"], "how trends are stored"] = "float16"

    def settings(self) -> dict[str, Any]:
        """What the schedule is made of: it decides which trends are summed."""
        when = self.when
        if isinstance(when, Router):
            return {"router_logits": digest(when.logits["logits"].float()), "threshold": self.threshold}
        return {"interval": self.interval} if self.reuse_steps is None else {"reuse_steps": list(self.reuse_steps)}

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        steps = self.reused(pipe, len(timesteps(pipe, setup)))

        def see(at: At, new: Seen, old: Seen | None) -> None:
            if old is not None and at.step in steps[at.site.name]:
                name = f"{at.site.name}@{at.step}"
                add(sums, name, (new.output.float() - old.output.float()).sum(0), torch.float32)
                add(sums, f"{name}#square", new.output.float().square().sum())

        return see

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        count = len(statistics.samples)
        trend = {name: t / count for name, t in statistics.sums.items() if not name.endswith("#square")}
        size = {name: _size(t, statistics.sum(f"{name}#square") / count) for name, t in trend.items()}
        limit = float(torch.tensor(list(size.values()), dtype=torch.float64).quantile(self.size_quantile))
        stored = {name: t.to(PRECISIONS[self.precision]) for name, t in trend.items() if size[name] >= limit}
        if self.judge == "none":
            return self._recipe(stored)

        def correcting(steps: set[int]) -> Recipe:
            return self._recipe({name: t for name, t in stored.items() if _step(name) in steps})

        trial = Trial(pipe, setup, statistics.samples[: self.trial_samples])
        return correcting(trial.worth(map(_step, stored), correcting))

    def _recipe(self, trend: dict[str, Tensor]) -> Recipe:
        return recipe("eoc", trend=trend, theta=self.theta, **self.schedule)


def _step(name: str) -> int:
    """The step of a trend's name, SITE@STEP."""
    return int(name.rpartition("@")[2])


def _size(trend: Tensor, square: Tensor) -> float:
    """||E|| / ||A||, the latter as the root of the mean square norm."""
    return float(trend.double().norm() / square.sqrt().clamp(min=1e-30))
