"""Bootstrap intervals: coverage, pairs, and every kind of statistic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dittocache.evaluate.bootstrap import Interval, difference, frechet_of, interval, mean_of, psnr_of
from dittocache.evaluate.metrics import frechet_distance, moments


def width(found: Interval) -> float:
    return found.high - found.low


def test_intervals_cover_the_true_mean():
    draws = np.random.default_rng(0).normal(3, 2, size=(400, 50))
    found = [interval(mean_of(sample), 50, resamples=400, seed=s) for s, sample in enumerate(draws)]
    share = np.mean([one.low <= 3 <= one.high for one in found])
    assert 0.91 <= share <= 0.97
    # half as sure, about a third as wide
    narrow = interval(mean_of(draws[0]), 50, resamples=400, level=0.5)
    assert 0.2 < width(narrow) / width(found[0]) < 0.5


def test_the_interval_of_a_mean_has_the_textbook_width():
    values = np.random.default_rng(1).normal(size=500)
    found = interval(mean_of(values), 500, resamples=2000)
    assert found.value == pytest.approx(values.mean())
    assert width(found) == pytest.approx(2 * 1.96 * values.std() / math.sqrt(500), rel=0.08)


def test_one_seed_one_interval():
    values = np.random.default_rng(1).normal(size=30)
    assert interval(mean_of(values), 30, seed=3) == interval(mean_of(values), 30, seed=3)
    assert interval(mean_of(values), 30, seed=3) != interval(mean_of(values), 30, seed=4)


def test_equal_rows_differ_by_exactly_nothing():
    errors = torch.rand(20, generator=torch.Generator().manual_seed(0))
    features = torch.rand(20, 3, generator=torch.Generator().manual_seed(1))
    for statistic in (mean_of(errors), psnr_of(errors), frechet_of(features, features.flip(0))):
        assert difference(statistic, statistic, 20, resamples=50) == Interval(0, 0, 0)
    # two rows that equal their reference: both have infinitely many decibels
    assert difference(psnr_of(np.zeros(20)), psnr_of(np.zeros(20)), 20) == Interval(0, 0, 0)


def test_pairs_are_narrower_than_strangers():
    generator = np.random.default_rng(2)
    hard = generator.normal(size=100)  # what the pictures have in common
    a, b = (hard + 0.1 * generator.normal(size=100) for _ in range(2))
    paired = difference(mean_of(a), mean_of(b), 100)
    apart = math.hypot(width(interval(mean_of(a), 100, seed=1)), width(interval(mean_of(b), 100, seed=2)))
    assert paired.low <= paired.value <= paired.high
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert width(paired) < 0.2 * apart


def test_psnr_is_pooled_before_the_logarithm():
    errors = np.array([0.0, 0.0, 0.01, 0.03])
    found = interval(psnr_of(errors), 4)
    assert found.value == pytest.approx(20)
    assert found.low < 20
    assert found.high == math.inf  # a draw of equal pictures only: bounds are not interpolated into nonsense


def test_frechet_distance_of_partners():
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(200, 3, generator=generator)
    features = references + 0.3 + 0.1 * torch.randn(200, 3, generator=generator)
    found = interval(frechet_of(features, references), 200, resamples=200)
    assert found.value == frechet_distance(features, references)
    assert found.low < 3 * 0.3**2 < found.high
    # each picture is drawn with its partner, so what they share does not spread
    fixed = interval(frechet_of(features, moments(references)), 200, resamples=200)
    assert width(found) < 0.5 * width(fixed)


@pytest.mark.parametrize("partners", [True, False])
def test_intervals_of_frechet_distances_hold_their_value(partners):
    # with few samples every resampled distance is larger than the distance: the plain bounds would lie above it
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 16, generator=generator)
    references = features + 0.2 * torch.randn(64, 16, generator=generator)
    statistic = frechet_of(features, references if partners else moments(references))
    found = interval(statistic, 64, resamples=200)
    assert found.low < found.value < found.high
    again = np.random.default_rng(0)
    drawn = [statistic.of(again.integers(64, size=64)) for _ in range(200)]
    assert min(drawn) > found.value
    assert width(found) == pytest.approx(np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025), rel=0.15)


def test_bad_arguments():
    mean = mean_of(np.arange(5))
    with pytest.raises(ValueError, match="n must be a whole number, 2 or more; got 1"):
        interval(mean, 1)
    with pytest.raises(ValueError, match=r"between 0\.5 and 0\.999; got 95"):
        interval(mean, 5, level=95)
    with pytest.raises(ValueError, match="got 3 for 5"):
        frechet_of(torch.zeros(5, 2), torch.zeros(3, 2))
