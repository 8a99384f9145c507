"""Scores, selections, ratios and schedules: pure functions against the formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dittocache.plan import COMPUTE, PARTIAL, REUSE, Site
from dittocache.when import Counter, DualInterval, Every, ModuleIntervals, SoftInterval
from dittocache.when.soft import AGGRESSIVE, CONSERVATIVE, FULL
from dittocache.which import (
    SELECTORS,
    Attended,
    AttentionReceived,
    Compress,
    RandomTokens,
    Similarity,
    Straight,
    TokenNorm,
    ValueNorm,
)
from dittocache.which.ratios import SCHEDULES, factor_of, ratio_at, token_count
from dittocache.which.scores import (
    attention_received,
    cross_attention_entropy,
    entropy_rows,
    normalize,
    select,
    spatial_bonus,
    value_norms,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(query, key, value=None):
    return Attended(query, key, key if value is None else value, 0.5)


# ---- attention received ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 29, 30, 31, 1024])
@pytest.mark.parametrize("queries", [30, 12])
def test_attention_received_in_chunks_is_the_column_sum_of_the_map(chunk, queries):
    q, k = 2 * randn(2, 3, queries, 8), 2 * randn(2, 3, 30, 8, seed=1)
    explicit = torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q, k) * 0.3, dim=-1).mean(1).sum(1)
    got = attention_received(q, k, 0.3, chunk)
    assert torch.allclose(got, explicit, atol=1e-5) and got.dtype == torch.float32
    assert torch.allclose(got.sum(1), torch.tensor(float(queries)))


@pytest.mark.parametrize("rows", [1, 30])
def test_attention_received_with_a_mask(rows):
    q, k = randn(2, 3, 30, 8), randn(2, 3, 30, 8, seed=1)
    mask = torch.where(randn(2, 1, rows, 30, seed=2) > 0.5, -1e4, 0.0)
    explicit = torch.softmax(q @ k.transpose(-2, -1) * 0.3 + mask, dim=-1).mean(1).sum(1)
    assert torch.allclose(attention_received(q, k, 0.3, 7, mask), explicit, atol=1e-5)


def test_attention_received_in_half_precision_sums_in_float32():
    q, k = randn(1, 2, 300, 8).bfloat16(), randn(1, 2, 300, 8, seed=1).bfloat16()
    explicit = torch.softmax(q.float() @ k.float().transpose(-2, -1) * 0.3, dim=-1).mean(1).sum(1)
    got = attention_received(q, k, 0.3, 64)
    assert got.dtype == torch.float32 and torch.allclose(got, explicit, rtol=0.02)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("tokens", [512, 4096])
def test_attention_received_makes_no_full_map(tokens):
    batch, heads, chunk = 1, 2, 32
    with Largest() as largest:
        attention_received(randn(batch, heads, tokens, 4), randn(batch, heads, tokens, 4), 0.5, chunk)
    assert largest.numel <= batch * heads * tokens * max(chunk, 4)


def test_by_default_memory_grows_with_the_tokens_not_their_square():
    sizes = {}
    for tokens in (2048, 4096):
        with Largest() as largest:
            AttentionReceived().observe(attended(randn(1, 1, tokens, 4), randn(1, 1, tokens, 4)), 1)
        sizes[tokens] = largest.numel
    assert sizes[4096] <= 2 * sizes[2048]


# ---- other scores ---------------------------------------------------------------------------------------------------
def test_value_norms_prefer_small_values():
    v = randn(2, 3, 10, 4)
    expected = [[sum(1 - float(v[b, h, n].norm()) for h in range(3)) for n in range(10)] for b in range(2)]
    observed = ValueNorm().observe(attended(v, v, v), 1)
    assert torch.allclose(observed, torch.tensor(expected), atol=1e-5)
    assert torch.equal(value_norms(v.norm(dim=-1)), observed)


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    cell=st.integers(1, 3),
    bonus=st.floats(0, 2),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
)
def test_spatial_bonus_equals_a_naive_loop(rows, columns, cell, bonus, seed, batch):
    """One winner in every cell of cell x cell tokens; negative winners become smaller, as in the authors' code."""
    height, width = rows * cell, columns * cell
    score = randn(batch, height * width, seed=seed)
    expected = score.clone()
    for b in range(batch):
        for top in range(0, height, cell):
            for left in range(0, width, cell):
                members = [(top + y) * width + left + x for y in range(cell) for x in range(cell)]
                winner = max(members, key=lambda n: float(score[b, n]))
                expected[b, winner] = score[b, winner] * (1 + bonus)
    before = score.clone()
    assert torch.allclose(spatial_bonus(score, (height, width), cell, bonus), expected)
    assert torch.equal(score, before)


