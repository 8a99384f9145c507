"""TaylorSeer's forecasts, and the schedules of TaylorSeer, PAB and MagCache; also against diffusers' own hooks."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from math import factorial

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from diffusers.hooks import MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from test_per_sample import InputChange, drift, outputs
from test_per_sample import model as small_dit  # noqa: F401  a fixture

import dittocache
from dittocache import Recipe, recipe
from dittocache.calibrate import Setup, calibrate
from dittocache.calibrate.base import Recorder, Seen
from dittocache.calibrate.magcache import CalibrateMagCache, magnitudes
from dittocache.fill import At, Entry, Taylor
from dittocache.fill.taylor import coefficients
from dittocache.plan import COMPUTE, REUSE, Site
from dittocache.samples import Samples
from dittocache.when import Broadcast, Counter, RatioBudget, Warmup

SITE = Site("blocks.0.attn", "attention", "blocks", 0, 1, 0)
RATIOS = (1.0, 1.04, 0.97, 1.02, 0.96)
TIMES = tuple(999 - 999 * k // 10 for k in range(10))


def full(when, steps=20):
    return [k for k, share in enumerate(when.table(steps, [SITE])[:, 0]) if share == COMPUTE]


# ---- the series -----------------------------------------------------------------------------------------------------
def ladder(steps, values, at_step, order, start=0):
    """The authors' rule word for word: `steps` rising, one value each; a difference is formed after step `start`."""
    rungs, last = [], None
    for k, value in zip(steps, values, strict=True):
        new = [value]
        if k > start:
            for j in range(min(order, len(rungs))):
                new.append((new[j] - rungs[j]) / (k - last))
        rungs, last = new, k
    d = at_step - last
    return sum(rung * d**j / factorial(j) for j, rung in enumerate(rungs))


def forecast(steps, values, at_step, fill):
    """The fill itself, shown one output after another."""
    entry = Entry()
    for k, value in zip(steps, values, strict=True):
        fill.keep(entry, (value,), At(k, 50, SITE))
    return fill.fill(entry, At(at_step, 50, SITE))[0]


@pytest.mark.parametrize("order", range(6))
def test_factors_are_the_ladder_on_any_spacing(order):
    generator = np.random.default_rng(order)
    for _ in range(20):
        steps = np.cumsum(generator.integers(1, 7, size=generator.integers(1, 8))).tolist()
        values = generator.normal(size=len(steps))
        at_step = steps[-1] + int(generator.integers(1, 9))
        found = coefficients(steps[::-1], at_step, order)
        assert np.dot(found, values[::-1]) == pytest.approx(ladder(steps, values, at_step, order), rel=1e-9, abs=1e-9)
        assert sum(found) == pytest.approx(1.0) and not any(found[order + 1 :])


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_fill_is_the_ladder(order, start):
    """With the first steps adjacent and an interval after them, as schedules have it; float64, from one output on."""
    steps, generator = [0, 1, 2, 6, 10, 14], torch.Generator().manual_seed(order)
    values = torch.randn(6, 2, 5, 3, generator=generator, dtype=torch.float64)
    for count in range(1, 7):
        for at_step in range(steps[count - 1] + 1, steps[count - 1] + 5):
            found = forecast(steps[:count], values[:count], at_step, Taylor(order, start))
            expected = ladder(steps[:count], values[:count], at_step, order, start)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("h", [1, 3, 4])
def test_closed_forms(h):
    """Lines are continued exactly. Squares are short by h d: the first difference lags behind the slope."""
    steps = [2 * h, 3 * h, 4 * h]
    for order in (1, 2, 3):
        line = torch.tensor([[[5.0 - 3 * k]] for k in steps], dtype=torch.float64)
        for d in range(1, 5):
            assert forecast(steps, line, steps[-1] + d, Taylor(order)).item() == pytest.approx(5 - 3 * (steps[-1] + d))
    squares = torch.tensor([[[float(k * k)]] for k in steps], dtype=torch.float64)
    for d in range(1, 5):
        assert forecast(steps, squares, steps[-1] + d, Taylor(2)).item() == pytest.approx((steps[-1] + d) ** 2 - h * d)
        assert forecast(steps, squares, steps[-1] + d, Taylor(0)).item() == steps[-1] ** 2


