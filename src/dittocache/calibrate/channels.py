"""The mathematics of ICC calibration (arXiv 2505.05829): channel weights, and low-rank factors of a linear layer.

A statistic is a sum over samples: add up `channel_statistic` and the number of samples over batches, in any split,
and their quotient is the mean that `channel_weights` takes. (The authors average over each batch, then over batches:
the same for batches of one size.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts import check_int, check_number

EPSILON = 1e-6  # the authors', in the statistic and in the factorisation


def channel_statistic(*x: Tensor) -> Tensor:
    """Size of every channel between 0 (the sample's smallest, up to 1e-6) and 1 (its largest), summed over the batch.

    Args:
        x: [batch, tokens, channels], a linear layer's input or output, or its change between two steps; further
            dimensions between the first and the last count as tokens. Several share one minimum and maximum, as if
            their channels stood side by side: the outputs of separate q, k and v, which the authors have in one layer.

    Returns:
        [channels], float32: the sum over samples of (v - min + 1e-6) / (max - min + 1e-6) with v = mean of |x| over
        tokens.

    Raises:
        ValueError: values that are empty, have fewer than two dimensions, or differ in batch size.
    """
    if not x or any(one.ndim < 2 or not one.numel() or len(one) != len(x[0]) for one in x):
        shapes = ", ".join(str(list(one.shape)) for one in x)
        raise ValueError(f"a channel statistic needs values [batch, tokens, channels] of one batch; got {shapes or x}")
    means = [one.detach().abs().reshape(len(one), -1, one.shape[-1]).mean(1, dtype=torch.float32) for one in x]
    v = torch.cat(means, dim=1)
    low, high = v.aminmax(dim=1, keepdim=True)
    return ((v - low + EPSILON) / (high - low + EPSILON)).sum(0)


def channel_weights(mean: Tensor, power: float = 0.5, floor_ratio: float = 1000, parts: int = 1) -> Tensor:
    """Weights from mean statistics: their power, at least the largest one over `floor_ratio`.

    Args:
        mean: [channels], mean over samples.
        parts: equal parts of the channels with a floor of their own: 3 for the outputs of a fused qkv layer.

    Returns:
        [channels].

    Raises:
        ValueError: a parameter is out of range, or the statistics are no vector of finite numbers, 0 or more.
    """
    check_number("power", power, 0)
    check_number("floor_ratio", floor_ratio, 1)
    check_int("parts", parts, 1)
    if mean.ndim != 1 or not len(mean) or len(mean) % parts or not (mean.isfinite() & (mean >= 0)).all():
        among = f", a multiple of {parts} of them" if parts > 1 else ""
        raise ValueError(f"mean must hold finite numbers [channels], 0 or more{among}; got {_describe(mean)}")
    weights = mean.view(parts, -1) ** power
    return weights.maximum(weights.amax(1, keepdim=True) / floor_ratio).flatten()


def low_rank_factors(
    weight: Tensor, left: Tensor | None, right: Tensor | None, rank: int, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """A B ~ weight, best in the norm of diag(l) (weight - A B) diag(r), where l and r are the weights + 1e-6.

    The SVD U S V^T of diag(l) weight diag(r), in float64, gives A = diag(l)^-1 U S and B = V^T diag(r)^-1.

    Args:
        weight: [out, in], of a linear layer.
        left: [out], channel weights of its output; None for ones (plain SVD).
        right: [in], channel weights of its input; None for ones.
        rank: of the factors.
        parts: equal parts of the outputs that are factorised apart: 3 for a fused qkv layer. Then A is block-diagonal
            [out, parts * rank], and B [parts * rank, in] holds the parts' factors one below the other.

    Returns:
        A [out, rank] and B [rank, in], float32, on the device of `weight`; unique up to the signs of their pairs.

    Raises:
        ValueError: the rank is above that of the layer (or its parts), or something has a wrong shape, is not finite
            or, among the channel weights, not positive.
    """
    check_int("rank", rank, 1)
    check_int("parts", parts, 1)
    if weight.ndim != 2 or not weight.numel() or len(weight) % parts or not weight.isfinite().all():
        among = f", out a multiple of {parts}" if parts > 1 else ""
        raise ValueError(f"weight must hold finite numbers [out, in]{among}; got {_describe(weight)}")
    out, width = weight.shape
    if rank > min(out // parts, width):
        size = f"{out // parts} x {width}" + (f" ({parts} parts of {out} x {width})" if parts > 1 else "")
        raise ValueError(f"rank {rank} is too large for a linear layer of {size}: {min(out // parts, width)} at most")
    matrix = weight.detach().cpu().double()  # not every device has float64
    l, r = _scale("left", left, matrix[:, 0]), _scale("right", right, matrix[0])
    a, b = [], []
    for rows, scale in zip((l[:, None] * matrix * r).chunk(parts), l.chunk(parts), strict=True):
        u, s, vt = torch.linalg.svd(rows, full_matrices=False)
        a.append(u[:, :rank] * s[:rank] / scale[:, None])
        b.append(vt[:rank] / r)
    return torch.block_diag(*a).float().to(weight.device), torch.cat(b).float().to(weight.device)


def _scale(name: str, weights: Tensor | None, like: Tensor) -> Tensor:
    """Channel weights + 1e-6 in float64, checked; ones for None."""
    if weights is None:
        return torch.ones_like(like)
    if weights.shape != like.shape or not (weights.isfinite() & (weights > 0)).all():
        raise ValueError(f"{name} must hold {len(like)} finite numbers above 0; got {_describe(weights)}")
    return weights.detach().to(like) + EPSILON


def _describe(x: Tensor) -> str:
    """Shape of a tensor and, unless it is empty, its range, in which a nan shows."""
    shape = f"shape {list(x.shape)}"
    return f"{shape}, from {float(x.amin()):.3g} to {float(x.amax()):.3g}" if x.numel() else shape