def test_entropy_of_cross_attention():
    """ToCa s2: the halves are averaged column by column; the normalised 1 + entropy serves both."""
    maps = torch.softmax(2 * randn(4, 6, 5), -1)
    expected = []
    for n in range(2):
        mean = 0.5 * maps[n] + 0.5 * maps[n + 2]
        entropy = torch.tensor([-sum(float(m) * math.log(float(m) + 1e-7) for m in row) for row in mean])
        expected.append((1 + entropy) / (1 + entropy).norm())
    got = cross_attention_entropy(maps)
    assert torch.allclose(got, torch.stack(expected).repeat(2, 1), atol=1e-5)


def test_entropy_of_rows_with_texts_of_their_own_is_that_of_texts_side_by_side():
    maps = torch.softmax(2 * randn(4, 6, 5), -1)
    wide = torch.zeros(4, 6, 20)
    for row in range(4):
        wide[row, :, 5 * row : 5 * row + 5] = maps[row]
    rows = entropy_rows(maps, 2)
    assert torch.allclose(normalize(1 + rows[:2] + rows[2:]), cross_attention_entropy(wide)[:2], atol=1e-5)


@given(tokens=st.integers(1, 60), kinds=st.integers(1, 4), seed=st.integers(0, 999))
def test_selection_takes_the_best_and_is_stable_in_ties(tokens, kinds, seed):
    score = torch.randint(kinds, (2, tokens), generator=torch.Generator().manual_seed(seed)).float()
    for count in {0, 1, tokens // 2, tokens}:
        got = select(score, count)
        assert got.shape == (2, count)
        for b in range(2):
            assert got[b].tolist() == sorted(range(tokens), key=lambda n: (-float(score[b, n]), n))[:count]


def test_base_scores_of_the_selectors():
    x, held, generator = randn(4, 10, 6), randn(4, 10, 6, seed=1), torch.Generator().manual_seed(3)
    cosine = (x * held).sum(-1) / (x.norm(dim=-1) * held.norm(dim=-1))
    assert torch.allclose(Similarity().base(None, x, held, 1, generator), 1 - cosine, atol=1e-5)
    assert torch.allclose(TokenNorm().base(None, x, held, 1, generator), x.norm(dim=-1))
    assert torch.equal(Straight().base(None, x, held, 1, generator), torch.ones(4, 10))
    draws = RandomTokens().base(None, x, held, 2, generator)
    assert torch.equal(draws[:2], draws[2:]) and not torch.equal(draws[0], draws[1])
    assert draws.min() >= 0 and draws.max() < 1
    assert not torch.equal(RandomTokens().base(None, x, held, 2, generator), draws)
    odd = RandomTokens().base(None, x[:3], held[:3], 1, generator)
    assert odd.shape == (3, 10)
    q = attended(randn(1, 2, 10, 4), randn(1, 2, 10, 4, seed=1))
    received = attention_received(q.query, q.key, 0.5)
    noise = RandomTokens().base(None, x[:1], held[:1], 1, torch.Generator().manual_seed(4))
    compress = Compress()
    got = compress.base(compress.observe(q, 1), x[:1], held[:1], 1, torch.Generator().manual_seed(4))
    assert torch.allclose(got, 0.5 * noise + 0.5 * received / received.max(), atol=1e-6)


def test_score_adds_age_over_the_base_interval_then_multiplies_the_bonus():
    base, ages = randn(1, 16).abs(), torch.randint(5, (1, 16), generator=torch.Generator().manual_seed(0)).float()
    which = AttentionReceived(interval=3, soft_weight=0.25, spatial_bonus=0.6, spatial_grid=2)
    summed = base / base.norm() + 0.25 * ages / 3
    assert torch.allclose(which.score(base, ages, None, 1), summed)
    assert torch.allclose(which.score(base, ages, (4, 4), 1), spatial_bonus(summed, (4, 4), 2, 0.6))
    plain = AttentionReceived(soft_weight=0.0, spatial_bonus=None)
    assert torch.allclose(plain.score(base, ages, (4, 4), 1), normalize(base))


def test_shared_halves_select_the_same_tokens():
    base, ages = randn(4, 16).abs(), torch.zeros(4, 16)
    shared = ValueNorm(share_guidance_indices=True, spatial_bonus=None).score(base, ages, None, 2)
    assert torch.equal(shared[:2], shared[2:])
    assert torch.allclose(shared[:2], normalize((base[:2] + base[2:]) / 2))
    apart = ValueNorm(spatial_bonus=None).score(base, ages, None, 2)
    assert not torch.equal(apart[:2], apart[2:])


# ---- how many -------------------------------------------------------------------------------------------------------
@given(ratio=st.floats(-2, 3), tokens=st.integers(0, 5000))
def test_token_count_is_cut_off_in_float32(ratio, tokens):
    clamped = min(max(np.float32(ratio), np.float32(0)), np.float32(1))
    expected = int(np.float32(clamped * np.float32(tokens)))
    assert token_count(ratio, tokens) == expected and 0 <= expected <= tokens


@pytest.mark.parametrize(
    ("ratio", "tokens", "count"),
    [(0.07, 256, 17), (0.29, 100, 29), (0.57, 100, 57), (1.0, 256, 256), (-0.1, 9, 0), (0.0039, 256, 0), (5, 7, 7)],
)
def test_token_count_facts(ratio, tokens, count):
    """0.29 * 100 and 0.57 * 100 are 28.999... and 56.99... in float64, where 28 and 56 would be left."""
    assert token_count(ratio, tokens) == count


def spec_ratio(schedule, r, i, k, t, l, d, n, kind):
    """specs/toca.md, sections 2, 3 and 5, written out."""
    mlp = 1 + 0.6 * 2.5
    return {
        "ddim50": r * mlp * (1 - 0.2 + 0.4 * l / d) * (1 + 2.0 - 4.0 * i / t),
        "ddpm250": r * mlp * (1 + 0.8 - 1.6 * l / d) * (1 + 0.4 - 0.8 * i / t),
        "linear-layerwise": r * mlp * (1 + 0.8 - 1.6 * l / d) * (1 + 0.4 - 0.8 * i / t),
        "constant": r,
        "linear": r * (1.9 - 1.8 * i / t),
        "exp": r * 0.9 ** (i / t),
        "linear-mode": r * (1.9 - 1.8 * i / t + 0.1 * ((i % n) / n - 0.5)),
        "layerwise": r * (1.9 - 1.8 * l / d),
        "pixart": r * (1.9 - 1.8 * k / t) * (1.6 - 1.2 * l / d) * {"cross-attention": 0.6, "feed-forward": 1.6}[kind],
        "stdit3": r * {"cross-attention": 1 - 0.67 * 1.5, "feed-forward": 1 + 0.33 * 1.5}[kind],
        "flux": r * (1.5 - l / d) * 1.6,
    }[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    ratio=st.floats(0, 1),
    steps=st.integers(1, 250),
    position=st.floats(0, 0.999),
    depth=st.integers(2, 38),
    level=st.floats(0, 0.999),
    interval=st.integers(1, 7),
    cross=st.booleans(),
)
def test_ratios_equal_the_formulas_of_the_spec(schedule, ratio, steps, position, depth, level, interval, cross):
    k, l = int(position * steps), int(level * depth)
    kind = "cross-attention" if cross and schedule in ("pixart", "stdit3") else "feed-forward"
    expected = spec_ratio(schedule, ratio, steps - 1 - k, k, steps, l, depth - 1, interval, kind)
    factor = 1.6 if schedule == "flux" else factor_of(None, schedule, kind)
    got = ratio_at(schedule, ratio, factor, k, steps, l, depth - 1, interval)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_selectors_count_by_schedule_site_and_step():
    site = Site("b.2.ff", "feed-forward", "b", 2, 6, 2, True)
    which = AttentionReceived(ratio=0.07, ratio_schedule="ddim50")
    for k in range(20):
        expected = token_count(spec_ratio("ddim50", 0.07, 19 - k, k, 20, 2, 5, 3, "feed-forward"), 256)
        assert which.count(site, k, 20, 256) == expected
    # ddim50: nothing at all in the first quarter
    assert [k for k in range(20) if which.count(site, k, 20, 256) == 0] == [0, 1, 2, 3, 4]
    literal = AttentionReceived(ratio=0.07, layer_divisor=27, module_ratio_factor=1.0)
    assert literal.count(site, 19, 20, 256) == token_count(0.07 * (0.8 + 0.4 * 2 / 27) * 3.0, 256)


@pytest.mark.parametrize("index", range(50))
def test_ddim50_computes_nothing_in_the_first_quarter(index):
    """specs/toca.md: the step factor 3 - 4 i/T is <= 0 for i >= 0.75 T."""
    zero = ratio_at("ddim50", 0.07, 2.5, 49 - index, 50, 3, 5, 3) <= 0
    assert zero == (index >= 37.5)


def test_selectors_by_name():
    known = {
        "attention",
        "value-norm",
        "cross-attention-entropy",
        "random",
        "similarity",
        "norm",
        "compress",
        "straight",
        "large-value-norm",
        "key-norm",
    }
    assert set(SELECTORS) == known
    for name, cls in SELECTORS.items():
        assert cls.name == name


# ---- schedules: facts of the specs ----------------------------------------------------------------------------------
def sites(depth=6):
    kinds = ("attention", "feed-forward")
    out = [
        Site(f"b.{l}.{kind}", kind, "b", l, depth, l, kind == "feed-forward") for l in range(depth) for kind in kinds
    ]
    return [*out, Site("b", "stack", "b", depth - 1, depth, depth - 1)]


@pytest.mark.parametrize(
    ("steps", "interval", "expected"), [(20, 3, {19, 18, 15, 12, 9, 6, 3, 0}), (20, 5, {19, 15, 10, 5, 0})]
)
def test_fora_facts(steps, interval, expected):
    table = Every(interval).table(steps, sites())
    assert {steps - 1 - k for k in np.flatnonzero(table[:, 0] == COMPUTE)} == expected
    assert (table == table[:, :1]).all() and set(np.unique(table)) == {COMPUTE, REUSE}


def test_fora_anchors():
    end, start = Every(3).table(250, sites())[:, 0], Every(3, "start").table(250, sites())[:, 0]
    assert end[0] == COMPUTE and (249 % 3) == 0 and end.sum() == 84
    assert {k for k in range(250) if start[k]} == set(range(0, 250, 3))
    shifted = Every(3).table(20, sites())[:, 0], Every(3, "start").table(20, sites())[:, 0]
    assert not np.array_equal(*shifted)


@given(steps=st.integers(1, 300), interval=st.integers(1, 40))
def test_fora_rule(steps, interval):
    table = Every(interval).table(steps, sites(1))
    for k in range(steps):
        i = steps - 1 - k
        assert (table[k, 0] == COMPUTE) == (i == steps - 1 or i % interval == 0)


def counts(schedule, steps=50, depth=28):
    """Number of steps of every pair (kind of block 0, kind of the others)."""
    kinds, _ = schedule.kinds(steps, depth)
    assert (kinds[:, 1:] == kinds[:, 1:2]).all()
    out: dict[tuple[int, int], list[int]] = {}
    for k in range(steps):
        out.setdefault((int(kinds[k, 0]), int(kinds[k, 1])), []).append(steps - 1 - k)
    return out


def test_toca_facts_ddim50():
    """specs/toca.md: DDIM-50 N=3: 18 full steps with the per-block quirk (mixed at i = 45 and 32), 20 without."""
    quirk = counts(SoftInterval(3))
    assert len(quirk[FULL, FULL]) == 18 and quirk[FULL, CONSERVATIVE] == [45, 32]
    assert len(counts(SoftInterval(3, per_block_kind=False))[FULL, FULL]) == 20


def test_toca_facts_ddpm250():
    assert counts(SoftInterval(4), 250)[FULL, CONSERVATIVE] == [245, 155]


def test_toca_facts_pixart():
    """T=20: N=3 full 0,6,9,12,15,18, mixed 4; N=4 full 0,8,12,16, mixed 5; N=5 mixed 6; R=0, N=3: 0,3,6,..."""

    def up(interval, warp=0.2):
        found = counts(SoftInterval(interval, warp, None, direction="up"), 20)
        return tuple([19 - i for i in found.get(key, [])] for key in ((FULL, FULL), (FULL, CONSERVATIVE)))

    assert up(3) == ([0, 6, 9, 12, 15, 18], [4])
    assert up(4) == ([0, 8, 12, 16], [5])
    assert up(5)[1] == [6]
    assert up(3, 0.0) == ([0, 3, 6, 9, 12, 15, 18], [])


def test_toca_facts_flux():
    """T=50: N=4 full 0,1,2,6,10,...,46 (14), N=5: 12, N=6: 10; R=0: only step 0 forced (N=3: 17)."""

    def full(*args):
        return np.flatnonzero(Counter(*args).table(50, sites())[:, 0] == COMPUTE).tolist()

    assert full(4) == [0, 1, 2, *range(6, 47, 4)] and len(full(4)) == 14
    assert (len(full(5)), len(full(6)), len(full(3, 1))) == (12, 10, 17)


def test_toca_facts_open_sora():
    """T=30: attention and MLP full 12 times, cross-attention 7 times; step 3 is full for the first two only."""
    kinds = ["attention", "feed-forward", "cross-attention"]
    columns = [Site(k, k, "b", 0, 1, 0) for k in kinds]
    table = ModuleIntervals().table(30, columns)
    assert [(table[:, j] == COMPUTE).sum() for j in range(3)] == [12, 12, 7]
    assert table[3].tolist() == [COMPUTE, COMPUTE, PARTIAL]


def test_toca_intervals():
    """P = rint(N / (1 + a - 2 a i/T)), 2 in the window: about N/0.6 at the start, N/1.4 at the end, half to even."""
    when = SoftInterval(3)
    assert when.interval_at(49, 50) == 5 and when.interval_at(0, 50) == 2
    assert [when.interval_at(i, 50) for i in (9, 10, 19, 20)] == [2, 2, 2, 3]
    flat = SoftInterval(3, warp=0.0, sensitive_window=None)
    assert {flat.interval_at(i, 50) for i in range(50)} == {3}
    half = SoftInterval(5, warp=0.5, sensitive_window=None)
    assert half.interval_at(12, 12) == 10  # i/T = 1: 5 / 0.5


def test_duca_facts_ddim50():
    """specs/duca.md: DDIM-50 N=3: 18 full, 22 partial, 8 aggressive, 2 mixed (45 full/partial, 32 full/aggressive)."""
    found = counts(DualInterval(3))
    sizes = {key: len(value) for key, value in found.items()}
    assert sizes == {(FULL, FULL): 18, (1, 1): 22, (2, 2): 8, (FULL, CONSERVATIVE): 1, (FULL, AGGRESSIVE): 1}
    assert found[FULL, CONSERVATIVE] == [45] and found[FULL, AGGRESSIVE] == [32]
    four = {key: len(value) for key, value in counts(DualInterval(4)).items()}
    assert (four[FULL, FULL], four[1, 1], four[2, 2]) == (14, 22, 11) and sum(four.values()) == 50


def test_duca_facts_pixart():
    """a = 0, so P = N: full / partial / aggressive in turn; the step after a full one is always partial."""
    kinds, _ = DualInterval(3, 0.0, None, direction="up").kinds(20, 28)
    assert (kinds == kinds[:, :1]).all() and kinds[:6, 0].tolist() == [FULL, CONSERVATIVE, AGGRESSIVE] * 2


def test_duca_descending_the_step_before_a_full_one_is_partial():
    for interval in range(2, 8):
        kinds, _ = DualInterval(interval, per_block_kind=False).kinds(50, 1)
        for k in range(1, 50):
            if kinds[k, 0] == FULL and kinds[k - 1, 0] != FULL:
                assert kinds[k - 1, 0] == CONSERVATIVE


def test_duca_skips_the_stack_where_the_last_block_is_aggressive():
    columns = sites()
    table = DualInterval(3).table(50, columns)
    kinds, _ = DualInterval(3).kinds(50, 6)
    assert ((table[:, -1] == REUSE) == (kinds[:, -1] == AGGRESSIVE)).all()
    assert table[49 - 32, 0] == COMPUTE and table[49 - 32, -1] == REUSE  # i = 32: block 0 is refreshed all the same


@given(
    steps=st.integers(1, 120),
    interval=st.integers(1, 12),
    warp=st.floats(0, 0.95),
    dual=st.booleans(),
    window=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda w: tuple(sorted(w))),
    once=st.booleans(),
    direction=st.sampled_from(["up", "down"]),
)
def test_every_soft_schedule_is_a_proper_table(steps, interval, warp, dual, window, once, direction):
    when = (DualInterval if dual else SoftInterval)(interval, warp, window, not once, direction)
    table = when.table(steps, sites(3))
    assert table.shape == (steps, 7) and set(np.unique(table)) <= {COMPUTE, PARTIAL, REUSE}
    assert (table[0] == COMPUTE).all()