def test_order_0_hands_out_what_is_kept():
    value = torch.randn(2, 5, 3)
    assert forecast([0, 4], [value + 1, value], 6, Taylor(0)) is value
    assert forecast([3], [value], 6, Taylor(4)) is value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_no_less_exact_than_a_ladder_in_the_same_precision(dtype, order):
    generator = torch.Generator().manual_seed(0)
    slow = 10 + 0.1 * torch.randn(5, 1, 400, 3, generator=generator).cumsum(0)  # features that change little
    values, steps = slow.to(dtype), [0, 1, 5, 9, 13]
    exact = ladder(steps, values.double(), 16, order)
    found = forecast(steps, values, 16, Taylor(order))
    assert found.dtype == dtype
    error, theirs = (found - exact).norm(), (ladder(steps, values, 16, order) - exact).norm()
    assert error <= 1.001 * theirs and error / exact.norm() < torch.finfo(dtype).eps
    if dtype != torch.float32:  # rounded once, also where features change a lot
        values = (10 * (slow - 10)).to(dtype)
        exact = ladder(steps, values.double(), 16, order).to(dtype)
        assert (forecast(steps, values, 16, Taylor(order)) != exact).float().mean() < 0.01


def test_several_tensors_and_asked_twice():
    fill, entry = Taylor(1), Entry()
    pair = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 7, 3)
    for n, k in enumerate((1, 3)):
        fill.keep(entry, tuple(both[n] for both in pair), At(k, 9, SITE))
    first, again = (fill.fill(entry, At(5, 9, SITE)) for _ in range(2))
    for found, same, (old, new) in zip(first, again, pair, strict=True):
        torch.testing.assert_close(found, 2 * new - old)
        assert torch.equal(found, same)


def test_a_second_output_of_a_step_replaces_the_first():
    one, two, three = torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(forecast([0, 2, 2], [one, three, two], 4, Taylor(1)), 2 * two - one)


# ---- every sample at its own steps ----------------------------------------------------------------------------------
def test_factors_of_every_sample():
    """Samples 0 and 1 of guidance halves [0, 1, 0, 1]: one has outputs of steps 4 and 1, the other of 2 alone."""
    values = torch.randn(2, 4, 5, 3)
    entry = Entry(values=[(values[0],), (values[1],)], steps=[(4, 2), (1, None)])
    found = Taylor(1).fill(entry, At(6, 9, SITE, samples=Samples(2, 2)))[0]
    expected = values[0].clone()
    expected[0::2] += (values[0] - values[1])[0::2] * 2 / 3
    torch.testing.assert_close(found, expected)
    # a step that is there twice counts once
    twice = Entry(values=[(values[0],), (values[1],), (values[1],)], steps=[(4, 4), (4, 2), (2, None)])
    first, second = Taylor(2).fill(twice, At(6, 9, SITE, samples=Samples(2, 1)))[0].chunk(2)
    torch.testing.assert_close(first, (2 * values[0] - values[1]).chunk(2)[0])
    torch.testing.assert_close(second, (2 * values[0] - values[1]).chunk(2)[1])
    # no differences at steps up to `start`
    later = Taylor(1, start=4).fill(entry, At(6, 9, SITE, samples=Samples(2, 2)))[0]
    assert torch.equal(later, values[0])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.filterwarnings("ignore:dittocache.*skipped nothing")
def test_alone_equals_in_batch(small_dit, order, start):  # noqa: F811
    x, labels, fill = drift(), torch.tensor([0, 1, 2]), Taylor(order, start)
    together, trace = outputs(small_dit, x, labels, InputChange(), fill)
    assert ((trace.table > 0) & (trace.table < 1)).any(), "some rows must be computed beside filled ones"
    held, _ = outputs(small_dit, x, labels, InputChange())
    assert (together - held).abs().max() > 1e-4, "the fill must matter"
    for n in range(3):
        alone, _ = outputs(small_dit, x[:, n : n + 1], labels[n : n + 1], InputChange(), fill)
        torch.testing.assert_close(together[:, n : n + 1], alone, rtol=1e-4, atol=1e-5)


