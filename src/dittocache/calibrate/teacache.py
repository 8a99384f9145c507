"""TeaCache's polynomial: how the change of the network's output follows from that of its input (arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ..cache import enable
from ..hooks import Call, captured
from ..parameters import Number
from ..plan import COMPUTE, OPEN, Site
from ..recipe import Recipe, methods
from ..samples import Samples
from ..when import Look, When
from ..when.dynamic import change
from .base import Calibrator
from .setup import Setup, draw
from .statistics import Statistics

DEGREE = 4


@dataclass(frozen=True)
class CalibrateTeaCache(Calibrator):
    """Fits the polynomial as the authors answer in an issue of theirs: there is no script in their repository.

    One point for every sample and every two steps in a row of an uncached run: x, the relative L1 change of what is
    watched, and y, that of the network's output. Least squares over all points, degree 4. Samples are rows of guidance
    together, as where the polynomial is used; predicted variances do not count.
    """

    method = "teacache"

    threshold: Annotated[float, Number(0, help="of the recipe; it does not enter the fit")] = 0.1
    indicator: Annotated[
        Literal["modulated", "embedding"], "what is watched: the input of the first attention, or the time embedding"
    ] = "modulated"

    def settings(self) -> dict[str, Any]:
        return {"indicator": self.indicator}

    def collect(self, pipe: Any, setup: Setup, samples: Sequence[int]) -> dict[str, Tensor]:
        watch = _Watch(self.indicator)
        recipe = Recipe(when=watch, where="stack", keeps="change", method="none")
        with captured(pipe.transformer) as calls, enable(pipe, recipe):
            draw(pipe, setup, samples)
        if len(watch.seen) != len(calls):
            raise ValueError(
                f"the first block of {type(pipe.transformer).__name__} was looked at in {len(watch.seen)} of "
                f"{len(calls)} network calls: there is nothing to fit"
            )
        points: list[Tensor] = []
        last: list[Tensor] = []  # outputs of the step before, of every guidance branch
        new: list[Tensor] = []
        for n, (call, (step, x)) in enumerate(zip(calls, watch.seen, strict=True)):
            if n and watch.seen[n - 1][0] < step:
                last, new = new, []
            y = _by_sample(call, len(samples))
            if x is not None and len(x) != len(samples):
                raise ValueError(
                    f"{len(samples)} samples drawn at once cannot be told apart: their noise is the same, or they "
                    "share a row of the batch; draw one at a time (batch 1)"
                )
            if x is not None:
                points.append(torch.stack([x, change(y, last[len(new)])]).cpu().double())
            new.append(y)
        found = torch.stack(points, -1) if points else torch.zeros(2, len(samples), 0)
        # by sample, so that shards add up to the same points
        return {f"sample {j}": found[:, i].contiguous() for i, j in enumerate(samples)}

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        x, y = torch.cat([statistics.sums[name] for name in sorted(statistics.sums)], 1).numpy()
        if len(np.unique(x)) <= DEGREE:
            raise ValueError(
                f"a polynomial of degree {DEGREE} needs {DEGREE + 1} different changes, but {setup.num_steps} steps "
                f"gave {len(np.unique(x))}: draw with more steps"
            )
        coefficients = tuple(float(c) for c in np.polyfit(x, y, DEGREE))
        return methods()["teacache"](coefficients=coefficients, threshold=self.threshold, indicator=self.indicator)


class _Watch(When):
    """Computes everything, and notes how the signal of every call has changed since the step before."""

    def __init__(self, signal: str) -> None:
        self.signal = signal  # type: ignore[misc]
        self.seen: list[tuple[int, Tensor | None]] = []  # step, and change [samples]

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        return np.full((num_steps, len(sites)), OPEN)

    def decide(self, look: Look, memory: dict[str, Any]) -> float:
        signal, before = cast(Tensor, look.signal), memory.get("signal")
        memory["signal"] = signal.detach().clone()
        self.seen.append((look.step, None if before is None else change(signal, before)))
        return COMPUTE


def _by_sample(call: Call, samples: int) -> Tensor:
    """The network's output without predicted variances: [samples, values, 1]."""
    output = call.output[:, : call.sample.shape[1]].flatten(1)
    return Samples(samples, max(len(output) // samples, 1)).gather(output.unsqueeze(-1))
