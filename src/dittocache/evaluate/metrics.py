"""How far pictures are from their references: pure tensor functions.

Pictures are float tensors [n, channels, height, width] in [0, 1]; pairs share their first dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psnr(pictures: Tensor, references: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, from the squared error pooled over all pictures; inf for equal ones.

    Pooling first and taking the logarithm once is what makes the number honest: a mean of per-picture decibels is
    dominated by the pictures that hardly changed. Uniform noise against uniform noise is 7.8 dB.

    Args:
        pictures: [n, c, h, w] in [0, 1].
        references: the same shape.
    """
    _check_pair(pictures, references)
    error = (pictures.double() - references.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(pictures: Tensor, references: Tensor) -> float:
    """Structural similarity, mean over the pictures: 1 for equal ones (Gaussian window, sigma 1.5, data range 1).

    Args:
        pictures: [n, c, h, w] in [0, 1], at least 11 pixels high and wide.
        references: the same shape.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(pictures, references)
    return float(structural_similarity_index_measure(pictures.float(), references.float(), data_range=1.0))


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two sets of features, in float64.

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric S C2 S, with S = C1^(1/2).
    With few samples it measures mostly their number: compare rows of one size only.

    Args:
        features: [n, d], n >= 2.
        references: [m, d], m >= 2.
    """
    if features.ndim != 2 or references.ndim != 2 or features.shape[1] != references.shape[1]:
        raise ValueError(f"features are [n, d] and [m, d]; got {list(features.shape)} and {list(references.shape)}")
    if min(len(features), len(references)) < 2:
        raise ValueError("a covariance needs at least 2 samples on each side")
    a, b = features.double(), references.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's: logits [n, classes], labels int [n]."""
    return (logits.argmax(1) == labels).double().mean().item()


def _check_pair(pictures: Tensor, references: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape != references.shape:
        shapes = f"{list(pictures.shape)} and {list(references.shape)}"
        raise ValueError(f"pictures and references share a shape [n, c, h, w]; got {shapes}")