# ---- schedules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"interval": 4}, [0, 1, 5, 9, 13, 17]),
        ({"interval": 3}, [0, 1, 4, 7, 10, 13, 16, 19]),
        ({"interval": 4, "first_full": 3}, [0, 1, 2, 6, 10, 14, 18]),
        ({"interval": 6, "first_full": 3}, [0, 1, 2, 8, 14]),
        ({"interval": 5, "first_full": 1}, [0, 5, 10, 15]),
        ({"interval": 4, "warmup_steps": 3, "schedule": "diffusers"}, [0, 1, 2, 4, 8, 12, 16]),
        (
            {"interval": 5, "warmup_steps": 3, "disable_after": 15, "schedule": "diffusers"},
            [0, 1, 2, 4, 9, 14, 15, 16, 17, 18, 19],
        ),
    ],
)
def test_schedules_of_taylorseer(params, expected):
    assert full(recipe("taylorseer", **params).when) == expected


def test_the_guard_of_the_authors_schedule():
    starts = {n: recipe("taylorseer", first_full=n).fill.start for n in (1, 2, 3, 5)}
    assert starts == {1: 0, 2: 0, 3: 1, 5: 3}
    assert recipe("taylorseer", first_full=5, schedule="diffusers").fill.start == 0


@pytest.mark.parametrize(
    ("site", "interval"),
    [
        (SITE, 2),
        (Site("temporal_blocks.0.attn", "attention", "temporal_blocks", 0, 1, 0), 3),
        (Site("temporal_blocks.0.cross_attn", "cross-attention", "temporal_blocks", 0, 1, 0), 4),
        (Site("blocks.0.cross_attn", "cross-attention", "blocks", 0, 1, 0), 4),
        (Site("blocks.0.ff", "feed-forward", "blocks", 0, 1, 0), 1),
    ],
)
def test_every_kind_of_attention_has_its_own_interval_and_range(site, interval):
    ranges = {2: (100, 800), 3: (200, 800), 4: (100, 500), 1: (0, 0)}
    when = Broadcast(2, ranges[2], 3, ranges[3], 4, ranges[4])
    times = [1000 - 50 * k for k in range(20)]
    table = when.timed(times).table(20, [SITE, site])[:, 1]
    low, high = ranges[interval]
    expected = [k == 0 or not low < t < high or k % interval == 0 for k, t in enumerate(times)]
    assert (table == COMPUTE).tolist() == expected and set(table) <= {COMPUTE, REUSE}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (5, [0, 1, 4]),  # |1 - a|: .1, .3 > .25 computed; .1, then at the end .1 + .1
        (3, [0]),
    ],
)
def test_ratios_are_summed_up_by_hand(steps, expected):
    """Ratios 1.1, 1.2 / 1.1, ...: the product a is 1.1, 1.2 after one and two steps, so e is 0.1, 0.3."""
    when = RatioBudget((1.0, 1.4, 1.1, 1.0, 1.2), threshold=0.25, max_skip=3, retention=0.0)
    if steps == 3:  # read at 0, 2, 4: 1.0, 1.1, 1.2
        assert when.at(3).tolist() == np.float32([1.0, 1.1, 1.2]).tolist()
        expected = [0, 2]
    assert full(when, steps) == expected


def test_at_most_max_skip_steps_in_a_row_and_none_in_the_beginning():
    when = RatioBudget((1.0,) * 20, max_skip=3, retention=0.2)
    assert full(when) == [0, 1, 2, 3, 7, 11, 15, 19]
    assert full(RatioBudget((1.0,) * 20, max_skip=2, retention=0.0)) == [0, 3, 6, 9, 12, 15, 18]
    assert full(RatioBudget((1.0,) * 10, max_skip=9, retention=0.25), 10) == [0, 1, 2]  # int(2.5 + 0.5) = 3


