"""DPM-Solver-2 in the form that the U-ViT release samples with: singlestep, in the prediction of x0, r1 = 1/2.

The solver of second order with one intermediate point is from arXiv 2206.00927, its form in the prediction of x0 from
DPM-Solver++ (arXiv 2211.01095, 2S). Every outer step from time s down to time t evaluates the network twice: at s, and
at the mid point in lambda. Times lie in [0.001, 1]; what the network receives is 1000 times the time. The noise
schedule is computed in float32, as the release does: at t = 0.001 that shows in the fifth digit of sigma.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIRST_BETA, LAST_BETA, TRAINING_STEPS, END = 0.00085, 0.012, 1000, 0.001

Time = float | Tensor  # a number, or a tensor without dimensions


class Marginal(NamedTuple):
    """The noise level at a time: x = alpha x0 + sigma noise, lam = log(alpha / sigma); float32, without dimensions."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor


@functools.cache
def _betas() -> Tensor:
    """[1000], float64; their square roots are equally spaced."""
    return torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TRAINING_STEPS, dtype=torch.float64, device="cpu").square()


@functools.cache
def _schedule() -> tuple[Tensor, Tensor]:
    """The times j / 1000, j = 1..1000, and log(alpha) there: both [1000], float32."""
    times = torch.linspace(0, 1, TRAINING_STEPS + 1, device="cpu")[1:]
    return times, 0.5 * torch.log(1 - _betas().float()).cumsum(0)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The broken line through the points (xs, ys) at x; xs ascend."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])


def outer_times(nfe: int) -> Tensor:
    """Start and end times of the outer steps [nfe // 2 + 1], float32, equally spaced from 1 to 0.001.

    Raises:
        ValueError: fewer than two network evaluations; an odd number of them loses its last.
    """
    if not isinstance(nfe, int) or nfe < 2:
        raise ValueError(f"nfe must be a whole number of 2 or more; got {nfe!r}")
    return torch.linspace(1, END, nfe // 2 + 1, device="cpu")


def marginal(time: Time) -> Marginal:
    """alpha, sigma and lambda at a time.

    Raises:
        ValueError: the time lies outside of [0.001, 1].
    """
    time = torch.as_tensor(time, dtype=torch.float32, device="cpu")
    times, log_alphas = _schedule()
    if not times[0] <= time <= times[-1]:
        raise ValueError(f"time must lie in [{END}, 1]; got {float(time):g}")
    log_alpha = _interpolate(time, times, log_alphas)
    variance = 1 - torch.exp(2 * log_alpha)
    return Marginal(log_alpha.exp(), variance.sqrt(), log_alpha - 0.5 * variance.log())


def mid_time(s: Time, t: Time) -> Tensor:
    """The time whose lambda is half-way between those of the times s and t."""
    start, end = marginal(s).lam, marginal(t).lam
    lam = start + 0.5 * (end - start)
    log_alpha = -0.5 * torch.logaddexp(torch.zeros_like(lam), -2 * lam)
    times, log_alphas = _schedule()
    return _interpolate(log_alpha, log_alphas.flip(0), times.flip(0))


def first_update(x: Tensor, eps: Tensor, s: Time, mid: Time) -> Tensor:
    """From x at time s to x at time mid, by the noise predicted at s. All tensors have one shape."""
    start, end = marginal(s), marginal(mid)
    x0 = (x - start.sigma * eps) / start.alpha
    return end.sigma / start.sigma * x - end.alpha * torch.expm1(start.lam - end.lam) * x0


def second_update(x: Tensor, eps_start: Tensor, eps_mid: Tensor, s: Time, mid: Time, t: Time) -> Tensor:
    """From x at time s to x at time t, by the noise predicted at s and at the mid point. All tensors have one shape."""
    start, middle, end = marginal(s), marginal(mid), marginal(t)
    x0_start = (x - start.sigma * eps_start) / start.alpha
    x0_mid = (first_update(x, eps_start, s, mid) - middle.sigma * eps_mid) / middle.alpha
    factor = end.alpha * torch.expm1(start.lam - end.lam)
    # x0 at the start, and its slope over half of the step, 1 / (2 r1) = 1
    return end.sigma / start.sigma * x - factor * x0_start - factor * (x0_mid - x0_start)


def add_noise(x_start: Tensor, noise: Tensor, index: int) -> Tensor:
    """Noisy latents of a training timestep n: their alpha squared is the product of the first n factors 1 - beta.

    L2C's training begins with these, n being 1000 times the start of an outer step, rounded.

    Args:
        x_start, noise: clean latents and normal noise, of one shape.
        index: n, 1 to 1000.

    Raises:
        ValueError: the index is not one of these.
    """
    if not isinstance(index, int) or not 1 <= index <= TRAINING_STEPS:
        raise ValueError(f"index must be a whole number from 1 to {TRAINING_STEPS}; got {index!r}")
    kept = float((1 - _betas()[:index]).prod())
    return kept**0.5 * x_start + (1 - kept) ** 0.5 * noise


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    nfe: int,
    *,
    null_label: int,
    scale: float = 0.4,
    before_evaluation: Callable[[int], Any] | None = None,
) -> Tensor:
    """Latents at time 0.001, without a final denoising: [batch, channels, height, width].

    Every evaluation is two network calls on the same x, first with the labels, then with the null label: a cache counts
    them as guidance branches 0 and 1. `with cache.run(2 * (nfe // 2)): sample(..., before_evaluation=cache.step)`.

    Args:
        model: `model(x, timesteps, y)` predicts the noise; timesteps are float32 [batch], 1000 at first.
        x: noise [batch, channels, height, width].
        y: labels [batch], int64.
        nfe: network evaluations, two an outer step; an odd number loses its last.
        null_label: the label of the unconditional calls.
        scale: s in eps = cond + s (cond - uncond); U-ViT's 0.4 is 1.4 where 1 means no guidance.
        before_evaluation: called with k = 0..2 * (nfe // 2) - 1 before evaluation k: the start of an outer step if k is
            even, its mid point if odd.

    Raises:
        ValueError: nfe is less than 2.
    """
    times, null = outer_times(nfe), torch.full_like(y, null_label)

    def evaluate(k: int, x: Tensor, time: Tensor) -> Tensor:
        if before_evaluation is not None:
            before_evaluation(k)
        timesteps = (1000 * time).to(x.device).expand(len(x))
        cond = model(x, timesteps, y)
        return cond + scale * (cond - model(x, timesteps, null))

    for r, (s, t) in enumerate(itertools.pairwise(times)):
        mid = mid_time(s, t)
        eps_start = evaluate(2 * r, x, s)
        eps_mid = evaluate(2 * r + 1, first_update(x, eps_start, s, mid), mid)
        x = second_update(x, eps_start, eps_mid, s, mid, t)
    return x
