"""What corrected features and predictions are, number by number: EOC, GOC, ICC, EB-Cache, L2C, written out by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import dittocache
from dittocache import Plan, Recipe, recipe
from dittocache.cache import wanted
from dittocache.fill import At, Entry, Fill, GradientQueue, Hold, LowRankIncrement, Trend
from dittocache.fix import Level, NoiseScale
from dittocache.plan import COMPUTE, PARTIAL, REUSE, Site
from dittocache.when import Every, ReuseSteps, Router, States, Table, When
from dittocache.which import Straight

SITE = Site("b.0.attn", "attention", "b", 0, 1, 0)
FF = Site("b.0.ff", "feed-forward", "b", 0, 1, 0, tokenwise=True)
FUSED = Site("s.0.proj_out", "fused", "s", 0, 1, 1)


def numbers(*values: float) -> tuple[Tensor, ...]:
    """One output [1, tokens, 1]."""
    return (torch.tensor(values, dtype=torch.float32).view(1, -1, 1),)


def replay(fill: Fill, computed: dict[int, tuple[Tensor, ...]], steps: int, together: Any = ()) -> list[list[float]]:
    """What a site hands on at every step: computed outputs at some, stand-ins at the others."""
    entry, out = Entry(), []
    for k in range(steps):
        at = At(k, steps, SITE, None, k in together)
        if k in computed:
            fill.keep(entry, computed[k], at)
            value = computed[k]
        else:
            value = fill.fill(entry, at)
            assert all(torch.equal(a, b) for a, b in zip(fill.fill(entry, at), value)), "asked twice, it is the same"
        out.append(value[0].flatten().tolist())
    return out


# ---- EOC ------------------------------------------------------------------------------------------------------------
TREND = {f"{SITE.name}@{k}": torch.tensor([[float(k)], [-2.0]]) for k in (1, 2, 4)}  # none for step 3


@pytest.mark.parametrize("write_back", [True, False])
def test_a_trend_scales_what_is_kept(write_back):
    out = replay(Trend(TREND, 0.5, write_back), {0: numbers(10, 8), 5: numbers(1, 1)}, 6)
    # 1 + theta E = 1.5 and 0 at step 1, 2 and 0 at step 2, 3 and 0 at step 4
    first = [10 * 1.5, 10 * 1.5 * 2, 10 * 1.5 * 2, 10 * 1.5 * 2 * 3] if write_back else [15, 20, 10, 30]
    assert out[0] == [10, 8] and out[5] == [1, 1]
    assert [row[0] for row in out[1:5]] == first
    assert [row[1] for row in out[1:5]] == ([0, 0, 0, 0] if write_back else [0, 0, 8, 0])


def test_a_trend_of_other_sites_and_steps_is_held():
    trend = {"b.1.attn@1": torch.ones(2, 1), f"{SITE.name}@7": torch.ones(2, 1)}
    assert replay(Trend(trend), {0: numbers(3, 4)}, 4) == [[3, 4]] * 4


def test_of_several_outputs_the_first_is_corrected():
    entry, fill = Entry(), Trend({f"{SITE.name}@1": [[1.0], [2.0]]}, theta=1.0)
    fill.keep(entry, (*numbers(1, 1), *numbers(5, 5, 5)), At(0, 2, SITE))
    first, second = fill.fill(entry, At(1, 2, SITE))
    assert first.flatten().tolist() == [2, 3] and second.flatten().tolist() == [5, 5, 5]


def test_eoc_in_a_model_equals_the_same_by_hand():
    """Consecutive reused steps: every module's output is what was kept, scaled; nothing else changes."""
    model, steps = tiny.dit(), 5
    trend = tiny.data_for("eoc", model, steps, scale=0.5)["trend"]
    ff = model.transformer_blocks[1].ff
    for write_back in (True, False):
        seen: list[Tensor] = []
        with (
            tiny.patched_family("BasicTransformerBlock", reuse_block=None),
            dittocache.enable(
                model, "eoc", trend=trend, theta=0.3, reuse_steps=[1, 2, 4], write_back=write_back
            ) as cache,
        ):
            handle = ff.register_forward_hook(lambda m, a, o, kept=seen: kept.append(o.clone()))
            tiny.predictions(model, cache, steps)
            handle.remove()
        e = [1 + 0.3 * trend[f"transformer_blocks.1.ff@{k}"] for k in (1, 2, 3, 4)]
        torch.testing.assert_close(seen[1], seen[0] * e[0])
        torch.testing.assert_close(seen[2], (seen[1] if write_back else seen[0]) * e[1])
        torch.testing.assert_close(seen[4], seen[3] * e[3])