# ---- against diffusers' own hooks -----------------------------------------------------------------------------------
def times_of(steps):
    return [float(999 - 999 * k // steps) for k in range(steps)]


def with_their_hooks(model, config, steps, clock=None):
    """Predictions of a model under one of diffusers' caches; `clock` is told the timestep of every step."""
    model.enable_cache(config)
    found = []
    with torch.no_grad(), model.cache_context("one"):
        for k, t in enumerate(times_of(steps)):
            if clock is not None:
                clock[:] = [t]
            found.append(tiny.call(model, tiny.step(model, k, steps)))
    model.disable_cache()
    return found


def with_ours(model, steps, method, **params):
    found = []
    with dittocache.enable(model, method, **params) as cache, torch.no_grad(), cache.run(steps, times_of(steps)):
        for k in range(steps):
            cache.step(k)
            found.append(tiny.call(model, tiny.step(model, k, steps)))
    return found, cache.trace


def check_equal(found, expected):
    for k, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert tiny.relative(mine, theirs) < 2e-6, f"step {k}"


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize(
    ("interval", "warmup_steps", "disable_after", "order"),
    [(5, 3, None, 1), (4, 3, None, 2), (3, 1, 9, 0), (3, 2, 11, 3)],
)
def test_taylorseer_against_diffusers(interval, warmup_steps, disable_after, order, lite):
    config = TaylorSeerCacheConfig(
        interval, warmup_steps, disable_after, order, taylor_factors_dtype=torch.float32, use_lite_mode=lite
    )
    theirs = with_their_hooks(tiny.flux(), config, 16)
    params = {"interval": interval, "warmup_steps": warmup_steps, "disable_after": disable_after, "order": order}
    params |= {"schedule": "diffusers", "lite": lite, "sites": "module" if lite else "attention"}
    mine, trace = with_ours(tiny.flux(), 16, "taylorseer", **params)
    assert trace.compute_fraction < 0.95
    check_equal(mine, theirs)


@pytest.mark.parametrize(
    ("interval", "timestep_range"), [(2, (100, 800)), (3, (100, 850)), (4, (-1, 1001)), (2, (812, 999))]
)
def test_pab_against_diffusers(interval, timestep_range):
    now = []
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=timestep_range,
        current_timestep_callback=lambda: now[0],
    )
    theirs = with_their_hooks(tiny.flux(), config, 16, now)
    mine, trace = with_ours(tiny.flux(), 16, "pab", interval=interval, timestep_range=timestep_range)
    assert trace.compute_fraction < 1
    check_equal(mine, theirs)


@pytest.mark.parametrize(
    ("threshold", "max_skip", "retention"), [(0.06, 3, 0.2), (0.12, 5, 0.1), (0.3, 2, 0.0), (0.02, 9, 0.5)]
)
@pytest.mark.parametrize("measured", [16, 28, 7])
def test_magcache_against_diffusers(threshold, max_skip, retention, measured):
    generator = torch.Generator().manual_seed(measured)
    table = (1 + 0.03 * torch.randn(measured, generator=generator)).tolist()
    config = MagCacheConfig(threshold, max_skip, retention, num_inference_steps=16, mag_ratios=table)
    theirs = with_their_hooks(tiny.flux(), config, 16)
    params = {"threshold": threshold, "max_skip": max_skip, "retention": retention}
    mine, trace = with_ours(tiny.flux(), 16, "magcache", ratios=table, **params)
    assert trace.compute_fraction < 0.95
    check_equal(mine, theirs)


# ---- on models ------------------------------------------------------------------------------------------------------
RECIPES = {
    "taylorseer": ("taylorseer", {}),
    "taylorseer-flux": ("taylorseer", {"interval": 3, "order": 2, "first_full": 3}),
    "taylorseer-attention": ("taylorseer", {"schedule": "diffusers", "sites": "attention", "order": 2, "interval": 3}),
    "taylorseer-lite": ("taylorseer", {"lite": True, "interval": 3, "order": 1}),
    "pab": ("pab", {"interval": 3, "cross_interval": 4, "timestep_range": (50, 950)}),
    "magcache": ("magcache", {"ratios": RATIOS}),
}


def frozen(model, cache, steps=10):
    found = []
    with torch.no_grad(), cache.run(steps, timesteps=TIMES[:steps]):
        for k in range(steps):
            cache.step(k)
            found.append(tiny.call(model, tiny.step(model, 0)))
    return found


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "uvit"])
@pytest.mark.parametrize("method", RECIPES)
def test_frozen_input_is_exact_and_really_skips(name, method):
    model = tiny.build(name)
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    with tiny.Counter(model) as once:
        tiny.call(model, tiny.step(model, 0))
    used, params = RECIPES[method]
    with dittocache.enable(model, used, **params) as cache, tiny.Counter(model) as counter:
        found = frozen(model, cache)
        trace = cache.trace
    with dittocache.enable(model, used, **params) as again:
        assert trace.flops_done == pytest.approx(tiny.count_flops(lambda: frozen(model, again)), rel=0.02)
    for k, output in enumerate(found):
        assert tiny.relative(output, expected) < 1e-5, f"step {k}"
    assert 0 < counter.total < 0.95 * 10 * once.total
    for site, share in zip(trace.sites, trace.table.sum(0), strict=True):
        if site in counter.calls:
            assert counter.tokens()[site] == pytest.approx(share * once.tokens()[site], abs=1e-6), site
    assert trace.compute_fraction < 0.95
    assert not tiny.traces_of_cache(model)


