"""Schedules of diffusers' hooks that are known before a run: TaylorSeer's, PAB's and MagCache's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..parts import check_int, check_number, show
from ..plan import COMPUTE, REUSE, Site
from .base import When, columns


@dataclass(frozen=True)
class Warmup(When):
    """The first steps, one that is reused, then every interval-th (TaylorSeer's hook in diffusers).

    Step k is computed if k < `warmup_steps`, if `interval` divides k - warmup_steps - 1, or if k >= `disable_after`.
    """

    interval: int = 5
    warmup_steps: int = 3
    disable_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)
        check_int("warmup_steps", self.warmup_steps, 1)
        if self.disable_after is not None:
            check_int("disable_after", self.disable_after, 0)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        k = np.arange(num_steps)
        computed = (k < self.warmup_steps) | ((k - self.warmup_steps - 1) % self.interval == 0)
        if self.disable_after is not None:
            computed |= k >= self.disable_after
        return columns(computed, sites)


@dataclass(frozen=True)
class Broadcast(When):
    """Attention is reused while the timestep is in a range, and computed every few steps of it (PAB, arXiv 2408.12588).

    A site is computed at k = 0, where t is not strictly inside of its range, and where its interval divides k: steps
    are counted from the start of the run, not of the range. Attention of a stack named "temporal" (over frames) and
    cross-attention have an interval and a range of their own. Other sites are computed always.

    Args:
        interval: of attention; None: always computed.
        timestep_range: (low, high), in the scheduler's timesteps (0 to 1000).
        temporal_interval, temporal_timestep_range: of attention over frames.
        cross_interval, cross_timestep_range: of cross-attention.
        timesteps: of every step; None: those of the run.
    """

    interval: int | None = 2
    timestep_range: tuple[float, float] = (100, 800)
    temporal_interval: int | None = None
    temporal_timestep_range: tuple[float, float] = (100, 800)
    cross_interval: int | None = None
    cross_timestep_range: tuple[float, float] = (100, 800)
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for prefix in ("", "temporal_", "cross_"):
            if getattr(self, f"{prefix}interval") is not None:
                check_int(f"{prefix}interval", getattr(self, f"{prefix}interval"), 1)
            check_range(f"{prefix}timestep_range", getattr(self, f"{prefix}timestep_range"))

    def timed(self, timesteps: Sequence[float] | None) -> When:
        if timesteps is None and self.timesteps is None:
            raise ValueError(
                "this schedule goes by the scheduler's timesteps, and the run has none: pass "
                "cache.run(num_steps, timesteps=...), or scheduler=... to dittocache.enable"
            )
        return self if self.timesteps is not None else dataclasses.replace(self, timesteps=tuple(timesteps or ()))

    def of(self, site: Site) -> tuple[int | None, tuple[float, float]]:
        """Interval and range of a site; no interval for one that is always computed."""
        if "attention" not in site.kind:
            return None, self.timestep_range
        if site.kind == "cross-attention":
            return self.cross_interval, self.cross_timestep_range
        if "temporal" in site.stack:
            return self.temporal_interval, self.temporal_timestep_range
        return self.interval, self.timestep_range

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Raises a ValueError unless the timesteps are known, one for each step."""
        if self.timesteps is None or len(self.timesteps) != num_steps:
            raise ValueError(f"a run of {num_steps} steps needs as many timesteps; got {show(self.timesteps)}")
        k, t = np.arange(num_steps), np.array(self.timesteps)
        table = np.full((num_steps, len(sites)), COMPUTE)
        for n, site in enumerate(sites):
            interval, (low, high) = self.of(site)
            if interval is not None:
                table[(low < t) & (t < high) & (k % interval != 0), n] = REUSE
        return table


@dataclass(frozen=True)
class RatioBudget(When):
    """Reuses while a calibrated error estimate stays within a budget (MagCache, arXiv 2506.09045).

    ratios[k] is how much larger the change of the whole trunk is at step k than at the step before. From step
    int(retention T + 0.5) on, the product a of the ratios since the last computed step is kept, and e, the sum of
    |1 - a|; a step is reused while e <= threshold and at most `max_skip` steps in a row. All of it is known before the
    run. Computed in float32, as the code it follows.

    Args:
        ratios: one for every step; those of another number of steps are read at the nearest relative place.
        threshold: the budget.
        max_skip: K.
        retention: share of the run that is computed at its start.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ratios, tuple) or not self.ratios:
            raise ValueError(f"ratios must be a list of numbers, one for every step; got {show(self.ratios)}")
        for ratio in self.ratios:
            check_number("every entry of ratios", ratio, 0)
        check_number("threshold", self.threshold, 0)
        check_int("max_skip", self.max_skip, 0)
        check_number("retention", self.retention, 0, 1)

    def at(self, num_steps: int) -> np.ndarray:
        """The ratios [num_steps] in float32, by nearest index where they were measured on another number of steps."""
        ratios = np.array(self.ratios, dtype=np.float32)
        if len(ratios) == num_steps:
            return ratios
        if num_steps == 1:
            return ratios[-1:]
        scale = np.float32((len(ratios) - 1) / (num_steps - 1))
        return ratios[np.rint(np.arange(num_steps, dtype=np.float32) * scale).astype(np.int64)]

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        one = np.float32(1)
        computed = np.ones(num_steps, dtype=bool)
        ratio, error, skipped = one, np.float32(0), 0
        for k, step in enumerate(self.at(num_steps)):
            if k < int(self.retention * num_steps + 0.5):
                continue
            ratio, skipped = ratio * step, skipped + 1
            error = error + abs(one - ratio)
            if k and error <= np.float32(self.threshold) and skipped <= self.max_skip:
                computed[k] = False
            else:
                ratio, error, skipped = one, np.float32(0), 0
        return columns(computed, sites)


def check_range(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a pair of numbers (low, high) with low <= high."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (low, high) of timesteps; got {show(value)}")
    for end in value:
        check_number(f"every entry of {name}", end)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high; got {show(value)}")
