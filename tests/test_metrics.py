"""Metrics of pairs and sets against known answers."""

from __future__ import annotations

import math

import pytest
import torch

from dittocache.evaluate import metrics
from dittocache.evaluate.metrics import (
    frechet_distance,
    inception_score,
    latent_errors,
    moments,
    precision_recall,
    psnr,
    squared_errors,
    ssim,
    ssims,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- pairs ----------------------------------------------------------------------------------------------------------
def test_noise_against_noise():
    # independent uniform numbers differ by 1/6 in the mean square: 7.78 dB
    a, b = noise(200, 3, 32, 32), noise(200, 3, 32, 32, seed=1)
    errors = squared_errors(a, b)
    assert errors.shape == (200,)
    assert errors.mean().item() == pytest.approx(1 / 6, rel=5e-3)
    assert psnr(a, b) == pytest.approx(7.78, abs=0.02)


def test_every_picture_has_its_own_error():
    reference = torch.zeros(3, 1, 12, 12)
    pictures = torch.stack([torch.full((1, 12, 12), level) for level in (0.0, 0.1, 0.5)])
    assert squared_errors(pictures, reference).tolist() == pytest.approx([0, 0.01, 0.25])
    assert psnr(pictures, reference) == pytest.approx(metrics.decibels(0.26 / 3))
    assert metrics.decibels(0.0) == math.inf


def test_ssim_of_every_picture():
    pictures = noise(3, 1, 24, 24)
    other = torch.stack([pictures[0], noise(1, 24, 24, seed=1), 1 - pictures[2]])
    found = ssims(other, pictures)
    assert found.shape == (3,)
    assert found[0].item() == pytest.approx(1)
    assert abs(found[1].item()) < 0.2  # nothing in common
    assert found[2].item() < -0.5  # the negative
    assert ssims(other[1:2], pictures[1:2]).tolist() == pytest.approx([found[1].item()])
    assert ssim(other, pictures) == pytest.approx(found.mean().item())


def test_ssim_of_small_pictures_is_refused():
    with pytest.raises(ValueError, match=r"11 pixels.*\[2, 1, 10, 32\]"):
        ssims(noise(2, 1, 10, 32), noise(2, 1, 10, 32))


def test_latent_errors_are_relative():
    latents = normal(4, 2, 3, 3)
    scaled = latents * torch.tensor([1, 1.1, 0.5, 0])[:, None, None, None]
    assert latent_errors(scaled, latents).tolist() == pytest.approx([0, 0.1, 0.5, 1])


@pytest.mark.parametrize("function", [squared_errors, ssims, latent_errors])
def test_shapes_must_agree(function):
    with pytest.raises(ValueError, match=r"share a shape.*\[2, 1, 16, 16\] and \[3, 1, 16, 16\]"):
        function(noise(2, 1, 16, 16), noise(3, 1, 16, 16))


# ---- Frechet distance -----------------------------------------------------------------------------------------------
def gaussians(d: int = 4) -> tuple[metrics.Moments, metrics.Moments, float]:
    """Two Gaussians whose covariances share their axes, and the distance: means plus differences of deviations."""
    axes = torch.linalg.qr(normal(d, d))[0]
    first, second = torch.linspace(0.5, 2, d).double(), torch.linspace(3, 1, d).double()
    mean_a, mean_b = normal(d, seed=1), normal(d, seed=2)
    covariances = [axes * side.square() @ axes.T for side in (first, second)]
    exact = (mean_a - mean_b).square().sum() + (first - second).square().sum()
    return (mean_a, covariances[0]), (mean_b, covariances[1]), exact.item()


def test_frechet_distance_of_moments_in_closed_form():
    a, b, exact = gaussians()
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_of_general_covariances():
    from scipy.linalg import sqrtm

    a, b = (moments(normal(50, 5, seed=s) @ normal(5, 5, seed=s + 2)) for s in (0, 1))
    root = torch.from_numpy(sqrtm((a[1] @ b[1]).numpy()).real)
    exact = (a[0] - b[0]).square().sum() + (a[1] + b[1] - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(exact.item(), rel=1e-6)


def test_frechet_distance_of_samples_nears_that_of_the_gaussians():
    a, b, exact = gaussians()
    sides = [mean + normal(20_000, 4, seed=s) @ torch.linalg.cholesky(c).T for s, (mean, c) in enumerate((a, b), 5)]
    assert frechet_distance(*sides) == pytest.approx(exact, rel=0.02)
    assert frechet_distance(moments(sides[0]), sides[1]) == pytest.approx(frechet_distance(*sides), rel=1e-12)


def test_frechet_distance_of_identical_sets_is_zero():
    features = noise(100, 8)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, moments(features)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (torch.zeros(1, 4), r"at least 2 samples; got \[1, 4\]"),
        (torch.zeros(9, 3), "d = 3 and 4"),
        ((torch.zeros(4), torch.zeros(4)), r"a covariance \[d, d\]; got \[4\] and \[4\]"),
    ],
)
def test_frechet_distance_refuses(side, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(side, noise(9, 4))


# ---- precision and recall -------------------------------------------------------------------------------------------
def test_identical_sets_cover_each_other_and_far_ones_do_not():
    features = noise(60, 8)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features + 100, features) == (0, 0)


def test_precision_and_recall_are_not_the_same():
    # samples of one of two modes: all of them are real, half of the reality is missing
    near, far = noise(50, 4), noise(50, 4, seed=1) + 50
    precision, recall = precision_recall(noise(50, 4, seed=2) * 0.5 + 0.25, torch.cat([near, far]))
    assert precision > 0.9
    assert recall <= 0.5


def test_balls_reach_to_the_kth_neighbour():
    references = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # to the second neighbour: 3, 2, 3, 6
    features = torch.tensor([[-2.9], [-3.1], [12.9], [13.1]])
    assert precision_recall(features, references, k=2)[0] == 0.5
    assert precision_recall(features, references, k=1)[0] == 0  # 1, 1, 2, 4: none reaches out that far


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_change_the_result(chunk):
    features, references = noise(40, 3), noise(30, 3, seed=1) + 0.3
    assert precision_recall(features, references, chunk=chunk) == precision_recall(features, references)


def test_few_samples_are_refused():
    with pytest.raises(ValueError, match=r"more than k = 3 samples; got \[3, 2\] and \[9, 2\]"):
        precision_recall(noise(3, 2), noise(9, 2))


# ---- Inception score ------------------------------------------------------------------------------------------------
def test_inception_score_of_certain_and_even_is_the_number_of_classes():
    assert inception_score(torch.eye(10).repeat(50, 1), splits=5) == pytest.approx(10)


def test_inception_score_of_a_constant_is_one():
    assert inception_score(torch.tensor([[0.2, 0.8]]).repeat(40, 1), splits=4) == pytest.approx(1)


def test_inception_score_of_parts():
    # each part sees one class only, all together see two
    rows = torch.eye(2).repeat_interleave(20, 0)
    assert inception_score(rows, splits=2) == pytest.approx(1)
    assert inception_score(rows, splits=1) == pytest.approx(2)


def test_inception_score_in_closed_form():
    p = 0.9  # two kinds of rows, mirrored: exp of (log 2 - entropy)
    rows = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).repeat(8, 1)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert inception_score(rows, splits=2) == pytest.approx(2 * math.exp(-entropy))


def test_more_splits_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"splits = 4; got \[3, 2\]"):
        inception_score(torch.full((3, 2), 0.5), splits=4)