@pytest.mark.filterwarnings("ignore:dittocache.*skipped nothing")
def test_a_forecast_is_closer_than_what_is_held():
    """On inputs that drift slowly, going on along the last difference must pay, at the right distance."""
    model = tiny.dit()
    given = [tiny.step(model, k, 400) | {"timestep": torch.full((2,), 500)} for k in range(12)]

    def run(**params):
        with dittocache.enable(model, "taylorseer", **params) as cache, torch.no_grad(), cache.run(12):
            found = []
            for k in range(12):
                cache.step(k)
                found.append(tiny.call(model, given[k]))
            return found

    plain, held, line, square = run(interval=1), run(order=0), run(order=1), run(order=2)
    errors = [sum(map(tiny.relative, found, plain)) for found in (held, line, square)]
    assert errors[2] < errors[1] < 0.3 * errors[0], errors


def test_taylor_goes_with_stacks_and_their_changes():
    model = tiny.flux()
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    for where, keeps in (("stack", "change"), ("block", "output"), ("stack", "output")):
        mixed = Recipe(where=where, keeps=keeps, when=Counter(3, first_full=2), fill=Taylor(2))
        with dittocache.enable(model, mixed) as cache:
            found = tiny.predictions(model, cache, 8, frozen=True)
            assert cache.trace.compute_fraction < 0.7
        assert all(tiny.relative(output, expected) < 1e-5 for output in found)


def test_bytes_of_the_outputs_that_are_kept():
    model = tiny.dit()
    with dittocache.enable(model, "taylorseer", order=2, interval=2) as cache:
        tiny.predictions(model, cache, 9)
    with dittocache.enable(model, "fora", interval=2) as hold:
        tiny.predictions(model, hold, 9)
    assert cache.report().bytes_peak == 3 * hold.report().bytes_peak


def test_pab_goes_by_the_scheduler(pipe=None):
    """With a scheduler the timesteps are known; halves of the run in and out of the range."""
    model, scheduler = tiny.dit(), DDIMScheduler()
    with dittocache.enable(model, "pab", scheduler=scheduler, timestep_range=(500, 1000)) as cache:
        tiny.sample(model, scheduler, 10)
        trace = cache.trace
    expected = [k == 0 or t <= 500 or k % 2 == 0 for k, t in enumerate(trace.meta["timesteps"])]
    assert 0 < sum(expected) < 10
    assert (trace.table == np.array(expected)[:, None]).all() and set(trace.kinds) == {"attention"}