@pytest.mark.parametrize("size", [4, 12])
def test_a_trend_for_another_number_of_tokens_is_an_error_at_the_first_forward(size):
    model = tiny.dit()
    plain = tiny.predictions(model, None, 1, size=size)[0]
    trend = tiny.data_for("eoc", model, 4)["trend"]
    calls: list[int] = []
    with dittocache.enable(model, "eoc", trend=trend) as cache:
        handle = model.transformer_blocks[0].register_forward_hook(lambda *a: calls.append(1))
        with pytest.raises(ValueError, match=r"'transformer_blocks.0.attn1' is for 16 x 16 tokens x channels") as e:
            tiny.predictions(model, cache, 4, size=size)
        handle.remove()
        assert "\n" not in str(e.value) and "calibrate for this size" in str(e.value) and not calls
        tiny.predictions(model, cache, 4)  # the right size still works
        assert cache.trace.compute_fraction < 0.9
    assert torch.equal(tiny.predictions(model, None, 1, size=size)[0], plain) and not tiny.traces_of_cache(model)


# ---- GOC ------------------------------------------------------------------------------------------------------------
def test_the_queue_step_by_step():
    """Spec: after every step push whatever was output; the first reuse has no gradient."""
    computed = {0: numbers(1), 2: numbers(4), 4: numbers(6)}
    out = [row[0] for row in replay(GradientQueue(eta=0.5), computed, 7)]
    k1 = 1.0  # F2 is missing
    k3 = 4 + 0.5 * (4 - k1)
    k5 = 6 + 0.5 * (6 - k3)
    k6 = k5 + 0.5 * (k5 - 6)  # a second reuse in a row goes on from the corrected one
    assert out == [1, k1, 4, k3, 6, k5, k6]


def test_only_positions_are_corrected_but_all_are_pushed():
    computed = {0: numbers(1), 2: numbers(4), 4: numbers(6)}
    out = [row[0] for row in replay(GradientQueue(2.0, positions=(5,)), computed, 7)]
    assert out == [1, 1, 4, 4, 6, 6 + 2 * (6 - 4), 10]
    # without the correction at 3, F2 at 5 is the held 4; corrected at 3 it would have been 10
    assert [row[0] for row in replay(GradientQueue(2.0, (3, 5)), computed, 6)][-1] == 6 + 2 * (6 - (4 + 2 * (4 - 1)))
    # two reused steps in a row, the first not corrected: F1 = F2, no gradient is left
    assert [row[0] for row in replay(GradientQueue(2.0, (3,)), {0: numbers(1), 1: numbers(3)}, 4)] == [1, 3, 3, 3]


def test_a_lone_reused_module_is_plain_reuse():
    computed = {0: numbers(1), 1: numbers(3), 3: numbers(4)}
    fill = GradientQueue(1.0, require_both=True)
    assert [row[0] for row in replay(fill, computed, 5, together=(4,))] == [1, 3, 3, 4, 4 + (4 - 3)]
    assert [row[0] for row in replay(fill, computed, 5)] == [1, 3, 3, 4, 4]


def test_computed_only_keeps_the_last_two_computed():
    out = [row[0] for row in replay(GradientQueue(1.0, computed_only=True), {0: numbers(1), 3: numbers(4)}, 6)]
    assert out == [1, 1, 1, 4, 7, 7]


