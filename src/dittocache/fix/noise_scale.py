"""Noise scaling against exposure bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..parts import check_bool, check_number
from .base import Fix, Level


@dataclass(frozen=True)
class NoiseScale(Fix):
    """Rescales the predicted noise at every step, computed ones included (EB-Cache, arXiv 2503.07120).

    Args:
        divisor: the prediction is divided by it; the authors' script has 0.965, which enlarges it.
        bias: multiply by b(t) as well, the paper's (v3) estimate of the exposure bias: 1 at pure noise, b_h at
            t = threshold, towards b_l at the clean end.
        high, low, threshold: b_h, b_l and t_thre.
    """

    divisor: float = 1.0
    bias: bool = False
    high: float = 0.98
    low: float = 0.96
    threshold: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("noise_scale", self.divisor)
        if self.divisor <= 0:
            raise ValueError(f"noise_scale must be a number above 0; got {self.divisor}")
        check_bool("bias", self.bias)
        for name in ("high", "low", "threshold"):
            check_number(name, getattr(self, name), 0, 1)
        if self.threshold == 1:
            raise ValueError("threshold must be a number below 1; got 1")

    def b(self, time: float) -> float:
        """b(t), time 1 at pure noise."""
        span = 1 - self.threshold
        if time >= self.threshold:
            return self.high + (1 - self.high) * math.exp(-5 * (1 - time) / span)
        return self.low + (self.high - self.low) * math.exp(5 * (time - self.threshold) / span)

    def fix(self, noise: Tensor, at: Level) -> Tensor:
        factor = self.b(at.time) if self.bias else 1.0
        return noise / self.divisor if factor == 1 else noise * (factor / self.divisor)
