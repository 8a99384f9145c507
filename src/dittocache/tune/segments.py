"""How far linear predictors stray between computed steps: in closed form, from inner products of uncached runs.

From a computed step a to the next one, n, the latents follow predictions that are combinations of the last computed
ones. However these are chosen, x[n] is x[a] and a combination of them; the best one, and what it misses, are least
squares, so one matrix of inner products of all latents and predictions tells it for every plan. The matrix adds up over
samples, is [2T + 1, 2T + 1] however large the model is, and needs nothing but uncached runs.
"""

from __future__ import annotations

import numpy as np
import torch

from .trajectory import Trajectories

RIDGE = 1e-9  # of the matrix's diagonal: neighbouring predictions are nearly parallel


def products(runs: Trajectories) -> np.ndarray:
    """[2T + 1, 2T + 1] inner products of latents 0..T and predictions 0..T-1, means over the samples, float64."""
    parts = torch.cat([runs.latents.flatten(1), runs.predictions.flatten(1)]).cpu().double()
    return (parts @ parts.T).numpy() / runs.latents.shape[1]


def strays(inner: np.ndarray, longest: int, own: bool = True) -> np.ndarray:
    """Squared error of x[n], sum over its values, when all steps from a on are predicted.

    Args:
        inner: as `products` gives it.
        longest: the longest segment; others are inf.
        own: the runs are those of the very steps, so that nothing is missed where nothing is predicted.

    Returns:
        [T + 1, T, T + 1] for n, a and p, the computed step before a; p = T for none, where a = 0. Predictors have three
        outputs to go on from; the one before p is taken to be as far from it as p from a.
    """
    steps = len(inner) // 2
    found = np.full((steps + 1, steps, steps + 1), np.inf)
    for a in range(steps):
        ends = np.arange(a + 1, min(steps, a + longest) + 1)
        for p in range(a) if a else [steps]:
            before = [] if p == steps else [p, max(2 * p - a, 0)]
            known = np.array([a, *(steps + 1 + k for k in dict.fromkeys([a, *before]))])
            found[ends, a, p] = _missed(inner, known, ends)
            if own:
                found[a + 1, a, p] = 0.0
    return found


def _missed(inner: np.ndarray, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Squared distance of vectors from the span of others, given all inner products."""
    between, to = inner[np.ix_(known, known)], inner[np.ix_(known, wanted)]
    factors = np.linalg.solve(between + RIDGE * np.diag(np.diag(between)), to)
    gained = 2 * (factors * to).sum(0) - np.einsum("in,ij,jn->n", factors, between, factors)
    return np.maximum(np.diag(inner)[wanted] - gained, 0)


def carried(weights: np.ndarray, gains: np.ndarray, values: int) -> np.ndarray:
    """[T + 1] mean squared error of the picture by squared stray of the latents at a step.

    What single samples show scatters from step to step, so that the logarithms are smoothed over five steps.

    Args:
        weights: [T] squared error of the picture by squared error of a step's prediction, see `errors.weights`.
        gains: [T] change of the next latents by that of the prediction.
        values: of a picture.
    """
    logs = np.log(weights[1:] / gains[1:] ** 2 / values)  # step 0 is computed: nothing strays before step 2
    smooth = [logs[max(n - 2, 0) : n + 3].mean() for n in range(len(logs))]
    return np.exp([smooth[0], smooth[0], *smooth])