def test_eta_zero_is_hold(model):
    results = []
    for r in (recipe("goc", eta=0, interval=3), Recipe(when=Every(3, anchor="start"))):
        with dittocache.enable(model, r) as cache:
            results.append(tiny.predictions(model, cache, 7))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_goc_on_a_router_corrects_where_the_whole_block_is_reused():
    """Scores by hand: block 0 reuses both, block 1 attention alone, block 2 the feed-forward alone."""
    model, steps = tiny.dit(), 6
    logits = torch.full((steps, 6), 9.0)
    logits[:, [0, 1, 2, 5]] = -9.0
    seen: dict[str, list[Tensor]] = {}
    with (
        tiny.patched_family("BasicTransformerBlock", reuse_block=None),
        dittocache.enable(model, "goc", base="l2c", router_logits=logits, eta=0.7) as cache,
    ):
        handles = []
        for e in dittocache.describe(model).entries:
            kept = seen.setdefault(e.site.name, [])
            handles.append(e.module.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o.clone())))
        tiny.predictions(model, cache, steps)
        table = cache.trace.table
        for handle in handles:
            handle.remove()
    # steps of even i = 5 - k reuse: k = 1, 3, 5
    assert table.sum(1).tolist() == [6, 2, 6, 2, 6, 2]
    for name, reused, corrected in (("0.attn1", 1, 1), ("0.ff", 1, 1), ("1.attn1", 1, 0), ("2.ff", 1, 0)):
        out = seen[f"transformer_blocks.{name}"]
        assert reused and torch.equal(out[1], out[0]), name
        for k in (3, 5):
            want = out[k - 1] + 0.7 * (out[k - 1] - out[k - 2]) if corrected else out[k - 1]
            torch.testing.assert_close(out[k], want, msg=name)
    assert not torch.equal(seen["transformer_blocks.1.ff"][3], seen["transformer_blocks.1.ff"][2])


# ---- ICC ------------------------------------------------------------------------------------------------------------
def factors(model: nn.Module, make: Any) -> dict[str, Tensor]:
    out = {}
    for e in dittocache.describe(model).linears:
        out[f"{e.site.name}/A"], out[f"{e.site.name}/B"] = make(e.module.weight.detach())
    return out


def exact(w: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.eye(w.shape[0]), w) if w.shape[0] < w.shape[1] else (w, torch.eye(w.shape[1]))


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "uvit"])
def test_factors_of_full_rank_compute_what_the_layer_computes(name):
    model = tiny.build(name)
    plain = tiny.predictions(model, None, 6)
    with dittocache.enable(model, "icc", period=6, factor_tensors=factors(model, exact)) as cache:
        with tiny.Counter(model, linears=True) as counter:
            outputs = tiny.predictions(model, cache, 6)
        assert set(cache.trace.table[1:].flatten()) == {0}
    for k, (a, b) in enumerate(zip(outputs, plain, strict=True)):
        assert tiny.relative(a, b) < 1e-5, f"step {k}"
    held = {e.site.name for e in dittocache.describe(model).linears}
    assert {len(counter.calls[site]) for site in held} == {1}
    # and it matters: the inputs do change
    assert tiny.relative(plain[5], plain[0]) > 1e-2


@pytest.mark.parametrize("rank", [0, 1])
def test_factors_of_nothing_hold_the_layers(rank):
    """Of the linears, not of the modules: attention and activation see fresh... nothing else is held."""
    model = tiny.dit()
    zeros = factors(model, lambda w: (torch.zeros(w.shape[0], rank), torch.zeros(rank, w.shape[1])))
    columns = tuple(e.site.name for e in dittocache.describe(model).linears)
    table = np.array([[1.0], [0.0], [0.0], [1.0], [0.0]]).repeat(len(columns), 1)
    results = []
    for what, params in (
        ("icc", {"period": 3, "factor_tensors": zeros}),
        (Recipe(where="linear", when=Every(3, anchor="start")), {}),
        (Plan(table, columns), {}),
    ):
        with dittocache.enable(model, what, **params) as cache:
            results.append(tiny.predictions(model, cache, 5))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_increment_refers_to_the_last_full_step():
    fill = LowRankIncrement({"b.0.attn/A": torch.tensor([[2.0]]), "b.0.attn/B": torch.tensor([[3.0]])})
    entry = Entry()
    (x,), (y,) = numbers(1, 2), numbers(10, 20)
    fill.keep(entry, (y,), At(0, 4, SITE, x))
    for k in (1, 2, 3):
        (out,) = fill.fill(entry, At(k, 4, SITE, x + k))
        assert out.flatten().tolist() == [10 + 6 * k, 20 + 6 * k]


