"""ToCa's soft interval and DuCa's dual one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..parts import check_bool, check_choice, check_int, check_number, show
from ..plan import COMPUTE, PARTIAL, REUSE, Site
from .base import When

FULL, CONSERVATIVE, AGGRESSIVE = 0, 1, 2  # kinds of a step, numbered as in the authors' logs


@dataclass(frozen=True)
class SoftInterval(When):
    """Full steps whose distance varies over the run; the steps between are partial (ToCa, arXiv 2410.05317).

    At a full step the interval in force becomes P = round(interval / (1 + warp - 2 warp i/T)), or 2 inside the
    sensitive window of i/T; a step is full iff k = 0 or its index is a multiple of P.

    Args:
        interval: base interval N.
        warp: how much P varies, N/(1+warp) .. N/(1-warp); 0 keeps P = N.
        sensitive_window: (low, high) share of the run, in i/T, in which P = 2; None for no window.
        per_block_kind: decide again in every block, as the authors' code does. P changes inside block 0 of a full
            step, so where the new P does not divide the index, block 0 is full and the others are not. False decides
            once a step.
        direction: index of a step: "down" i = T-1-k (DiT), or "up" i = k (PixArt), where the sign of warp flips.
    """

    interval: int = 3
    warp: float = 0.4
    sensitive_window: tuple[float, float] | None = (0.2, 0.4)
    per_block_kind: bool = True
    direction: str = "down"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)
        check_number("interval_warp", self.warp, 0, 0.95)
        check_bool("per_block_kind", self.per_block_kind)
        check_choice("direction", self.direction, ("down", "up"))
        if self.sensitive_window is not None:
            check_window("sensitive_window", self.sensitive_window)

    def interval_at(self, index: int, num_steps: int) -> int:
        """The interval P that a full computation at `index` sets; float32 and half-to-even, as the authors compute."""
        if self.sensitive_window is not None:
            low, high = (int(share * num_steps) for share in self.sensitive_window)
            if low <= index < high:
                return 2
        sign = 1 if self.direction == "down" else -1
        factor = 1 + sign * (self.warp - 2 * self.warp * index / num_steps)
        return int(np.rint(np.float32(self.interval) / np.float32(factor)))

    def kind(self, first: bool, index: int, interval: int) -> int:
        """Kind of a step or block, given the interval in force."""
        return FULL if first or index % interval == 0 else CONSERVATIVE

    def kinds(self, num_steps: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Kinds [num_steps, depth] and the interval in force after every step [num_steps]."""
        kinds = np.empty((num_steps, depth), dtype=np.int64)
        intervals = np.empty(num_steps, dtype=np.int64)
        interval = self.interval
        for k in range(num_steps):
            index = num_steps - 1 - k if self.direction == "down" else k
            first_kind = self.kind(k == 0, index, interval)
            if first_kind == FULL:
                interval = self.interval_at(index, num_steps)
            others = self.kind(k == 0, index, interval) if self.per_block_kind else first_kind
            kinds[k, :1], kinds[k, 1:], intervals[k] = first_kind, others, interval
        return kinds, intervals

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        depth = 1 + max((site.order for site in sites), default=0)
        kinds, _ = self.kinds(num_steps, depth)
        share = np.array([COMPUTE, PARTIAL, REUSE])[kinds][:, [site.order for site in sites]]
        stack = np.array([site.kind == "stack" for site in sites])
        # a stack is entered unless its last block is aggressive; block 0 may still be full then, for its cache's sake
        share[:, stack] = np.where(share[:, stack] == REUSE, REUSE, COMPUTE)
        return share


@dataclass(frozen=True)
class DualInterval(SoftInterval):
    """A soft interval with partial and aggressive steps in turn between the full ones (DuCa, arXiv 2412.18911).

    Index mod P odd is partial, even is aggressive: no block is computed and the state that left the last block in the
    previous step enters the final layer.
    """

    uses_stack: ClassVar[bool] = True

    def kind(self, first: bool, index: int, interval: int) -> int:
        if first or index % interval == 0:
            return FULL
        return CONSERVATIVE if (index % interval) % 2 == 1 else AGGRESSIVE


def check_window(name: str, window: Any) -> None:
    """Raises a ValueError unless `window` is (low, high) with 0 <= low <= high <= 1."""
    try:
        low, high = window
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a pair (low, high) of shares of the run, or None; got {show(window)}"
        ) from None
    for end in (low, high):
        check_number(name, end, 0, 1)
    if low > high:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high; got {show(window)}")
