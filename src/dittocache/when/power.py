"""Computed steps that lie close together around a centre, and further apart away from it (DeepCache)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parts import check_int, check_number
from ..plan import Site
from .base import When, columns

DECREASE = 0.02  # of the power, when truncation makes two steps one


@dataclass(frozen=True)
class PowerSteps(When):
    """K = ceil(T / interval) computed steps, spread by a power law (DeepCache, arXiv 2312.00858).

    Args:
        interval: average distance of computed steps.
        power: above 1; larger draws them closer to the centre.
        center: the step around which they are dense; None: around the first one.
    """

    interval: int = 5
    power: float = 1.4
    center: int | None = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)
        check_number("power", self.power, 1)
        if self.center is not None:
            check_int("center", self.center, 0)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Raises a ValueError if no power spreads so many steps, or the centre lies beyond the run."""
        count = math.ceil(num_steps / self.interval)
        computed = np.full(num_steps, count == num_steps)
        if count < num_steps:
            computed[spread(num_steps, count, self.power, self.center)[0]] = True
        return columns(computed, sites)


def spread(num_steps: int, computed: int, power: float, center: int | None) -> tuple[list[int], float]:
    """The computed steps of a run, and the power that it took: the first of p, p - 0.02, ... that keeps them apart.

    Around a centre c, x runs evenly from (-c)^(1/p) to (T-c)^(1/p), and steps are c + x^p, truncated; without one, from
    0 to T^(1/p). The root of -c is complex and so are the x; of x^p the real part is taken, as the authors' code does
    without saying so.

    Raises:
        ValueError: no power above 1 gives so many steps, or the centre lies beyond the run.
    """
    if center is not None and center >= num_steps:
        raise ValueError(f"center must be a step of the run, 0 to {num_steps - 1}; got {center}")
    p, c = power, center or 0
    while p > 1:
        x = np.linspace((-c) ** (1 / p), (num_steps - c) ** (1 / p), computed + 1)
        marks = np.unique((x**p).real.astype(np.int32))
        steps = {*marks[:-1].tolist()} if center is None else {0, *(marks[1:-1] + c).tolist()}
        if len(steps) == computed:
            return sorted(steps), p
        p -= DECREASE
    raise ValueError(
        f"no power from {power} down to 1 spreads {computed} computed steps over {num_steps}: take a larger interval"
        + ("" if center is None else " or another center")
    )
