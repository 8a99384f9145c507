"""What a user asks for: at most this much loss, or at least this much speed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..parts import check_choice, check_number, show

LARGER = {"psnr": True, "ssim": True, "latent": False, "fd": False}  # measure -> whether more is better
FORGIVEN = 0.95  # share of a speed-up that counts as reached until the last check
FORM = re.compile(r"\s*([a-z]+)\s*(>=|<=)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Goal:
    """Either the fastest plan that loses at most so much, or the closest one that is at least so fast.

    Args:
        metric: what closeness is measured in: `psnr` (dB), `ssim`, `latent` (relative error of the last latents), `fd`
            (Frechet distance of a judge's features).
        bound: the least psnr or ssim, or the largest latent error or Frechet distance.
        speedup: the least measured speed-up over the uncached pipeline.

    Raises:
        ValueError: neither of the two, both, or a value out of range.
    """

    metric: str = "psnr"
    bound: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, tuple(LARGER))
        if (self.bound is None) == (self.speedup is None):
            given = "neither" if self.bound is None else "both"
            raise ValueError(f"a budget is a largest loss or a least speed-up; got {given}")
        if self.speedup is not None:
            check_number("the least speed-up", self.speedup)
            if self.speedup <= 1:
                raise ValueError(f"the least speed-up must be more than 1; got {show(self.speedup)}")
        else:
            check_number(f"the bound of {self.metric}", self.bound, high=1.0 if self.metric == "ssim" else math.inf)
            if not LARGER[self.metric]:
                check_number(f"the bound of {self.metric}", self.bound, 0)

    @classmethod
    def of(cls, max_loss: str | None = None, min_speedup: float | None = None, metric: str = "psnr") -> Goal:
        """From texts such as `psnr>=35` or `fd<=0.1`.

        Raises:
            ValueError: a text of another form, or that bounds a measure on its good side.
        """
        if max_loss is None:
            return cls(metric, speedup=min_speedup)
        match = FORM.fullmatch(max_loss)
        if match is None or match[1] not in LARGER:
            raise ValueError(
                f"a largest loss is written like psnr>=35, ssim>=0.95, latent<=0.1, fd<=0.5; got {show(max_loss)}"
            )
        sign = ">=" if LARGER[match[1]] else "<="
        if match[2] != sign:
            raise ValueError(
                f"a largest loss in {match[1]} is written {match[1]}{sign}{match[3]}; got {show(max_loss)}"
            )
        try:
            bound = float(match[3])
        except ValueError:
            raise ValueError(f"{match[3]!r} in {show(max_loss)} is no number") from None
        return cls(match[1], bound, min_speedup)

    def text(self) -> str:
        if self.speedup is not None:
            return f"at least {self.speedup:g}x faster, closest in {self.metric}"
        return f"{self.metric} {'>=' if LARGER[self.metric] else '<='} {self.bound:g}, as fast as can be"

    def loss(self, numbers: Mapping[str, Any]) -> float:
        """The measure, turned so that less is better."""
        return -numbers[self.metric] if LARGER[self.metric] else numbers[self.metric]

    def met(self, numbers: Mapping[str, Any]) -> bool:
        if self.speedup is not None:
            return numbers["speedup"] >= self.speedup
        return self.loss(numbers) <= self.loss({self.metric: self.bound}) and numbers["speedup"] > 1

    def rank(self, numbers: Mapping[str, Any]) -> tuple[Any, ...]:
        """The less, the better: what meets the goal comes first, then what is nearest to it. Clocks are forgiven."""
        loss, speed = self.loss(numbers), numbers["speedup"]
        if self.speedup is not None:
            slow = speed < FORGIVEN * self.speedup
            return (slow, -speed if slow else loss)
        return (not self.met(numbers), -speed if self.met(numbers) else loss)
