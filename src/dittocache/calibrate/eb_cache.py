"""EB-Cache's table search: how much every step can reuse before its predicted noise changes size (arXiv 2503.07120)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..cache import enable
from ..fill import Entry
from ..fix import Level, NoiseScale
from ..hooks import Call, captured
from ..parameters import Number
from ..parts import show
from ..plan import OPEN, Site
from ..recipe import Recipe, recipe
from ..when import Look, When
from ..when.learned import STATES
from .base import Calibrator, add
from .setup import Setup, conditional_half, draw
from .statistics import Statistics

FULL, ATTENTION, BOTH, FEED_FORWARD = range(4)  # what a state reuses


@dataclass(frozen=True)
class CalibrateEBCache(Calibrator):
    """Votes of samples for the state of every step, as the paper (version 3) is quoted; the authors released no search.

    On an uncached trajectory, every step is also run with both kinds of features reused (and the noise scaled), and
    with one kind: the feed-forward while it is noisy (time above 0.4), then attention. A sample votes for the most
    aggressive state whose noise prediction has a norm within a relative `delta` of the uncached one, a limit that goes
    linearly from `delta_low` at the clean end to `delta_high` at pure noise; the most votes win. Left to us were which
    features a candidate reuses (those that the sample's choices so far have kept), and the limits.
    """

    method = "eb-cache"

    delta_low: Annotated[float, Number(0, help="largest relative change of the noise's norm at the clean end")] = 0.001
    delta_high: Annotated[float, Number(0, help="the same at pure noise")] = 0.01
    noise_scale: Annotated[float, Number(0, help="predicted noise is divided by it")] = 1.0
    noise_bias: Annotated[bool, "multiply predicted noise with the paper's b(t)"] = False
    turn: Annotated[float, Number(0, 1, help="time above which the single candidate reuses the feed-forward")] = 0.4

    def __post_init__(self) -> None:
        self._fix()  # refuses what cannot be divided by

    def settings(self) -> dict[str, Any]:
        names = ("delta_low", "delta_high", "noise_scale", "noise_bias", "turn")
        return {name: getattr(self, name) for name in names}

    def collect(self, pipe: Any, setup: Setup, samples: Sequence[int]) -> dict[str, Tensor]:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(setup.num_steps)
        times = [float(t) / scheduler.config.num_train_timesteps for t in scheduler.timesteps]
        alphas, sigmas = noise.levels(scheduler)
        kind = noise.prediction_type(scheduler)
        if len(times) < 2:
            raise ValueError("the search compares a step with the one before: 2 steps or more are needed, not 1")
        with captured(pipe.transformer) as calls:
            draw(pipe, setup, samples)
        if len(calls) != len(times):
            raise ValueError(
                f"the search needs one network call a step; {type(pipe).__name__} made {len(calls)} in "
                f"{len(times)} steps"
            )

        def norms(output: Tensor, k: int) -> Tensor:
            """Of the noise after guidance [samples]."""
            x = calls[k].sample
            found = noise.to_noise(output[:, : x.shape[1]], x, alphas[k], sigmas[k], kind)
            if setup.guidance_scale > 1 and len(found) == 2 * len(samples):
                halves = found.chunk(2)
                yes, no = halves[conditional_half(pipe)], halves[1 - conditional_half(pipe)]
                found = no + setup.guidance_scale * (yes - no)
            size = found.flatten(1).float().cpu().double().norm(dim=1)
            if not size.isfinite().all():
                which = show(list(samples))
                raise ValueError(
                    f"the statistics 'votes' of samples {which} are not finite: the noise of step {k} is not"
                )
            return size

        votes = torch.zeros(len(times), len(STATES), dtype=torch.float64)
        votes[0, FULL] = len(samples)
        with _Replay(pipe.transformer, calls) as replay:
            replay.forward(0, torch.tensor(FULL))
            for k in range(1, len(calls)):
                true, single = norms(calls[k].output, k), self._single(times[k])
                scale = float(self._fix().fix(torch.ones(1), Level(k, len(times), times[k], 0.0)))
                limit = self.delta_low + (self.delta_high - self.delta_low) * times[k]
                before = replay.kept()
                both = (norms(replay.forward(k, torch.tensor(BOTH)), k) * scale / true - 1).abs() <= limit
                one = (norms(replay.forward(k, torch.tensor(single)), k) / true - 1).abs() <= limit
                chosen = torch.where(both, BOTH, torch.where(one, single, FULL)).cpu()
                votes[k].scatter_add_(0, chosen, torch.ones(len(chosen), dtype=torch.float64))
                replay.go_back(before)
                replay.forward(k, chosen)
        sums: dict[str, Tensor] = {}
        add(sums, "votes", votes)
        return sums

    def _single(self, time: float) -> int:
        return FEED_FORWARD if time > self.turn else ATTENTION

    def _fix(self) -> NoiseScale:
        return NoiseScale(self.noise_scale, self.noise_bias)

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        order = torch.tensor((FULL, ATTENTION, FEED_FORWARD, BOTH))  # of as many votes, the least reuse wins
        table = tuple(int(state) for state in order[statistics.sum("votes")[:, order].argmax(1)])
        return recipe("eb-cache", table=table, noise_scale=self.noise_scale, noise_bias=self.noise_bias)


class _Live(When):
    """States as told at the time, one for all samples or one for each. No dataclass: not to be saved."""

    def __init__(self) -> None:
        self.states = torch.tensor(FULL)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        return np.full((num_steps, len(sites)), OPEN)

    def decide(self, look: Look, memory: dict[str, Any]) -> Tensor:
        # a fused site holds both kinds: it is reused only where both are, as in `States`
        kind = look.site.kind
        parts = (0, 1) if kind == "fused" else (0,) if "attention" in kind else (1,)
        computed = torch.tensor([any(STATES[n][part] for part in parts) for n in range(len(STATES))])
        return computed[self.states].reshape(-1).expand(len(look.state))


class _Replay:
    """Forwards of a recorded run, in which samples reuse features of the forwards before as told."""

    def __init__(self, transformer: Any, calls: Sequence[Call]) -> None:
        self.transformer, self.calls, self.when = transformer, calls, _Live()

    def __enter__(self) -> _Replay:
        self.cache = enable(self.transformer, Recipe(when=self.when, method="none"))
        self.run = self.cache.run(len(self.calls))
        self.run.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.run.close()
        self.cache.disable()

    @torch.no_grad()
    def forward(self, k: int, states: Tensor) -> Tensor:
        """The prediction at the inputs of step k; states are one number, or one for each sample [samples]."""
        self.when.states = states
        self.run.step(k)
        output = self.transformer(*self.calls[k].args, **self.calls[k].kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def kept(self) -> dict[Any, Entry]:
        """What is kept now, for `go_back`."""
        return {key: copy.copy(entry) for key, entry in self.run.entries.items()}

    def go_back(self, entries: dict[Any, Entry]) -> None:
        self.run.entries = entries