@pytest.mark.parametrize("name", ["dit", "pixart", "uvit"])
def test_flops_of_low_rank_steps_equal_an_independent_count(name, tmp_path):
    model = tiny.build(name)
    data = factors(model, lambda w: (torch.ones(w.shape[0], 3), torch.ones(3, w.shape[1])))
    with dittocache.enable(model, "icc", period=4, factor_tensors=data) as cache:
        tiny.predictions(model, cache, 4)
        done = tiny.count_flops(lambda: tiny.predictions(model, cache, 4))
        report, trace = cache.report(), cache.trace
    full = tiny.count_flops(lambda: tiny.predictions(model, None, 1))
    assert report.flops_full == 4 * full
    assert report.flops_done == pytest.approx(done, rel=1e-6)
    assert full < done < 3.5 * full
    # the cost of filling survives files
    assert trace.flops_fill is not None and sum(trace.flops_fill) > 0
    trace.save(tmp_path / "plan.json")
    for again in (Plan.from_json(trace.to_json()), Plan.load(tmp_path / "plan.json")):
        assert again.flops_fill == trace.flops_fill and again.flops_done == trace.flops_done
    by_hand = dataclasses.replace(trace, flops_fill=None).flops_done + 3 * sum(trace.flops_fill)
    assert trace.flops_done == pytest.approx(by_hand)
    fill = LowRankIncrement(data)
    site = next(s for s in dittocache.describe(model).linears if s.site.kind == "fc1")
    out, width = site.module.weight.shape
    assert fill.cost(site.site) == pytest.approx((3 * out + 3 * width) / (out * width))
    assert fill.cost(SITE) == 0 == Hold().cost(SITE)


# ---- partly computed ------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class FirstThenPartial(When):
    def table(self, num_steps, sites):
        table = np.full((num_steps, len(sites)), PARTIAL)
        table[0] = COMPUTE
        return table


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("fill", ["trend", "trend-held-back", "gradient", "gradient-computed-only"])
def test_tokens_that_are_not_computed_are_filled(fill, mode):
    """Rows of a partial step are fresh where chosen; the others are the fill's stand-in, not just held."""
    model, steps = tiny.dit(), 4
    trend = {k: v for k, v in tiny.data_for("eoc", model, steps, scale=1.0)["trend"].items() if ".0.ff@" in k}
    which = Straight(ratio=0.25, ratio_schedule="constant", spatial_bonus=None)
    chosen = {
        "trend": Trend(trend, 0.5),
        "trend-held-back": Trend(trend, 0.5, write_back=False),
        "gradient": GradientQueue(0.5),
        "gradient-computed-only": GradientQueue(0.5, computed_only=True),
    }[fill]
    ff, seen = model.transformer_blocks[0].ff, []
    with dittocache.enable(model, Recipe(when=FirstThenPartial(), which=which, fill=chosen)) as cache:
        handle = ff.register_forward_hook(lambda m, args, out: seen.append((args[0].detach().clone(), out)))
        with cache.run(steps):
            for k in range(steps):
                cache.step(k)
                with mode():
                    tiny.call(model, tiny.step(model, k, steps))
                seen[-1] = (seen[-1][0], seen[-1][1].detach().clone())
        handle.remove()
    base = older = seen[0][1]
    for k in range(1, steps):
        x, y = seen[k]
        scale = 1 + 0.5 * trend[f"transformer_blocks.0.ff@{k}"]
        if fill.startswith("trend"):
            filled = base * scale
        elif fill == "gradient":
            filled = base + 0.5 * (base - older)
        else:
            filled = base  # there is but one computed output
        rows = slice(4 * (k - 1), 4 * k)
        want = filled.clone()
        with torch.no_grad():
            want[:, rows] = type(ff).forward(ff, x)[:, rows]
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5, msg=f"step {k}")
        if fill in ("trend", "gradient"):
            base, older = want, base
        else:
            base = base.clone()
            base[:, rows] = want[:, rows]