def test_pab_without_timesteps_is_one_clear_error():
    model = tiny.dit()
    with dittocache.enable(model, "pab") as cache:
        with pytest.raises(ValueError, match=r"timesteps.*cache\.run\(num_steps, timesteps=\.\.\.\)") as e:
            cache.run(10)
        assert "\n" not in str(e.value)
        assert frozen(model, cache) and cache.trace.compute_fraction < 1  # and the next run works
    assert not tiny.traces_of_cache(model)


# ---- MagCache's calibration -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def stream(model):
    """The image stream before the first and after the last block, by plain hooks: [(before, after), ...]."""
    found, state = [], {}
    blocks = [block for n, block in model.named_modules() if n.rpartition(".")[0].endswith("blocks")]

    def before(module, args, kwargs):
        state["before"] = kwargs.get("hidden_states", args[0] if args else None).clone()

    def after(module, args, kwargs, output):
        found.append((state["before"], (output[1] if isinstance(output, tuple) else output).clone()))

    handles = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after, with_kwargs=True),
    ]
    yield found
    for handle in handles:
        handle.remove()


def told_again(pairs):
    """Mean over samples and tokens of ||R_k|| / ||R_(k-1)||."""
    sizes = [(after - before).double().norm(dim=-1) for before, after in pairs]
    return [1.0, *(float((new / old).mean()) for old, new in itertools.pairwise(sizes))]


@pytest.mark.parametrize("side", [4, 2])
def test_ratios_of_two_stacks_and_two_streams(side):
    """Of FLUX's two streams the image counts, also where text is longer."""
    model, sums = tiny.flux(), {}
    recorder = Recorder(magnitudes(model, sums), False, None, 3, once=True)
    recipe = CalibrateMagCache().recording(recorder)
    with stream(model) as pairs, dittocache.enable(model, recipe) as cache, torch.no_grad(), cache.run(6):
        for k in range(6):
            cache.step(k)
            tiny.call(model, tiny.step(model, k, 6, batch=3, size=side))
    expected = told_again(pairs)
    np.testing.assert_allclose(sums["ratios"].numpy() / 3, expected, rtol=1e-5)
    assert max(abs(r - 1) for r in expected) > 0.01, "ratios must say something"


def test_ratios_of_a_stack_with_text_before_the_image():
    """Its change is that of both; the image is at the end. Shown to the function as a recorder would."""
    model, sums = tiny.flux(), {}
    see, stacks = magnitudes(model, sums), [s.site for s in dittocache.describe(model).stacks]
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for k in range(3):
        image, both = torch.randn(2, 16, 8, generator=generator), torch.randn(2, 23, 8, generator=generator)
        for site, change in zip(stacks, (image, both), strict=True):
            see(At(k, 3, site), Seen(change, None), None)
        pairs.append((torch.zeros_like(image), image + both[:, 7:]))
    np.testing.assert_allclose(sums["ratios"].numpy() / 2, told_again(pairs), rtol=1e-5)
    see(At(0, 3, stacks[0]), Seen(image, None), None)
    with pytest.raises(ValueError, match=r"one stream.*single_transformer_blocks.*\[2, 9, 8\]"):
        see(At(0, 3, stacks[1]), Seen(both[:, :9], None), None)


def test_calibration_writes_a_recipe_with_the_ratios(tmp_path):
    pipe = tiny.pipeline()
    setup = Setup(num_steps=6, guidance_scale=1.0, seed=50, conditions=(3, 7))
    found = calibrate(pipe, "magcache", 2, setup, out=tmp_path, threshold=0.5)
    with stream(pipe.transformer) as pairs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(
            class_labels=[3, 7],
            num_inference_steps=6,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(50 + j) for j in range(2)],
        )
    np.testing.assert_allclose(found.when.ratios, told_again(pairs), rtol=1e-5)
    assert found.params["threshold"] == 0.5 and found.made_for["timesteps"]
    again = Recipe.from_pretrained(tmp_path)
    assert again == found
    with dittocache.enable(pipe, again) as cache:
        tiny.draw(pipe, 6)
        assert full(found.when, 6) == [k for k, row in enumerate(cache.trace.table) if row.all()]
        with pytest.raises(ValueError, match="6"):
            tiny.draw(pipe, 8)


