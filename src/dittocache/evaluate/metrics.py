"""How far pictures are from their references, one by one and as sets: pure tensor functions.

Pictures are float tensors [n, channels, height, width] in [0, 1], videos [n, frames, channels, height, width]; pairs
share their first dimension. Features are tensors [n, d].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINDOW = 11  # pixels a side of the window of SSIM

Moments = tuple[Tensor, Tensor]  # mean [d] and covariance [d, d], float64


# ---- pairs ----------------------------------------------------------------------------------------------------------
def squared_errors(pictures: Tensor, references: Tensor) -> Tensor:
    """Mean squared error of every picture or video, float64 [n].

    Args:
        pictures: [n, c, h, w] or [n, frames, c, h, w].
        references: the same shape.
    """
    _check_pair(pictures, references)
    return (pictures.double() - references.double()).square().flatten(1).mean(1)


def decibels(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pictures in [0, 1]; inf for 0."""
    return math.inf if error == 0 else -10 * math.log10(error)


def psnr(pictures: Tensor, references: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, from the squared error pooled over all pictures; inf for equal ones.

    Pooling first and taking the logarithm once is what makes the number honest: a mean of per-picture decibels is
    dominated by the pictures that hardly changed. Uniform noise against uniform noise is 7.8 dB.

    Args:
        pictures: [n, c, h, w] in [0, 1].
        references: the same shape.
    """
    return decibels(squared_errors(pictures, references).mean().item())


def ssims(pictures: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of every picture, float64 [n]: 1 for equal ones (Gaussian window, sigma 1.5, range 1).

    Of a video, the mean over its frames.

    Args:
        pictures: [n, c, h, w] or [n, frames, c, h, w] in [0, 1], at least 11 pixels high and wide.
        references: the same shape.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(pictures, references)
    if min(pictures.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of {WINDOW} pixels a side or more; got {list(pictures.shape)}")
    # one by one: torchmetrics drops the dimension of a single picture, and all at once takes five copies of the set
    pairs = zip(_frames(pictures), _frames(references), strict=True)
    return torch.stack([structural_similarity_index_measure(*pair, data_range=1.0) for pair in pairs]).double()


def _frames(pictures: Tensor) -> list[Tensor]:
    """[frames, c, h, w] of every picture or video."""
    return [one.flatten(0, -4) for one in pictures.float().split(1)]


def ssim(pictures: Tensor, references: Tensor) -> float:
    """Structural similarity, mean over the pictures: see `ssims`."""
    return ssims(pictures, references).mean().item()


def latent_errors(latents: Tensor, references: Tensor) -> Tensor:
    """Relative error |x - r| / |r| of every latent (Euclidean norms), float64 [n]; inf where only r is 0.

    Args:
        latents: [n, ...].
        references: the same shape.
    """
    if latents.ndim < 2 or latents.shape != references.shape:
        shapes = f"{list(latents.shape)} and {list(references.shape)}"
        raise ValueError(f"latents and references share a shape [n, ...]; got {shapes}")
    x, r = latents.double().flatten(1), references.double().flatten(1)
    return (x - r).norm(dim=1) / r.norm(dim=1)


# ---- sets -----------------------------------------------------------------------------------------------------------
def moments(features: Tensor) -> Moments:
    """Mean [d] and covariance [d, d] (divided by n - 1) of features [n, d], n >= 2, in float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features [n, d] of at least 2 samples; got {list(features.shape)}")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(features: Tensor | Moments, references: Tensor | Moments) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two sets of features, in float64.

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric S C2 S, with S = C1^(1/2).
    With few samples it measures mostly their number: compare rows of one size only. (Heusel et al. 2017, eq. 6)

    Args:
        features: [n, d], n >= 2, or their (mean [d], covariance [d, d]).
        references: [m, d], m >= 2, or their (mean, covariance).
    """
    (mean_a, cov_a), (mean_b, cov_b) = (_moments(side) for side in (features, references))
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"features are [n, d] and [m, d]; got d = {len(mean_a)} and {len(mean_b)}")
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def precision_recall(features: Tensor, references: Tensor, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 to 3).

    A set covers the balls around its points that reach to their k-th neighbour. Precision is the share of the features
    that the references cover, recall the share of the references that the features cover.

    Args:
        features: [n, d], n > k.
        references: [m, d], m > k.
        k: neighbours that a ball reaches to.
        chunk: rows of the matrix of distances at once; memory is chunk * max(n, m) numbers.
    """
    for side in (features, references):
        if side.ndim != 2 or side.shape[1] != features.shape[1] or len(side) <= k:
            shapes = f"{list(features.shape)} and {list(references.shape)}"
            raise ValueError(f"features are [n, d] and [m, d] with more than k = {k} samples; got {shapes}")
    # Distances are taken through a matrix product: around the mean it loses the fewest digits.
    centre = references.mean(0)
    features, references = features - centre, references - centre
    return _covered(features, references, k, chunk), _covered(references, features, k, chunk)


def inception_score(probabilities: Tensor, splits: int = 10) -> float:
    """Inception score, exp of the mean KL(p(y|x) | p(y)), mean over consecutive parts (Salimans et al. 2016).

    1 if all rows are alike; the number of classes if rows are certain and spread evenly over the classes.

    Args:
        probabilities: [n, classes], rows add up to 1.
        splits: parts of (nearly) equal size, at most n.
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        shape = list(probabilities.shape)
        raise ValueError(f"probabilities are [n, classes] with n of at least splits = {splits}; got {shape}")
    parts = probabilities.double().tensor_split(splits)
    return sum(_exp_divergence(part) for part in parts) / splits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's: logits [n, classes], labels int [n]."""
    return (logits.argmax(1) == labels).double().mean().item()


def _moments(side: Tensor | Moments) -> Moments:
    if isinstance(side, Tensor):
        return moments(side)
    mean, covariance = side
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise ValueError(f"a mean is [d], a covariance [d, d]; got {shapes}")
    return mean.double(), covariance.double()


def _covered(points: Tensor, others: Tensor, k: int, chunk: int) -> float:
    """Share of the points that lie in a ball of the others."""
    # the nearest of a point's own set is the point itself
    radii = torch.cat([torch.cdist(part, others).kthvalue(k + 1).values for part in others.split(chunk)])
    inside = [(torch.cdist(part, others) <= radii).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def _exp_divergence(probabilities: Tensor) -> float:
    """exp of the mean KL divergence of the rows from their mean."""
    marginal = probabilities.mean(0)
    # p log p and p log q are 0 where p is 0
    divergence = torch.xlogy(probabilities, probabilities).sum(1) - torch.xlogy(probabilities, marginal).sum(1)
    return divergence.mean().exp().item()


def _check_pair(pictures: Tensor, references: Tensor) -> None:
    if pictures.ndim not in (4, 5) or pictures.shape != references.shape:
        shapes = f"{list(pictures.shape)} and {list(references.shape)}"
        raise ValueError(f"pictures and references share a shape [n, c, h, w] or [n, frames, c, h, w]; got {shapes}")
