"""How sure a number is: percentile bootstrap over samples (Efron & Tibshirani 1993, chapter 13).

A statistic is a number of some of the samples: the mean of their values, the PSNR of them together, the Frechet
distance of their features. It is asked by sample numbers, so one resampling serves every kind, and two rows of a
comparison are resampled together.

>>> interval(mean_of(scores), len(scores))
>>> difference(psnr_of(errors), psnr_of(other_errors), len(errors))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..parts import check_int, check_number
from .metrics import Moments, decibels, frechet_distance

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Statistic:
    """A number of samples.

    Attributes:
        of: sample numbers int64 [n], with repetitions -> number.
        shifts: whether drawing samples twice moves the number to one side, whatever the samples. Then the bounds are
            moved back, so that the value lies in the middle of what was drawn.
    """

    of: Callable[[np.ndarray], float]
    shifts: bool = False


@dataclass(frozen=True)
class Interval:
    """A statistic of the samples as they are, and the bounds between which `level` of the resampled ones lie.

    Bounds are resampled values, not interpolated: they may be infinite, as a PSNR is.
    """

    value: float
    low: float
    high: float
    level: float = LEVEL


# ---- statistics -----------------------------------------------------------------------------------------------------
def mean_of(values: Any) -> Statistic:
    """Mean of a value per sample, [n]."""
    values = np.asarray(values, float)
    return Statistic(lambda rows: float(values[rows].mean()))


def psnr_of(errors: Any) -> Statistic:
    """PSNR in dB of the mean squared errors of samples [n], pooled before the logarithm."""
    errors = np.asarray(errors, float)
    return Statistic(lambda rows: decibels(float(errors[rows].mean())))


def frechet_of(features: Tensor, references: Tensor | Moments) -> Statistic:
    """Frechet distance of features [n, d] to references.

    References [n, d] are a partner for every sample and drawn with it; a (mean, covariance) stays as it is.

    A sample drawn twice makes a set less varied, and every resampled distance is too large. Bounds are moved back for
    it; they then say how sure the distance is at this number of samples, and are rather too wide than too narrow.
    """
    if isinstance(references, Tensor) and len(references) != len(features):
        raise ValueError(f"references are a partner for every sample; got {len(references)} for {len(features)}")

    def distance(rows: np.ndarray) -> float:
        drawn = torch.from_numpy(rows).to(features.device)
        return frechet_distance(features[drawn], references[drawn] if isinstance(references, Tensor) else references)

    return Statistic(distance, shifts=True)


# ---- intervals ------------------------------------------------------------------------------------------------------
def interval(
    statistic: Statistic, n: int, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a statistic of n samples; the same seed draws the same samples.

    Args:
        statistic: what is resampled, see `mean_of`, `psnr_of` and `frechet_of`.
        n: samples, 2 or more.
        resamples: how often n samples are drawn, with replacement.
        level: share of the resampled statistics between the bounds, in [0.5, 0.999].
        seed: of the draws.
    """
    check_int("n", n, 2)
    check_int("resamples", resamples, 10)
    check_number("level", level, 0.5, 0.999)
    generator = np.random.default_rng(seed)
    value = statistic.of(np.arange(n))
    drawn = np.sort([statistic.of(generator.integers(n, size=n)) for _ in range(resamples)])
    if statistic.shifts:
        drawn = drawn - (np.median(drawn) - value)
    outside = int(resamples * (1 - level) / 2)  # on either side; rounded down, so the interval is rather too wide
    return Interval(value, float(drawn[outside]), float(drawn[-1 - outside]), level)


def difference(
    first: Statistic, second: Statistic, n: int, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Interval of first - second, the same samples drawn for both: what the rows share cancels out.

    Equal values differ by 0, infinite ones too. Arguments are those of `interval`.
    """

    def apart(rows: np.ndarray) -> float:
        a, b = first.of(rows), second.of(rows)
        return 0.0 if a == b else a - b

    return interval(Statistic(apart, first.shifts or second.shifts), n, resamples=resamples, level=level, seed=seed)
