"""Channel weights and low-rank factors: pure functions against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dittocache.calibrate.channels import channel_statistic, channel_weights, low_rank_factors

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=0):
    return randn(*shape, seed=seed).exp()


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- statistics -----------------------------------------------------------------------------------------------------
@given(sizes, sizes, st.integers(2, 9), seeds)
def test_the_statistic_is_its_formula(batch, tokens, channels, seed):
    x = randn(batch, tokens, channels, seed=seed)
    expected = torch.zeros(channels)
    for sample in x:
        v = sample.abs().mean(0)
        expected += (v - v.min() + 1e-6) / (v.max() - v.min() + 1e-6)
    assert torch.allclose(channel_statistic(x), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(2, 9), sizes, st.data(), seeds)
def test_statistics_add_up_over_any_split_of_the_batch(batch, channels, data, seed):
    x = randn(batch, 5, channels, seed=seed)
    cut = data.draw(st.integers(1, batch - 1))
    merged = channel_statistic(x[:cut]) + channel_statistic(x[cut:])
    assert torch.allclose(merged, channel_statistic(x), rtol=1e-5, atol=1e-6)


@given(st.floats(1e-3, 1e3), seeds)
def test_a_sample_s_scale_and_the_order_of_its_tokens_do_not_matter(scale, seed):
    x = randn(1, 7, 5, seed=seed)
    expected = channel_statistic(x)
    assert torch.allclose(channel_statistic(x.flip(1)), expected, atol=1e-5)
    assert torch.allclose(channel_statistic(-scale * x), expected, atol=0.02)  # 1e-6 is not scaled along


def test_every_sample_counts_the_same():
    small, large = randn(1, 7, 5), randn(1, 7, 5, seed=1)
    both = channel_statistic(torch.cat([small, 1e6 * large]))
    assert torch.allclose(both, channel_statistic(small) + channel_statistic(large), atol=1e-4)


def test_channels_of_one_size_all_count_fully():
    assert torch.equal(channel_statistic(torch.full((3, 4, 5), -2.0)), torch.full((5,), 3.0))
    assert torch.equal(channel_statistic(torch.zeros(3, 4, 5)), torch.full((5,), 3.0))
    assert torch.equal(channel_statistic(randn(2, 4, 1)), torch.full((1,), 2.0))


def test_separate_layers_share_minimum_and_maximum_as_if_they_were_fused():
    q, k, v = randn(2, 6, 4), 3 * randn(2, 6, 4, seed=1), randn(2, 6, 3, seed=2) / 3
    joint = channel_statistic(q, k, v)
    assert torch.allclose(joint, channel_statistic(torch.cat([q, k, v], dim=-1)), atol=1e-6)
    assert not torch.allclose(joint[:4], channel_statistic(q), atol=0.1)


def test_other_shapes_and_dtypes():
    x = randn(2, 3, 4, 5)
    assert torch.equal(channel_statistic(x), channel_statistic(x.flatten(1, 2)))
    assert torch.equal(channel_statistic(x[:, 0, 0]), channel_statistic(x[:, 0, :1]))
    assert channel_statistic(x.bfloat16()).dtype == torch.float32
    assert not channel_statistic(x.requires_grad_()).requires_grad


def test_values_beyond_the_range_of_float16_sums_are_added_in_float32():
    x = torch.full((1, 4096, 2), 100.0, dtype=torch.float16)
    x[..., 1] = 200.0
    assert torch.allclose(channel_statistic(x), torch.tensor([0.0, 1.0]), atol=1e-6)


@pytest.mark.parametrize("shapes", [[], [(5,)], [(0, 3, 4)], [(2, 0, 4)], [(2, 3, 4), (1, 3, 4)]], ids=str)
def test_statistics_of_nothing_are_refused(shapes):
    with pytest.raises(ValueError, match=r"^a channel statistic needs values \[batch, tokens, channels\][^\n]*$"):
        channel_statistic(*(torch.zeros(shape) for shape in shapes))


# ---- weights --------------------------------------------------------------------------------------------------------
@given(st.floats(0, 3), st.floats(1, 1e4), st.integers(1, 3), seeds)
def test_weights_are_powers_with_a_floor(power, floor_ratio, parts, seed):
    mean = positive(3, parts, 4, seed=seed)[0]
    found = channel_weights(mean.flatten(), power, floor_ratio, parts).view(parts, 4)
    for part, weights in zip(mean, found, strict=True):
        assert torch.allclose(weights, (part**power).clamp(min=float((part**power).max()) / floor_ratio))


def test_the_defaults_are_the_authors():
    assert torch.allclose(channel_weights(torch.tensor([0.0, 0.25, 1e-8, 1.0])), torch.tensor([1e-3, 0.5, 1e-3, 1.0]))


@given(st.floats(1e-3, 1e3), seeds)
def test_weights_scale_with_their_statistics(scale, seed):
    mean = positive(6, seed=seed)
    assert torch.allclose(channel_weights(scale * mean), scale**0.5 * channel_weights(mean), rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "options", "message"),
    [
        (torch.tensor([0.5, torch.nan]), {}, r"finite numbers \[channels\], 0 or more; got .* from nan to nan"),
        (torch.tensor([0.5, torch.inf]), {}, "from 0.5 to inf"),
        (torch.tensor([0.5, -0.1]), {}, "from -0.1 to 0.5"),
        (torch.ones(2, 3), {}, r"shape \[2, 3\]"),
        (torch.ones(0), {}, r"shape \[0\]$"),
        (torch.ones(4), {"parts": 3}, "a multiple of 3"),
        (torch.ones(4), {"parts": 0}, "parts must be"),
        (torch.ones(4), {"power": -1}, "power must be"),
        (torch.ones(4), {"floor_ratio": 0.5}, "floor_ratio must be"),
    ],
)
def test_bad_statistics_are_refused(mean, options, message):
    with pytest.raises(ValueError, match=message) as error:
        channel_weights(mean, **options)
    assert "\n" not in str(error.value)


# ---- factors --------------------------------------------------------------------------------------------------------
@given(sizes, sizes, st.booleans(), seeds)
def test_full_rank_is_the_layer_itself(out, width, weighted, seed):
    w = randn(out, width, seed=seed)
    left, right = (positive(out, seed=seed + 1), positive(width, seed=seed + 2)) if weighted else (None, None)
    a, b = low_rank_factors(w, left, right, min(out, width))
    assert a.shape == (out, min(out, width)) and b.shape == (min(out, width), width)
    assert a.dtype == b.dtype == torch.float32
    assert distance(a @ b, w) <= 1e-5


@given(st.integers(2, 9), st.integers(2, 9), st.data(), seeds)
def test_the_plain_svd_is_the_best_of_its_rank(out, width, data, seed):
    """Eckart and Young: what is left has the norm of the singular values cut off; no other map does better."""
    w = randn(out, width, seed=seed)
    rank = data.draw(st.integers(1, min(out, width) - 1))
    a, b = low_rank_factors(w, None, None, rank)
    left_over = float((w - a @ b).norm())
    assert left_over == pytest.approx(float(torch.linalg.svdvals(w.double())[rank:].norm()), rel=1e-4, abs=1e-5)
    other = randn(out, rank, seed=seed + 1)
    best_for_it = other @ torch.linalg.lstsq(other, w, driver="gelsd").solution
    assert float((w - best_for_it).norm()) >= left_over - 1e-5


@given(st.integers(2, 9), st.integers(2, 9), st.data(), seeds)
def test_weighted_factors_are_the_best_in_the_weighted_norm(out, width, data, seed):
    w, left, right = randn(out, width, seed=seed), positive(out, seed=seed + 1), positive(width, seed=seed + 2)
    rank = data.draw(st.integers(1, min(out, width) - 1))

    def missed(pair):
        return float(((left + 1e-6)[:, None] * (w - pair[0] @ pair[1]) * (right + 1e-6)).norm())

    weighted = missed(low_rank_factors(w, left, right, rank))
    values = torch.linalg.svdvals(left[:, None].double() * w * right)
    assert weighted == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-4)
    assert missed(low_rank_factors(w, None, None, rank)) >= weighted * (1 - 1e-4) - 1e-5


@given(st.floats(0.1, 10), st.floats(0.1, 10), seeds)
def test_only_the_ratios_of_weights_matter(one, two, seed):
    w, left, right = randn(6, 5, seed=seed), positive(6, seed=seed + 1) + 0.1, positive(5, seed=seed + 2) + 0.1
    # the gap between the singular values says how far a change of 1e-6 can turn the factors
    values = torch.linalg.svdvals(left[:, None] * w * right)
    a, b = low_rank_factors(w, left, right, 2)
    c, d = low_rank_factors(w, one * left, two * right, 2)
    assert distance(c @ d, a @ b) <= 1e-3 * float(values[0] / (values[1] - values[2]))
    ones = low_rank_factors(w, torch.full((6,), one), torch.full((5,), two), 2)
    plain = low_rank_factors(w, None, None, 2)
    gap = torch.linalg.svdvals(w)
    assert distance(ones[0] @ ones[1], plain[0] @ plain[1]) <= 1e-4 * float(gap[0] / (gap[1] - gap[2]))


def test_factors_follow_the_definition():
    w, left, right = randn(7, 5).double(), positive(7, seed=1).double(), positive(5, seed=2).double()
    l, r = torch.diag(left + 1e-6), torch.diag(right + 1e-6)
    u, s, vt = torch.linalg.svd(l @ w @ r)
    a, b = l.inverse() @ u[:, :3] @ torch.diag(s[:3]), vt[:3] @ r.inverse()
    found = low_rank_factors(w.float(), left.float(), right.float(), 3)
    signs = (found[1][:, 0] * b[:, 0]).sign()
    assert distance(found[0] * signs, a) <= 1e-5 and distance(found[1] * signs[:, None], b) <= 1e-5


@pytest.mark.parametrize("weighted", [False, True])
def test_a_fused_layer_gets_the_factors_of_its_parts(weighted):
    w = randn(12, 5)
    left, right = (positive(12, seed=1), positive(5, seed=2)) if weighted else (None, None)
    a, b = low_rank_factors(w, left, right, 2, parts=3)
    assert a.shape == (12, 6) and b.shape == (6, 5)
    for part in range(3):
        rows, columns = slice(4 * part, 4 * part + 4), slice(2 * part, 2 * part + 2)
        own = low_rank_factors(w[rows], left[rows] if weighted else None, right, 2)
        assert torch.equal(a[rows, columns], own[0]) and torch.equal(b[columns], own[1])
        assert distance((a @ b)[rows], own[0] @ own[1]) <= 1e-6
    assert int((a != 0).sum()) == 12 * 2  # nothing outside of the diagonal blocks


def test_factors_are_free_of_gradients_and_leave_the_layer_alone():
    layer, weights = torch.nn.Linear(5, 4), positive(5)
    before, kept = layer.weight.detach().clone(), weights.clone()
    a, b = low_rank_factors(layer.weight, None, weights, 2)
    assert not a.requires_grad and not b.requires_grad
    assert torch.equal(layer.weight, before) and torch.equal(weights, kept)
    assert low_rank_factors(layer.weight.bfloat16(), None, None, 2)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 5}, "rank 5 is too large for a linear layer of 6 x 4: 4 at most"),
        ({"rank": 3, "parts": 3}, "rank 3 is too large for a linear layer of 2 x 4 .3 parts of 6 x 4.: 2 at most"),
        ({"rank": 0}, "rank must be a whole number, 1 or more; got 0"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"parts": 4}, "out a multiple of 4; got shape"),
        ({"left": torch.tensor([1.0, 1, 1, 1, 1, 0])}, "left must hold 6 finite numbers above 0; got .* from 0 to 1"),
        ({"left": torch.ones(4)}, r"left must hold 6 finite numbers above 0; got shape \[4\]"),
        ({"right": torch.tensor([1.0, torch.nan, 1, 1])}, "right must hold 4 .* from nan to nan"),
        ({"right": torch.tensor([1.0, torch.inf, 1, 1])}, "right must hold 4 .* from 1 to inf"),
        ({"right": torch.tensor([1.0, -1, 1, 1])}, "right must hold 4 .* from -1 to 1"),
        ({"weight": torch.full((6, 4), torch.nan)}, "weight must hold finite numbers"),
        ({"weight": torch.ones(6)}, r"weight must hold finite numbers \[out, in\]; got shape \[6\]"),
        ({"weight": torch.ones(0, 4)}, r"got shape \[0, 4\]$"),
    ],
)
def test_bad_factors_are_refused(changes, message):
    good = {"weight": randn(6, 4), "left": torch.ones(6), "right": torch.ones(4), "rank": 2}
    with pytest.raises(ValueError, match=message) as error:
        low_rank_factors(**{**good, **changes})
    assert "\n" not in str(error.value)
