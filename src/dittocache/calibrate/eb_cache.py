"""EB-Cache's table search: how much every step can reuse before its predicted noise changes size (arXiv 2503.07120)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import noise
from ..cache import enable, wanted
from ..describe import describe
from ..fix import Level, NoiseScale
from ..hooks import Call, captured
from ..plan import Plan
from ..recipe import Number, Recipe, recipe
from ..when import Every, Table
from ..when.learned import STATES
from .base import Calibrator, add
from .setup import Setup, conditional_half, draw, timesteps
from .statistics import Statistics

FULL, ATTENTION, BOTH, FEED_FORWARD = range(4)  # what a state reuses


@dataclass(frozen=True)
class CalibrateEBCache(Calibrator):
    """Votes of samples for the state of every step, as the paper (version 3) is quoted; the authors released no search.

    On an uncached trajectory, step k is also run with features of step k-1: both kinds reused (and the noise scaled),
    and one kind: the feed-forward while it is noisy (time above 0.4), then attention. A sample votes for the most
    aggressive state whose noise prediction has a norm within a relative `delta` of the uncached one, a limit that goes
    linearly from `delta_low` at the clean end to `delta_high` at pure noise; the most votes win. Left to us were what
    features a candidate reuses (those of the step before), and what the limits are.
    """

    method = "eb-cache"

    delta_low: Annotated[float, Number(0, help="largest relative change of the noise's norm at the clean end")] = 0.001
    delta_high: Annotated[float, Number(0, help="the same at pure noise")] = 0.01
    noise_scale: Annotated[float, Number(0, help="predicted noise is divided by it")] = 1.0
    noise_bias: Annotated[bool, "multiply predicted noise with the paper's b(t)"] = False
    turn: Annotated[float, Number(0, 1, help="time above which the single candidate reuses the feed-forward")] = 0.4

    def settings(self) -> dict[str, Any]:
        names = ("delta_low", "delta_high", "noise_scale", "noise_bias", "turn")
        return {name: getattr(self, name) for name in names}

    def collect(self, pipe: Any, setup: Setup, samples: Sequence[int]) -> dict[str, Tensor]:
        with captured(pipe.transformer) as calls:
            draw(pipe, setup, samples)
        if len(calls) != setup.num_steps:
            raise ValueError(
                f"the search needs one network call a step; {type(pipe).__name__} made {len(calls)} in "
                f"{setup.num_steps} steps"
            )
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(setup.num_steps)
        alphas, sigmas = noise.levels(scheduler)
        kind = noise.prediction_type(scheduler)
        votes = torch.zeros(setup.num_steps, len(STATES), dtype=torch.float64)
        votes[0, FULL] = len(samples)

        def norms(output: Tensor, call: Call, k: int) -> Tensor:
            x, predicted = call.sample, output[:, : call.sample.shape[1]]
            found = noise.to_noise(predicted, x, alphas[k], sigmas[k], kind)
            if len(found) == 2 * len(samples):
                halves = found.chunk(2)
                yes, no = halves[conditional_half(pipe)], halves[1 - conditional_half(pipe)]
                found = no + setup.guidance_scale * (yes - no)
            return found.flatten(1).double().norm(dim=1)

        for k, outputs in enumerate(self._candidates(pipe, calls, self._times(pipe, setup)), start=1):
            time = self._times(pipe, setup)[k]
            wanted_norm = norms(calls[k].output, calls[k], k)
            scale = 1.0
            if self.noise_bias or self.noise_scale != 1:
                scale = float(NoiseScale(self.noise_scale, self.noise_bias).fix(torch.ones(1), Level(k, 0, time, 1.0)))
            limit = self.delta_low + (self.delta_high - self.delta_low) * time
            both = (norms(outputs[0], calls[k], k) * scale / wanted_norm - 1).abs() <= limit
            one = (norms(outputs[1], calls[k], k) / wanted_norm - 1).abs() <= limit
            votes[k, BOTH] = both.sum()
            votes[k, self._single(time)] = (one & ~both).sum()
            votes[k, FULL] = (~one & ~both).sum()
        sums: dict[str, Tensor] = {}
        add(sums, "votes", votes)
        return sums

    def _single(self, time: float) -> int:
        return FEED_FORWARD if time > self.turn else ATTENTION

    @staticmethod
    def _times(pipe: Any, setup: Setup) -> list[float]:
        trained = pipe.scheduler.config.num_train_timesteps
        return [float(t) / trained for t in timesteps(pipe, setup)]

    @torch.no_grad()
    def _candidates(self, pipe: Any, calls: Sequence[Call], times: Sequence[float]) -> Any:
        """For every step but the first: network outputs with both kinds, and with one kind reused from the step before."""
        description = describe(pipe.transformer)
        sites = [description.columns[j] for j in wanted(Recipe(when=Every(1)), description)]
        attention = torch.tensor(["attention" in site.kind for site in sites])
        rows = []
        for k in range(1, len(calls)):
            for state in (FULL, BOTH, self._single(times[k])):
                computed = STATES[state]
                rows.append(torch.where(attention, float(computed[0]), float(computed[1])))
        plan = Plan(torch.stack(rows).numpy(), tuple(s.name for s in sites), kinds=tuple(s.kind for s in sites))
        with enable(pipe.transformer, Recipe(when=Table(plan))) as cache, cache.run(len(rows)):
            for k, (before, now) in enumerate(itertools.pairwise(calls), start=1):
                outputs = []
                for n, call in enumerate((before, now, now)):
                    cache.step(3 * (k - 1) + n)
                    found = pipe.transformer(*call.args, **call.kwargs)
                    outputs.append(found if isinstance(found, Tensor) else found[0])
                yield outputs[1:]

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        table = tuple(int(state) for state in statistics.sums["votes"].argmax(1))
        return recipe("eb-cache", table=table, noise_scale=self.noise_scale, noise_bias=self.noise_bias)
