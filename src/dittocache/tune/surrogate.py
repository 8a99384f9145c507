"""How good will a plan be? A Gaussian process over the plans that were tried.

The logarithm of a plan's error is taken to be a multiple of the logarithm of what was predicted for it, plus something
that varies smoothly with the steps that it computes (Rasmussen & Williams, Gaussian Processes for Machine Learning,
2006, chapters 2, 4 and 5; expected improvement: Jones et al., Journal of Global Optimization 13, 1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

LENGTHS = tuple(2.0**-n for n in range(6))  # over which errors vary, as shares of the run
NOISES = (0.01, 0.1, 0.3)  # of errors that no smooth function explains, as shares of their scatter
SLOPE, SCATTER, WEIGHT = 1.0, 0.5, 2  # what is taken for granted before, and how many plans that counts for
TINY = 1e-12


def expected_gains(
    plans: Sequence[Sequence[int]],
    errors: np.ndarray,
    predicted: np.ndarray,
    others: Sequence[Sequence[int]],
    others_predicted: np.ndarray,
    steps: int,
) -> np.ndarray:
    """How much lower than the least one the error of other plans is expected to come out, in logarithms; 0 or more.

    Args:
        plans: [n] computed steps of plans that were tried.
        errors: [n] of these, above 0.
        predicted: [n] what was predicted for them, 0 or more.
        others: [m] computed steps.
        others_predicted: [m] what is predicted for them.
        steps: T.
    """
    y, known, unknown = np.log(errors), np.log(predicted + TINY), np.log(others_predicted + TINY)
    x, z = _placed(plans, others, steps)
    slope = _slope(known, y)
    offset = float((y - slope * known).mean())
    rest = y - offset - slope * known
    scatter = math.sqrt((float(rest @ rest) + WEIGHT * SCATTER**2) / (len(rest) + WEIGHT))
    length, noise = max(
        ((one, other) for one in LENGTHS for other in NOISES), key=lambda at: _evidence(x, rest / scatter, *at)
    )
    lower = np.linalg.cholesky(_matern(x, x, length) + noise**2 * np.eye(len(x)))
    across = np.linalg.solve(lower, _matern(x, z, length))
    mean = offset + slope * unknown + scatter * across.T @ np.linalg.solve(lower, rest / scatter)
    spread = scatter * np.sqrt(np.maximum(1 - (across**2).sum(0), TINY))
    above = (y.min() - mean) / spread
    below = np.array([0.5 * (1 + math.erf(one / math.sqrt(2))) for one in above])
    gains: np.ndarray = spread * (above * below + np.exp(-(above**2) / 2) / math.sqrt(2 * math.pi))
    return np.maximum(gains, 0)


def _placed(plans: Sequence[Sequence[int]], others: Sequence[Sequence[int]], steps: int) -> tuple[np.ndarray, ...]:
    """[n, K] and [m, K] computed steps as shares of the run; one that a plan does not have is at its end."""
    most = max(map(len, [*plans, *others]))
    return tuple(np.array([[*p, *[steps] * (most - len(p))] for p in part]) / steps for part in (plans, others))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """By least squares, 0 or more."""
    x, y = x - x.mean(), y - y.mean()
    return max(0.0, float((x @ y + WEIGHT * SCATTER**2 * SLOPE) / (x @ x + WEIGHT * SCATTER**2)))


def _matern(x: np.ndarray, z: np.ndarray, length: float) -> np.ndarray:
    """[n, m] covariance of smoothness 5/2."""
    apart = torch.cdist(torch.from_numpy(x), torch.from_numpy(z), compute_mode="donot_use_mm_for_euclid_dist")
    far = math.sqrt(5) / length * apart.numpy()
    found: np.ndarray = (1 + far + far**2 / 3) * np.exp(-far)
    return found


def _evidence(x: np.ndarray, y: np.ndarray, length: float, noise: float) -> float:
    """Logarithm of the likelihood, but for a constant."""
    lower = np.linalg.cholesky(_matern(x, x, length) + noise**2 * np.eye(len(x)))
    white = np.linalg.solve(lower, y)
    return float(-white @ white / 2 - np.log(np.diag(lower)).sum())