def test_calibration_does_not_depend_on_the_batch_or_on_guidance_rows():
    pipe = tiny.pipeline()
    setup = Setup(num_steps=4, guidance_scale=2.0, seed=50, conditions=(3, 7, 1))
    one, all_at_once = (calibrate(pipe, "magcache", 3, setup, batch=batch) for batch in (1, 3))
    np.testing.assert_allclose(one.when.ratios, all_at_once.when.ratios, rtol=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------
BAD = [
    ("taylorseer", {"order": -1}, "order.*-1"),
    ("taylorseer", {"order": 1.5}, "order.*1.5"),
    ("taylorseer", {"interval": 0}, "interval.*0"),
    ("taylorseer", {"first_full": 0}, "first_full.*0"),
    ("taylorseer", {"warmup_steps": 0}, "warmup_steps.*0"),
    ("taylorseer", {"disable_after": -3}, "disable_after.*-3"),
    ("taylorseer", {"schedule": "hook"}, "schedule.*authors, diffusers.*'hook'"),
    ("taylorseer", {"sites": "block"}, "sites.*module, attention.*'block'"),
    ("taylorseer", {"lite": 1}, "lite.*True or False.*1"),
    ("taylorseer", {"lite": True, "sites": "attention"}, "lite.*sites='attention'"),
    ("pab", {"interval": 0}, "interval.*0"),
    ("pab", {"interval": None}, "cross_interval"),
    ("pab", {"timestep_range": 100}, "timestep_range.*2 numbers.*100"),
    ("pab", {"timestep_range": (100, 300, 800)}, "timestep_range.*2 numbers.*300"),
    ("pab", {"timestep_range": ("a", 3)}, "timestep_range.*'a'"),
    ("pab", {"cross_timestep_range": (800, 100)}, "cross_timestep_range.*low <= high.*800, 100"),
    ("magcache", {}, "ratios.*calibrate magcache"),
    ("magcache", {"ratios": []}, r"ratios.*\[\]"),
    ("magcache", {"ratios": [1.0, "x"]}, "ratios.*'x'"),
    ("magcache", {"ratios": [1.0, [2.0]]}, r"ratios.*\[2.0\]"),
    ("magcache", {"ratios": [1.0, float("nan")]}, "ratios.*nan"),
    ("magcache", {"ratios": [1.0, -2]}, "ratios.*-2"),
    ("magcache", {"ratios": 1.0}, "ratios.*1.0"),
    ("magcache", {"ratios": RATIOS, "threshold": -1}, "threshold.*-1"),
    ("magcache", {"ratios": RATIOS, "max_skip": -1}, "max_skip.*-1"),
    ("magcache", {"ratios": RATIOS, "retention": 1.5}, "retention.*1.5"),
]


@pytest.mark.parametrize(("method", "params", "words"), BAD)
def test_bad_input_is_one_line(method, params, words):
    with pytest.raises(ValueError, match=words) as e:
        recipe(method, **params)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", RECIPES)
def test_saved_and_read_back(method, tmp_path):
    used, params = RECIPES[method]
    made = recipe(used, **params)
    made.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == made


def test_parts_refuse_the_same():
    for part, params in ((Taylor, {"order": -1}), (Taylor, {"start": -1}), (Warmup, {"interval": 0})):
        with pytest.raises(ValueError, match=r"(0|1) or more"):
            part(**params)
    with pytest.raises(ValueError, match="as many timesteps"):
        Broadcast(timesteps=(1.0, 2.0)).table(3, [SITE])
    with pytest.raises(ValueError, match="ratios"):
        RatioBudget(())
