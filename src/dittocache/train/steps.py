"""Pairs of a full step and the cache step after it, as L2C trains them (arXiv 2406.01733, and its release)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise as levels
from ..models import dpm_solver
from ..parts import check_int
from .objective import Record


class Pairs:
    """Steps of a sampler of first order: row i of T is the i-th step from the end, for even i, after the full i + 1.

    One deterministic DDIM step leads from the one to the other (Euler's, for a flow), whatever the sampler's own is.
    With an odd T the first step has nothing to reuse, and its row is not trained.

    Args:
        timesteps: of all steps, noisiest first, as the network receives them.
        alpha, sigma: noise levels [T], float64.
        kind: what the network predicts (see `noise`); channels beyond those of its input (variances) are left aside.

    Raises:
        ValueError: fewer than two steps.
    """

    sums: bool = False
    limit: float | None = 5.0
    per_sample: bool = True

    def __init__(self, timesteps: Sequence[float] | Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> None:
        self.timesteps, self.alpha, self.sigma, self.kind = torch.as_tensor(timesteps), alpha, sigma, kind
        self.rows = len(self.timesteps)
        check_int("num_steps", self.rows, 2)
        self.trained = tuple(range(0, self.rows - 1, 2))

    @classmethod
    def of(cls, scheduler: Any, num_steps: int) -> Pairs:
        """Those of a scheduler of diffusers, which is left as it is.

        Raises:
            ValueError: fewer than two steps, or a scheduler whose noise levels are not known.
        """
        check_int("num_steps", num_steps, 2)
        own = type(scheduler).from_config(scheduler.config)
        own.set_timesteps(num_steps)
        return cls(own.timesteps.cpu(), *levels.levels(own), levels.prediction_type(own))

    def to_dict(self) -> dict[str, Any]:
        return {"timesteps": [round(float(t), 3) for t in self.timesteps], "prediction": self.kind}

    def start(self, rows: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        return levels.add_noise(x0, noise, *self._level(self._full(rows), x0))

    def advance(self, rows: Tensor, x: Tensor, record: Record) -> tuple[Tensor, Tensor]:
        k = self._full(rows)
        output = record(x, self.timesteps[k].to(x.device))
        predicted = output[:, : x.shape[1]]
        x = levels.ddim_step(predicted, x, self._level(k, x), self._level(k + 1, x), self.kind)
        return x, self.timesteps[k + 1].to(x.device)

    def _full(self, rows: Tensor) -> Tensor:
        """k of the full step."""
        return self.rows - 2 - rows

    def _level(self, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.ndim - 1))
        return self.alpha[k].view(shape), self.sigma[k].view(shape)


class OuterSteps:
    """U-ViT's DPM-Solver-2 (see `models.dpm_solver`): row r is the start of outer step r, after the mid point of r - 1.

    As in the release, x0 is noised to a whole timestep, the solver starts at the fractional one beside it, and teacher
    and student see a whole one, while sampling feeds fractional ones.

    Args:
        nfe: network evaluations, two an outer step.

    Raises:
        ValueError: fewer than four evaluations: there is no second outer step.
    """

    sums: bool = True
    limit: float | None = None
    per_sample: bool = False

    def __init__(self, nfe: int) -> None:
        check_int("nfe", nfe, 4)
        self.times = dpm_solver.outer_times(nfe)
        self.rows = len(self.times) - 1
        self.trained = tuple(range(1, self.rows))

    def to_dict(self) -> dict[str, Any]:
        return {"outer steps": self.rows}

    def whole(self, step: int) -> int:
        """The whole timestep at the start of an outer step."""
        return round(float(1000 * self.times[step]))

    def start(self, rows: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        return dpm_solver.add_noise(x0, noise, self.whole(int(rows[0]) - 1))

    def advance(self, rows: Tensor, x: Tensor, record: Record) -> tuple[Tensor, Tensor]:
        row = int(rows[0])
        s, t = self.times[row - 1], self.times[row]
        mid = dpm_solver.mid_time(s, t)

        def at(time: Tensor) -> Tensor:
            return (1000 * time).expand(len(x)).to(x.device)

        start = record(x, at(s))
        middle = record(dpm_solver.first_update(x, start, s, mid), at(mid))
        x = dpm_solver.second_update(x, start, middle, s, mid, t)
        return x, torch.full((len(x),), self.whole(row), device=x.device)