# ---- EB-Cache -------------------------------------------------------------------------------------------------------
def test_the_designed_schedule():
    """specs/eb-cache.md: S = 50, b = 1: 34 full, 16 reused; full for the last fifth."""
    when = States()
    states = when.at(50)
    assert states.count(0) == 34 and states.count(2) == 16
    by_hand = []
    for k in range(50):
        i = 49 - k
        every = 3 if i > 40 else 2 if i > 20 else 1
        by_hand.append(0 if k == 0 or k % every == 0 or i < 10 else 2)
    assert states == by_hand
    reversed_states = States(order="index").at(50)
    assert (
        reversed_states[:22] == [0] * 22 and reversed_states == by_hand[::-1]
    )  # full for the first 22, reuse at the end
    assert States(interval=2).at(50)[:13] == [0, 2, 2, 2, 2, 2, 0, 2, 2, 2, 2, 2, 0]


def test_states_mean_modules():
    sites = [SITE, FF, FUSED]
    table = States((0, 1, 2, 3)).table(4, sites)
    assert table.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1]]
    # counted from the end; the first step is full whatever it says
    assert States((0, 1, 2, 3), order="index").table(4, sites).tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]]
    assert States((2, 2)).table(2, sites).tolist() == [[1, 1, 1], [0, 0, 0]]
    cross = dataclasses.replace(SITE, kind="cross-attention")
    context = dataclasses.replace(FF, kind="context-feed-forward")
    assert States((0, 1, 3)).table(3, [cross, context]).tolist() == [[1, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize("order", ["sampling", "index"])
def test_states_in_a_model(order):
    model = tiny.pixart()
    states = (0, 1, 2, 3, 0)
    with dittocache.enable(model, "eb-cache", table=states, table_order=order) as cache, tiny.Counter(model) as counter:
        tiny.predictions(model, cache, 5)
    attention, ff = 3, 3  # states 0, 3, 0 and 0, 1, 0
    for name, calls in counter.calls.items():
        assert len(calls) == (ff if name.endswith("ff") else attention), name
    assert (cache.trace.table[1] == (0 if order == "sampling" else 1))[
        [k == "attention" for k in cache.trace.kinds]
    ].all()


# ---- noise scaling --------------------------------------------------------------------------------------------------
def test_the_bias_at_points_worked_out_by_hand():
    fix = NoiseScale(bias=True)
    assert fix.b(1.0) == pytest.approx(1.0)
    assert fix.b(0.7) == pytest.approx(0.98 + 0.02 * math.exp(-2.5))
    assert fix.b(0.4) == pytest.approx(0.98 + 0.02 * math.exp(-5))
    assert fix.b(0.1) == pytest.approx(0.96 + 0.02 * math.exp(-2.5))
    assert fix.b(0.0) == pytest.approx(0.96 + 0.02 * math.exp(-10 / 3))
    noise = torch.tensor([2.0])
    assert float(NoiseScale(0.5).fix(noise, Level(0, 1, 0.3, 1))) == 4
    assert float(NoiseScale(0.5, True).fix(noise, Level(0, 1, 0.1, 1))) == pytest.approx(4 * fix.b(0.1))
    assert recipe("eb-cache").fix is None and recipe("eb-cache", noise_bias=True).fix == fix


SCHEDULERS: dict[str, Any] = {
    "epsilon": lambda: DDIMScheduler(),
    "v_prediction": lambda: DDIMScheduler(prediction_type="v_prediction"),
    "sample": lambda: DDIMScheduler(prediction_type="sample", clip_sample=False),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow-shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler": lambda: EulerDiscreteScheduler(),
    "euler-v": lambda: EulerDiscreteScheduler(prediction_type="v_prediction"),
    "zero-snr": lambda: DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
}


def scaled(scheduler: Any, kind: str, y: Tensor, x: Tensor, k: int, t: Any, factor: float) -> Tensor:
    """The prediction whose noise is the original's times a factor; x is the sample before any scaling."""
    if kind.startswith("flow"):  # x = (1 - s) x0 + s n, y = n - x0
        s = float(scheduler.sigmas[k])
        return y if s == 1 else (factor * (x + (1 - s) * y) - x) / (1 - s)
    if kind == "euler":
        return factor * y
    if kind == "euler-v":  # y = a n - b x0 with a^2 + b^2 = 1, of the scaled input
        s = float(scheduler.sigmas[k])
        a, b = (1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5
        x = x * a
    else:
        a = float(scheduler.alphas_cumprod[t]) ** 0.5
        b = (1 - float(scheduler.alphas_cumprod[t])) ** 0.5
    if kind == "epsilon":
        return factor * y
    if kind == "sample":  # x = a y + b n
        return (x - factor * (x - a * y)) / a
    if a == 0:
        return y
    return (factor * (a * y + b * x) - b * x) / a


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_noise_in_every_kind_of_prediction_is_scaled(kind, bias):
    model, steps = tiny.flux() if kind.startswith("flow") else tiny.dit(), 5
    fix = NoiseScale(0.965, bias)
    plan = Recipe(when=Every(2, anchor="start"))
    scheduler = SCHEDULERS[kind]()
    with dittocache.enable(model, dataclasses.replace(plan, fix=fix), scheduler=scheduler) as cache:
        found = tiny.sample(model, scheduler, steps)
        assert cache.report().warnings == ()
    own = SCHEDULERS[kind]()
    own.set_timesteps(steps)
    with dittocache.enable(model, plan) as cache, cache.run(steps), torch.no_grad():
        plain = x = tiny.latents(model)
        for k, t in enumerate(own.timesteps):
            cache.step(k)
            given = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
            time = float(t) / 1000
            factor = (fix.b(time) if bias else 1) / 0.965
            y = tiny.predict(model, given, t)
            x = own.step(scaled(own, kind, y, x, k, t, factor), t, x, return_dict=False)[0]
    assert tiny.relative(found, x) < 1e-4
    with dittocache.enable(model, plan, scheduler=scheduler):
        plain = tiny.sample(model, scheduler, steps)
    assert tiny.relative(found, plain) > 1e-3


def test_learned_variances_pass_unchanged():
    handed: list[Tensor] = []
    raw: list[Tensor] = []

    class Seen(DDPMScheduler):
        def step(self, model_output, *args, **kwargs):
            handed.append(model_output)
            return super().step(model_output, *args, **kwargs)

    model, scheduler = tiny.dit(out_channels=8), Seen(variance_type="learned_range")
    with dittocache.enable(model, "eb-cache", noise_scale=0.5, interval=2, scheduler=scheduler):
        tiny.sample(model, scheduler, 3, after=lambda k, y: raw.append(y.clone()))
    assert len(raw) == len(handed) == 3
    for y, z in zip(raw, handed, strict=True):
        assert y.shape[1] == 8 and torch.equal(z[:, 4:], y[:, 4:]) and torch.equal(z[:, :4], y[:, :4] * 2)


def test_noise_in_raw_loops():
    model = tiny.dit()
    fix = NoiseScale(0.8, True)
    noise = torch.ones(1, 4)
    with dittocache.enable(model, Recipe(when=Every(2), fix=fix)) as cache:
        with pytest.raises(RuntimeError, match="no run is open here"):
            cache.fix(noise)
        with torch.no_grad(), cache.run(4, timesteps=[900, 600, 300, 0]):
            for k, t in enumerate([900, 600, 300, 0]):
                cache.step(k)
                tiny.call(model, tiny.step(model, k, 4))
                torch.testing.assert_close(cache.fix(noise), noise * fix.b(t / 1000) / 0.8)
            assert not any("call cache.fix" in text for text in cache.report().warnings)
        with torch.no_grad(), cache.run(4):
            for k in range(4):
                cache.step(k)
                tiny.call(model, tiny.step(model, k, 4))
                torch.testing.assert_close(cache.fix(noise), noise * fix.b(1 - k / 4) / 0.8)
        with pytest.warns(UserWarning, match="handed it none: call cache.fix"):
            tiny.predictions(model, cache, 4)
        assert any("call cache.fix" in text for text in cache.report().warnings)


# ---- L2C ------------------------------------------------------------------------------------------------------------
def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_router_compares_strictly():
    """A score of exactly theta is reused."""
    logits = torch.zeros(2, 2)
    logits[0] = torch.tensor([0.0, 1e-3])
    assert Router({"logits": logits}, 0.5).table(2, [SITE, FF]).tolist() == [[1, 1], [0, 1]]
    assert Router({"logits": logits}, 0.0).table(2, [SITE, FF]).tolist() == [[1, 1], [1, 1]]
    assert Router({"logits": logits}, 1.0).table(2, [SITE, FF]).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 7])
def test_rows_are_read_from_the_end_at_even_indices(steps):
    rng = np.random.default_rng(steps)
    logits = rng.normal(size=(steps, 2))
    table = Router({"logits": logits}, 0.4).table(steps, [SITE, FF])
    for k in range(steps):
        i = steps - 1 - k
        want = [1, 1] if i % 2 or k == 0 else [float(1 / (1 + math.exp(-p)) > 0.4) for p in logits[i]]
        assert table[k].tolist() == want, k
    changed = logits.copy()
    changed[1::2] = 99  # odd rows are not read
    assert (Router({"logits": changed}, 0.4).table(steps, [SITE, FF]) == table).all()


def test_columns_are_in_order_of_execution():
    for name in ("dit", "flux", "uvit", "pixart"):
        model = tiny.build(name)
        found = dittocache.describe(model)
        sites = [found.columns[j] for j in wanted(dittocache.recipe("fora"), found)]
        for j, site in enumerate(sites):
            logits = torch.full((2, len(sites)), 9.0)
            logits[0, j] = -9
            with dittocache.enable(model, "l2c", router_logits=logits) as cache:
                tiny.predictions(model, cache, 2)
                reused = [s for s, share in zip(cache.trace.sites, cache.trace.table[1]) if share == REUSE]
            assert reused == [site.name]


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_outer_rows(steps):
    """Evaluations 2r with r > 0 follow row r; mid points are full, and so is what an odd number adds."""
    outer = steps // 2
    logits = torch.arange(outer * 2).view(outer, 2) % 3 - 1.0
    for rows in (logits, torch.cat([logits, torch.full((3, 2), -9.0)])):
        table = Router({"logits": rows}, 0.5, "outer").table(steps, [SITE, FF])
        for k in range(steps):
            r = k // 2
            read = k % 2 == 0 and 0 < r < outer
            assert table[k].tolist() == ([float(p > 0) for p in logits[r]] if read else [1, 1]), k
    with pytest.raises(ValueError, match=f"{outer - 1} rows, but this run needs {outer}"):
        Router({"logits": logits[:-1]}, 0.5, "outer").table(steps, [SITE, FF])


def test_a_router_of_another_size():
    model = tiny.dit()
    with pytest.raises(ValueError, match="5 columns, but the model has 6 sites"):
        dittocache.enable(model, "l2c", router_logits=torch.zeros(4, 5))
    assert not tiny.traces_of_cache(model)
    with (
        dittocache.enable(model, "l2c", router_logits=torch.zeros(4, 6)) as cache,
        pytest.raises(ValueError, match="4 rows, but this run needs 5"),
    ):
        cache.run(5)


def test_listed_steps():
    assert ReuseSteps((1, 3)).table(5, [SITE]).flatten().tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="in a run of 3 steps must be a whole number, from 1 to 2; got 3"):
        ReuseSteps((1, 3)).table(3, [SITE])
    assert isinstance(recipe("goc", reuse_steps=range(1, 9, 2)).when, ReuseSteps)
    assert not isinstance(recipe("goc").when, Table)
