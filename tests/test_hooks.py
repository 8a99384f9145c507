"""What happens at blocks and sites: shortcuts, partial tokens, in-place models, dynamic decisions, bytes and FLOPs."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

import diffusers.models.attention_processor
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import dittocache
from dittocache import Plan, Recipe, hooks
from dittocache.fill import Entry, Fill, GradientQueue, Hold, Trend
from dittocache.fix import Fix
from dittocache.plan import COMPUTE, OPEN, PARTIAL, REUSE
from dittocache.when import Counter, DualInterval, Every, Table, When
from dittocache.which import RandomTokens, Straight, Which

pytestmark = pytest.mark.filterwarnings("ignore:dittocache.*skipped nothing")
SHARE = {"ratio": 0.3, "ratio_schedule": "constant"}


# ---- models that are not diffusers' ---------------------------------------------------------------------------------
class MiniAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.to_out((q @ k.transpose(-2, -1) / x.shape[-1] ** 0.5).softmax(-1) @ v)


class MiniMlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class MiniBlock(nn.Module):
    def __init__(self, width: int = 8, style: str = "plain") -> None:
        super().__init__()
        self.attn, self.ff, self.style = MiniAttention(width), MiniMlp(width), style

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if self.style == "in-place":  # changes what its modules return
            x = x + self.attn(x).mul_(gate)
            return x + self.ff(x).mul_(gate).add_(1)
        if self.style == "returns-sum":  # adds onto what its feed-forward returns
            return self.ff(x + gate * self.attn(x)).add_(x)
        x = x + gate * self.attn(x)
        return x + gate * (self.ff(x) if self.style == "plain" else self.ff(x) + self.ff(2 * x))


class Mini(nn.Module):
    """A transformer of nobody's: tokens in, tokens out."""

    def __init__(self, style: str = "plain", depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MiniBlock(width, style) for _ in range(depth)])
        self.head = nn.Identity() if style == "headless" else nn.Linear(width, width)
        tiny.randomize(self)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gate)
        return self.head(x)


def drift(k: int, tokens: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 2, tokens, 8, generator=generator)
    return x + 0.1 * k * y, torch.tensor(0.5 + 0.05 * k)


def run(model, cache, steps=6, frozen=False, batch_slice=slice(None)):
    out = []
    with torch.no_grad(), cache.run(steps):
        for k in range(steps):
            cache.step(k)
            x, gate = drift(0 if frozen else k)
            out.append(model(x[batch_slice].clone(), gate).clone())
    return out


OF_FILLS = {
    "gradient": Recipe(when=Counter(4, 3), fill=GradientQueue(1.2)),
    "gradient-computed-only": Recipe(when=Counter(4, 3), fill=GradientQueue(1.2, computed_only=True)),
    "gradient-duca": Recipe(
        when=DualInterval(4, sensitive_window=None),
        which=RandomTokens(spatial_bonus=None, **SHARE),
        fill=GradientQueue(1.2),
    ),
    "gradient-duca-computed-only": Recipe(
        when=DualInterval(4, sensitive_window=None),
        which=RandomTokens(spatial_bonus=None, **SHARE),
        fill=GradientQueue(1.2, computed_only=True),
    ),
    "linears": Recipe(where="linear", when=Every(4)),
}


@pytest.mark.parametrize("style", ["plain", "in-place", "returns-sum", "twice", "headless"])
@pytest.mark.parametrize("fill", OF_FILLS)
def test_fills_in_models_of_ones_own_on_frozen_inputs(style, fill):
    """A queue never holds what the model has changed in place since."""
    model = Mini(style)
    with torch.no_grad():
        expected = model(*drift(0))
    with dittocache.enable(model, OF_FILLS[fill]) as cache:
        for k, output in enumerate(run(model, cache, 11, frozen=True)):
            assert tiny.relative(output, expected) < 1e-5, f"step {k}"
        assert cache.trace.compute_fraction < 0.95


@pytest.mark.parametrize("method", ["gradient", "trend"])
def test_a_stack_is_filled_once_a_step(method):
    """Every block of a skipped stack asks; the correction is applied once."""
    model, steps = tiny.dit(), 4
    table = np.ones((steps, 1))
    table[2:] = 0
    trend = {f"transformer_blocks@{k}": 0.1 * torch.randn(16, 16) for k in range(steps)}
    fill = GradientQueue(0.5) if method == "gradient" else Trend(trend, 1.0)
    last: list[Tensor] = []
    handle = model.norm_out.register_forward_pre_hook(lambda m, a: last.append(a[0].clone()))
    with dittocache.enable(model, Recipe(when=Table(Plan(table, ("transformer_blocks",))), fill=fill)) as cache:
        tiny.predictions(model, cache, steps)
    handle.remove()
    for k in (2, 3):
        if method == "gradient":
            want = last[k - 1] + 0.5 * (last[k - 1] - last[k - 2])
        else:
            want = last[k - 1] * (1 + trend[f"transformer_blocks@{k}"])
        torch.testing.assert_close(last[k], want)


@pytest.mark.parametrize("style", ["plain", "in-place", "returns-sum", "twice", "headless"])
@pytest.mark.parametrize("method", ["fora", "toca-random", "toca-similarity", "duca-random"])
def test_models_of_ones_own_on_frozen_inputs(style, method):
    """Also such as change in place what their modules return, or call a feed-forward twice."""
    model = Mini(style)
    with torch.no_grad():
        expected = model(*drift(0))
    name, _, selector = method.partition("-")
    params = {"selector": selector, **SHARE, "spatial_bonus": None} if selector else {}
    with dittocache.enable(model, name, interval=4, **params) as cache:
        for k, output in enumerate(run(model, cache, 9, frozen=True)):
            assert tiny.relative(output, expected) < 1e-5, f"step {k}"
        assert cache.trace.compute_fraction < 0.9
    assert not tiny.traces_of_cache(model)


@pytest.mark.parametrize("style", ["in-place", "returns-sum"])
def test_in_place_models_on_changing_inputs(style):
    """Equal to a twin that computes the same out of place with the same features held."""
    model = Mini(style)
    with dittocache.enable(model, "fora", interval=4, anchor="start") as cache:
        outputs = run(model, cache, 8)
        table = cache.trace.table
    assert set(table[:, 0]) == {0, 1} and (table[2:4] == 0).all() and (table[4] == 1).all()
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for k, output in enumerate(outputs):
        x, gate = drift(k)
        with torch.no_grad():
            for n, block in enumerate(model.blocks):
                a = block.attn(x) if table[k, 2 * n] else held[n][0]
                held[n] = a, block.ff(x + gate * a) if table[k, 2 * n + 1] else held[n][1]
                a, f = held[n]
                x = x + gate * a + gate * f + 1 if style == "in-place" else f + x
            assert tiny.relative(model.head(x), output) < 1e-6, f"step {k}"


def test_in_place_models_in_two_threads():
    """The second thread's first forward runs while the first one's is still being looked at."""
    model = Mini("in-place")
    expected = model(*drift(0)).detach()
    reached, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread().name == "first" and not reached.is_set():
            reached.set()
            go_on.wait(20)

    with dittocache.enable(model, "fora", interval=8, anchor="start") as cache:
        handle = model.head.register_forward_pre_hook(wait)
        first = threading.Thread(target=run, args=(model, cache), kwargs={"frozen": True}, name="first")
        first.start()
        assert reached.wait(20)
        with torch.no_grad(), cache.run(3):
            outputs = []
            for k in range(3):
                cache.step(k)
                outputs.append(model(*drift(0)))
                go_on.set()
        first.join()
        handle.remove()
    for k, output in enumerate(outputs):
        assert tiny.relative(output, expected) < 1e-5, f"step {k}"


def test_in_place_models_under_caches_of_other_sites():
    """What the first cache did not keep is looked at when the second one does."""
    model = Mini("in-place")
    with torch.no_grad():
        expected = model(*drift(0))
    first, second = DDIMScheduler(), DDIMScheduler()
    with (
        dittocache.enable(model, Recipe(when=Every(3), where="attention"), scheduler=first) as a,
        dittocache.enable(model, Recipe(when=Every(3), where="feed-forward"), scheduler=second) as b,
    ):
        for cache in (a, b):
            for k, output in enumerate(run(model, cache, frozen=True)):
                assert tiny.relative(output, expected) < 1e-5, f"step {k}"


def test_the_caller_may_change_the_output_in_place():
    """A loop that scales the prediction in place does not reach what is kept."""
    model = Mini("headless")
    sites = (*(f"blocks.{n}.{m}" for n in range(3) for m in ("attn", "ff")), "blocks")
    table = np.ones((5, 7))
    table[1:] = 0
    plan = Plan(table, sites, kinds=("attention", "feed-forward") * 3 + ("stack",))
    with dittocache.enable(model, plan) as cache, torch.no_grad(), cache.run(5):
        expected = Mini("headless")(*drift(0))
        for k in range(5):
            cache.step(k)
            output = model(*drift(0))
            assert tiny.relative(output, expected) < 1e-5, f"step {k}"
            output.mul_(3)


def test_a_block_that_is_used_several_times():
    """Weights shared between layers: either every use keeps its own features, or it is refused and nothing changes."""
    model = Mini()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    with torch.no_grad():
        expected = model(*drift(0))
    try:
        cache = dittocache.enable(model, "fora")
    except ValueError as error:
        assert "\n" not in str(error) and "blocks" in str(error)
    else:
        with cache:
            for output in run(model, cache, frozen=True):
                assert tiny.relative(output, expected) < 1e-5
    assert not tiny.traces_of_cache(model)
    with torch.no_grad():
        assert torch.equal(model(*drift(0)), expected)


def test_a_class_of_ones_own_that_bears_a_known_name():
    """CompVis' BasicTransformerBlock, say, is not diffusers'."""
    BasicTransformerBlock = type("BasicTransformerBlock", (MiniBlock,), {})
    model = Mini()
    model.blocks = nn.ModuleList([BasicTransformerBlock() for _ in range(3)])
    tiny.randomize(model)
    with torch.no_grad():
        expected = model(*drift(0))
    for method, params in (("fora", {}), ("toca", {"selector": "similarity", "spatial_bonus": None, **SHARE})):
        with dittocache.enable(model, method, **params) as cache:
            for output in run(model, cache, 8, frozen=True):
                assert tiny.relative(output, expected) < 1e-5


def test_positional_and_keyword_inputs_of_modules():
    """FLUX calls its attention by keyword, DiT by position."""
    for name in ("dit", "flux"):
        model = tiny.build(name)
        with dittocache.enable(model, Recipe(when=Change(0.0))) as cache:
            outputs = tiny.predictions(model, cache, 3)
            assert all(
                torch.equal(a, b) for a, b in zip(outputs, tiny.predictions(tiny.build(name), None, 3), strict=True)
            )


# ---- shortcuts ------------------------------------------------------------------------------------------------------
FAMILIES = {
    "dit": ["BasicTransformerBlock"],
    "pixart": ["BasicTransformerBlock"],
    "flux": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
}


@pytest.mark.parametrize("method", ["fora", "toca-random", "duca-random"])
@pytest.mark.parametrize("name", FAMILIES)
def test_shortcuts_give_the_same_numbers_as_the_plain_path(name, method):
    model = tiny.build(name)
    method, _, selector = method.partition("-")
    params = {"selector": selector, "spatial_bonus": None, **SHARE} if selector else {"interval": 3}
    with dittocache.enable(model, method, **params) as cache:
        short = tiny.predictions(model, cache, 10)
        short_trace = cache.trace
    with contextlib.ExitStack() as stack:
        for family in FAMILIES[name]:
            stack.enter_context(tiny.patched_family(family, reuse_block=None))
        with dittocache.enable(model, method, **params) as cache:
            plain = tiny.predictions(model, cache, 10)
            assert cache.trace == short_trace
    for k, (a, b) in enumerate(zip(short, plain, strict=True)):
        assert tiny.relative(a, b) < 1e-6, f"step {k}"


@pytest.mark.parametrize("name", FAMILIES)
def test_shortcuts_are_taken(name):
    """On a reused step no norm of a block runs."""
    model = tiny.build(name)
    norms = [m for n, m in model.named_modules() if "blocks." in n and type(m) is nn.LayerNorm]
    calls = []
    with dittocache.enable(model, "fora", interval=4, anchor="start") as cache:
        handles = [m.register_forward_hook(lambda *a: calls.append(1)) for m in norms]
        tiny.predictions(model, cache, 1)
        once = len(calls)
        tiny.predictions(model, cache, 4)
        for handle in handles:
            handle.remove()
    assert once == len(norms) and len(calls) == 2 * once


@pytest.mark.parametrize("shortcut", [True, False])
def test_fused_blocks_skip_attention_and_feed_forward(shortcut):
    model = tiny.flux()
    changes = {} if shortcut else {"reuse_block": None}
    with (
        tiny.patched_family("FluxSingleTransformerBlock", **changes),
        dittocache.enable(model, "fora", interval=5, anchor="start") as cache,
        tiny.Counter(model) as counter,
    ):
        tiny.predictions(model, cache, 10)
    for n in range(2):
        for part in ("attn", "proj_mlp", "proj_out"):
            assert counter.calls[f"single_transformer_blocks.{n}.{part}"] == [23, 23]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype):
    model.to(dtype)

    def half(given):
        return {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() and not k.endswith("_ids") else v
            for k, v in given.items()
        }

    with torch.no_grad():
        expected = tiny.call(model, half(tiny.step(model, 0)))
        with dittocache.enable(model, "fora") as cache, cache.run(5):
            for k in range(5):
                cache.step(k)
                output = tiny.call(model, half(tiny.step(model, 0)))
                assert output.dtype == dtype and tiny.relative(output.float(), expected.float()) < 0.02


# ---- partial tokens -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_partial_tokens_equal_computing_all_and_selecting(name):
    """After a partial step the kept output is the fresh one at the computed tokens and the old one elsewhere."""
    model = tiny.build(name)
    ff = model.transformer_blocks[0].ff
    seen: list[tuple[Tensor, Tensor]] = []
    original = type(ff).forward

    def observe(self, x, *args, **kwargs):
        y = original(self, x, *args, **kwargs)
        if self is ff:
            seen.append((x, y))
        return y

    which = Straight(ratio=0.25, ratio_schedule="constant", spatial_bonus=None)
    recipe = Recipe(when=FirstThenPartial(), which=which)
    gated: list[tuple[Tensor, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ff), "forward", observe)
        outside = ff.register_forward_hook(lambda module, args, y: gated.append((args[0].clone(), y.clone())))
        with outside, dittocache.enable(model, recipe) as cache:
            tiny.predictions(model, cache, 4)
    held = gated[0][1]
    for k in range(1, 4):
        x, y = gated[k]
        rows = [4 * (k - 1), 4 * k]  # age decides, then position: 0-3, 4-7, 8-11
        fresh = original(ff, x)
        assert seen[k][0].shape[1] == 4
        assert torch.allclose(y[:, slice(*rows)], fresh[:, slice(*rows)], atol=1e-6)
        rest = torch.ones(y.shape[1], dtype=torch.bool)
        rest[slice(*rows)] = False
        assert torch.equal(y[:, rest], held[:, rest])
        held = y


@dataclass(frozen=True)
class FirstThenPartial(When):
    def table(self, num_steps, sites):
        table = np.full((num_steps, len(sites)), PARTIAL)
        table[0] = COMPUTE
        return table


@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad", "mixed"])
@pytest.mark.parametrize("method", ["fora", "toca", "duca", "eoc", "goc", "icc"])
def test_grad_modes(method, mode):
    """Under every mode, and changing between them, the numbers are the same."""
    model = tiny.dit()
    modes = {"no_grad": [torch.no_grad], "inference": [torch.inference_mode], "grad": [torch.enable_grad]}
    order = modes.get(mode, [torch.inference_mode, torch.no_grad])
    params = {"selector": "attention", **SHARE} if method in ("toca", "duca") else {}
    params |= tiny.data_for(method, model, 12, scale=1.0)
    with dittocache.enable(model, method, **params) as cache:
        expected = tiny.predictions(model, cache, 12)
        with cache.run(12):
            for k in range(12):
                cache.step(k)
                with order[k % len(order)]():
                    output = tiny.call(model, tiny.step(model, k, 12))
                    assert torch.allclose(output, expected[k], atol=1e-6), f"step {k}"


@pytest.mark.parametrize("method", ["toca", "eoc", "goc", "icc"])
def test_gradients_flow_and_no_graph_is_kept(method):
    """With gradients on, the features that are kept hold no graph of an earlier step."""
    model = tiny.dit()
    params = {"selector": "random", **SHARE} if method == "toca" else tiny.data_for(method, model, 10, scale=1.0)
    with dittocache.enable(model, method, **params) as cache, cache.run(10) as run:
        for k in range(10):
            cache.step(k)
            given = tiny.step(model, k, 10)
            given["hidden_states"].requires_grad_()
            tiny.call(model, given).sum().backward()
            assert given["hidden_states"].grad.abs().sum() > 0
            for entry in run.entries.values():
                assert not any(t.requires_grad for t in entry.tensors)


def test_factors_placed_in_inference_mode_serve_with_gradients_on():
    """The converted copy of a recipe's tensors is kept; made in inference mode, autograd would refuse it."""
    model = tiny.dit().double()
    given = {k: tiny.step(model, k) for k in range(3)}
    with dittocache.enable(model, "icc", **tiny.data_for("icc", model)) as cache:
        for mode in (torch.inference_mode, torch.enable_grad):
            with cache.run(3):
                for k in range(3):
                    x = given[k]["hidden_states"].detach().double()
                    cache.step(k)
                    with mode():
                        x = x.requires_grad_(mode is torch.enable_grad)
                        out = tiny.call(model, given[k] | {"hidden_states": x})
                        if k == 1 and mode is torch.enable_grad:
                            out.sum().backward()
                            assert x.grad.abs().sum() > 0


def test_fused_projections():
    """diffusers can fuse the projections that a selector listens to."""
    params = {"selector": "attention", **SHARE}
    model = tiny.dit()
    with dittocache.enable(model, "toca", **params) as cache:
        expected = tiny.predictions(model, cache, 10)
        trace = cache.trace
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
        block.attn1.set_processor(diffusers.models.attention_processor.FusedAttnProcessor2_0())
    with dittocache.enable(model, "toca", **params) as cache:
        for a, b in zip(tiny.predictions(model, cache, 10), expected, strict=True):
            assert tiny.relative(a, b) < 1e-5
        assert cache.trace == trace


def test_selection_by_attention_equals_the_explicit_map():
    """End to end: the tokens that DiT's feed-forward computes are those with the largest explicit column sums."""
    model = tiny.dit()
    attn, ff = model.transformer_blocks[1].attn1, model.transformer_blocks[1].ff
    asked: list[Tensor] = []
    received: list[Tensor] = []

    def columns(module, args, kwargs, output):
        x = args[0]
        q, k = (proj(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for proj in (attn.to_q, attn.to_k))
        received.append((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).mean(1).sum(1))

    which = dittocache.which.AttentionReceived(
        ratio=0.25, ratio_schedule="constant", soft_weight=0.0, spatial_bonus=None
    )
    with dittocache.enable(model, Recipe(when=FirstThenPartial(), which=which)) as cache, torch.no_grad(), cache.run(2):
        attn.to_out[0].register_forward_hook(lambda m, a, o: None)
        cache.step(0)
        handle = attn.register_forward_hook(columns, with_kwargs=True)
        tiny.call(model, tiny.step(model, 0))
        handle.remove()
        inputs: list[Tensor] = []
        ff.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        ff.net[0].register_forward_pre_hook(lambda m, a: asked.append(a[0]))
        cache.step(1)
        tiny.call(model, tiny.step(model, 1))
    best = received[0].topk(4).indices
    expected = inputs[0].gather(1, best.unsqueeze(-1).expand(-1, -1, 16))
    assert torch.equal(asked[0], expected)


def test_random_selections_are_shared_by_the_halves_and_seeded():
    model = tiny.dit()
    rows: list[Tensor] = []
    model.transformer_blocks[0].ff.net[0].register_forward_pre_hook(lambda m, a: rows.append(a[0]))
    ff_inputs: list[Tensor] = []
    with dittocache.enable(
        model, Recipe(when=FirstThenPartial(), which=RandomTokens(spatial_bonus=None, **SHARE))
    ) as cache:
        model.transformer_blocks[0].ff.register_forward_pre_hook(lambda m, a: ff_inputs.append(a[0]))
        with torch.no_grad(), cache.run(3):
            for k in range(3):
                cache.step(k)
                tiny.predict(model, tiny.latents(model), 900 - k, "batched")
    chosen = [
        [(x[b][:, None] == r[b][None]).all(-1).nonzero()[:, 0].tolist() for b in range(4)]
        for x, r in zip(ff_inputs[1:], rows[1:])
    ]
    for step in chosen:
        assert step[:2] == step[2:] and step[0] != step[1]
    assert chosen[0] != chosen[1]


# ---- bytes and FLOPs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["fora", "toca-value-norm", "duca-random"])
def test_bytes_reported_are_those_of_the_tensors_kept(model, method):
    method, _, selector = method.partition("-")
    params = {"selector": selector, "spatial_bonus": None, "interval": 4, **SHARE} if selector else {"interval": 4}
    with dittocache.enable(model, method, **params) as cache, torch.no_grad(), cache.run(8) as run:
        largest = 0
        for k in range(8):
            cache.step(k)
            tiny.call(model, tiny.step(model, k))
            kept = [t for e in run.entries.values() for t in (*(t for v in e.values for t in v), e.ages, e.observed)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not None}
            largest = max(largest, sum(storages.values()))
            assert cache.report().bytes_peak == largest, f"step {k}"
    # every attention and feed-forward output once, [2, tokens, channels] of 4 bytes
    outputs = {"DiTTransformer2DModel": 6 * 2 * 16 * 16, "PixArtTransformer2DModel": 9 * 2 * 16 * 16}
    outputs["FluxTransformer2DModel"] = 2 * 2 * 32 * (2 * (16 + 7) + (16 + 7))
    expected = 4 * outputs[type(model).__name__]
    assert largest == expected if method == "fora" else largest > expected


@pytest.mark.parametrize("guidance", ["none", "batched", "separate"])
def test_flops_equal_an_independent_count(model, guidance):
    """Of the untouched model, and of what really ran."""
    x = tiny.latents(model)

    def once():
        with torch.no_grad():
            tiny.predict(model, x, 500, guidance)

    per_step = tiny.count_flops(once)
    for shortcut in (True, False):
        with contextlib.ExitStack() as stack:
            for family in () if shortcut else (f for names in FAMILIES.values() for f in names):
                stack.enter_context(tiny.patched_family(family, reuse_block=None))
            with dittocache.enable(model, "fora", interval=3) as cache:

                def loop(cache=cache):
                    with torch.no_grad(), cache.run(7):
                        for k in range(7):
                            cache.step(k)
                            tiny.predict(model, x, 500, guidance)

                loop()  # measures
                done = tiny.count_flops(loop)
                report = cache.report()
        assert report.flops_full == 7 * per_step
        if shortcut:  # spends less than is booked: of the six modulations of a reused block only the gates are computed
            assert 0.97 * report.flops_done < done <= report.flops_done * (1 + 1e-6)
        else:
            assert report.flops_done == pytest.approx(done, rel=1e-6)
            assert report.compute_fraction == pytest.approx(done / (7 * per_step), rel=1e-6)


@pytest.mark.parametrize("whole_steps", [True, False])
@pytest.mark.parametrize("method", ["toca", "duca"])
def test_flops_of_partial_and_aggressive_steps_equal_an_independent_count(method, whole_steps):
    model = tiny.dit()
    params = {"selector": "random", "interval": 4, "per_block_kind": not whole_steps, **SHARE}
    with dittocache.enable(model, method, **params) as cache:
        tiny.predictions(model, cache, 10)
        done = tiny.count_flops(lambda: tiny.predictions(model, cache, 10))
        report = cache.report()
    full = 10 * tiny.count_flops(lambda: tiny.predictions(model, None, 1))
    assert report.flops_full == full
    # where block 0 is full within an aggressive step, its own norms run but count as skipped with the stack;
    # a block that is reused as a whole computes its gates only
    assert 0.97 * report.flops_done < done <= report.flops_done * (1 + (1e-6 if whole_steps else 0.01))


def test_flops_are_those_of_the_last_run_s_shape():
    model = tiny.dit()
    counted = {b: 5 * tiny.count_flops(lambda b=b: tiny.predictions(model, None, 1, batch=b)) for b in (1, 2)}
    with dittocache.enable(model, "fora") as cache:
        for batch in (1, 2, 1, 2):
            tiny.predictions(model, cache, 5, batch=batch)
            assert cache.report().flops_full == counted[batch], f"batch {batch}"


def test_measuring_does_not_disturb_the_user_s_own_count():
    model = tiny.dit()
    with dittocache.enable(model, "fora", interval=1) as cache, pytest.warns(UserWarning, match="skipped nothing"):
        assert tiny.count_flops(lambda: tiny.predictions(model, cache, 2)) == tiny.count_flops(
            lambda: tiny.predictions(tiny.dit(), None, 2)
        )


# ---- DuCa's mixed steps ---------------------------------------------------------------------------------------------
def test_aggressive_steps_touch_no_block_and_mixed_ones_only_the_first():
    """An aggressive step hands the last hidden state on; where only block 0 is full, its result is discarded."""
    from dittocache.when.soft import AGGRESSIVE, FULL, DualInterval

    steps, depth = 50, 3
    kinds, _ = DualInterval(3).kinds(steps, depth)
    model = tiny.dit()
    with dittocache.enable(model, "duca", selector="random", **SHARE) as cache:
        with tiny.Counter(model) as counter:
            per_step = []
            with torch.no_grad(), cache.run(steps):
                for k in range(steps):
                    before = {n: len(c) for n, c in counter.calls.items()}
                    cache.step(k)
                    tiny.call(model, tiny.step(model, k, steps))
                    per_step.append({n: len(c) - before[n] for n, c in counter.calls.items()})
        trace = cache.trace
    stack = trace.table[:, trace.sites.index("transformer_blocks")]
    mixed = 0
    for k in range(steps):
        for l in range(depth):
            attn = per_step[k][f"transformer_blocks.{l}.attn1"]
            assert attn == (kinds[k, l] == FULL), (k, l)
            if kinds[k, l] == AGGRESSIVE:
                assert per_step[k][f"transformer_blocks.{l}.ff"] == 0
        mixed += kinds[k, 0] == FULL and kinds[k, 1] == AGGRESSIVE
        assert stack[k] == (kinds[k, -1] != AGGRESSIVE)
    assert mixed == 1  # i = 32


def test_an_aggressive_step_repeats_the_last_hidden_state():
    model = tiny.dit()
    last: list[Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda m, a: last.append(a[0].clone()))
    with dittocache.enable(model, "duca", selector="random", interval=4, **SHARE) as cache:
        tiny.predictions(model, cache, 12)
        trace = cache.trace
    stack = trace.table[:, trace.sites.index("transformer_blocks")]
    assert 0 < stack.sum() < 12
    for k in range(1, 12):
        assert torch.equal(last[k], last[k - 1]) == (stack[k] == 0), f"step {k}"


# ---- parts of one's own ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Change(When):
    """Computes where the input has changed by more than a share since it was last computed; per sample if asked to."""

    threshold: float = 0.1
    per_sample: bool = False
    stack: bool = False

    @property
    def uses_stack(self):
        return self.stack

    def table(self, num_steps, sites):
        table = np.full((num_steps, len(sites)), OPEN)
        if self.stack:
            table[:, [site.kind != "stack" for site in sites]] = COMPUTE
        return table

    def decide(self, look, memory):
        x = look.state
        last = memory.get("last")
        if last is None or last.shape != x.shape:
            memory["last"] = x.clone()
            return COMPUTE
        moved = (x - last).flatten(1).norm(dim=1) / last.flatten(1).norm(dim=1) >= self.threshold
        if not self.per_sample:
            moved = moved.any().expand(len(x))
        memory["last"] = torch.where(moved.view(-1, *[1] * (x.ndim - 1)), x, last)
        if self.per_sample:
            return moved
        return COMPUTE if moved.any() else REUSE


@pytest.mark.parametrize("threshold", [0.0, 0.6, 100.0])
def test_a_dynamic_schedule(model, threshold):
    with dittocache.enable(model, Recipe(when=Change(threshold))) as cache:
        with tiny.Counter(model) as counter:
            tiny.predictions(model, cache, 8)
        trace = cache.trace
    assert trace.steps == tuple(range(8)) and (trace.table[0] == 1).all()
    for name, share in zip(trace.sites, trace.table.sum(0), strict=True):
        assert len(counter.calls[name]) == share
    expected = {0.0: 1.0, 100.0: 1 / 8}.get(threshold)
    if expected is None:
        assert 1 / 8 < trace.table.mean() < 1
        assert len({tuple(column) for column in trace.table.T}) > 1  # sites decide on their own
    else:
        assert trace.table.mean() == expected


def test_a_dynamic_schedule_on_fused_blocks_skips_the_modules_that_feed_them():
    model = tiny.flux()
    with dittocache.enable(model, Recipe(when=Change(100.0))) as cache, tiny.Counter(model) as counter:
        tiny.predictions(model, cache, 6)
        assert (cache.trace.table.sum(0) == 1).all()
    assert all(len(calls) == 1 for calls in counter.calls.values())


def test_a_dynamic_schedule_on_frozen_inputs(model):
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    with dittocache.enable(model, Recipe(when=Change(0.05))) as cache:
        for output in tiny.predictions(model, cache, 6, frozen=True):
            assert tiny.relative(output, expected) < 1e-5
        assert cache.trace.table.sum() == cache.trace.table.shape[1]


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_dynamic_decision_over_whole_stacks(name):
    model = tiny.build(name)
    last: list[Tensor] = []
    after = model.norm_out if name == "dit" else model.single_transformer_blocks[0]
    pick = lambda a, kw: (a[0] if a else kw["hidden_states"]).clone()  # noqa: E731
    after.register_forward_pre_hook(lambda m, a, kw: last.append(pick(a, kw)), with_kwargs=True)
    with dittocache.enable(model, Recipe(when=Change(0.3, stack=True))) as cache:
        tiny.predictions(model, cache, 8)
        trace = cache.trace
    stack = trace.table[:, trace.sites.index("transformer_blocks")]
    assert stack[0] == 1 and 1 < stack.sum() < 8
    for k in range(1, 8):
        assert torch.equal(last[k], last[k - 1]) == (stack[k] == 0), f"step {k}"


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_plan_over_stacks_alone_skips_their_blocks(name):
    """Sites that a plan does not name are not its business: a skipped stack runs none of them."""
    model = tiny.build(name)
    stacks = [s.site.name for s in dittocache.describe(model).stacks]
    table = np.zeros((6, len(stacks)))
    table[[0, 3]] = 1
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    for kinds in (("stack",) * len(stacks), ()):  # the names alone say what they are
        with dittocache.enable(model, Plan(table, tuple(stacks), kinds=kinds)) as cache:
            with tiny.Counter(model) as counter:
                for output in tiny.predictions(model, cache, 6, frozen=True):
                    assert tiny.relative(output, expected) < 1e-5
            assert cache.trace.compute_fraction < 0.6
        assert all(len(calls) == 2 for calls in counter.calls.values())


def test_decisions_per_sample_do_not_depend_on_the_batch():
    model = tiny.dit()
    recipe = Recipe(when=Change(0.3, per_sample=True))

    def sample_run(rows):
        out = []
        with torch.no_grad(), cache.run(8):
            for k in range(8):
                cache.step(k)
                # the first sample barely moves, the last one does
                given = tiny.step(model, 0, 8, 3)
                other = tiny.step(model, k, 8, 3)
                mix = torch.tensor([0.05, 0.5, 1.0]).view(3, 1, 1, 1)
                given["hidden_states"] = given["hidden_states"] * (1 - mix) + other["hidden_states"] * mix
                out.append(tiny.call(model, {n: v[rows] if torch.is_tensor(v) else v for n, v in given.items()}))
        return torch.stack(out), cache.trace

    with dittocache.enable(model, recipe) as cache:
        together, trace = sample_run(slice(None))
        assert ((trace.table > 0) & (trace.table < 1)).any()
        for n in range(3):
            alone, _ = sample_run(slice(n, n + 1))
            assert tiny.relative(alone, together[:, n : n + 1]) < 1e-5


@dataclass(frozen=True)
class Line(Fill):
    """A line through the last two outputs."""

    def keep(self, entry: Entry, value, at) -> None:
        entry.values, entry.steps = [value, *entry.values[:1]], [at.step, *entry.steps[:1]]

    def fill(self, entry: Entry, at):
        if len(entry.values) < 2:
            return entry.values[0]
        (new, old), (k, j) = entry.values, entry.steps
        return tuple(a + (a - b) * (at.step - k) / (k - j) for a, b in zip(new, old, strict=True))


def test_a_fill_of_ones_own():
    """Frozen inputs stay exact; on a linear drift of a linear site a line is exact where holding is not."""
    model = tiny.dit()
    recipe = Recipe(when=Every(3), fill=Line())
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    with dittocache.enable(model, recipe) as cache:
        for output in tiny.predictions(model, cache, 9, frozen=True):
            assert tiny.relative(output, expected) < 1e-4
    mini = Mini()
    for block in mini.blocks:  # linear in its input, so that features drift on a line
        block.ff[1] = nn.Identity()
        block.attn.to_out.weight.data.zero_()
    plain = [mini(drift(k)[0], drift(0)[1]).detach() for k in range(6)]
    errors = {}
    for fill in (Hold(), Line()):
        table = np.zeros((6, 6))
        table[:2] = 1
        plan = Plan(table, tuple(s.name for s in dittocache.describe(mini).sites[:6]))
        with dittocache.enable(mini, Recipe(when=Table(plan), fill=fill)) as cache, torch.no_grad(), cache.run(6):
            worst = 0.0
            for k in range(6):
                cache.step(k)
                worst = max(worst, tiny.relative(mini(drift(k)[0], drift(0)[1]), plain[k]))
            errors[type(fill).__name__] = worst
    assert errors["Line"] < 1e-5 < 1e-2 < errors["Hold"]


@dataclass(frozen=True)
class Scale(Fix):
    factor: float = 2.0

    def fix(self, noise, at):
        seen.append((at.step, at.num_steps, at.share))
        return noise * (self.factor if at.share < 1 else 1.0)


seen: list[tuple[int, int, float]] = []


def test_a_fix_of_ones_own():
    """It is handed what the scheduler would get, and told which share was computed."""
    model, scheduler = tiny.dit(), DDIMScheduler()
    seen.clear()
    plan = Recipe(when=Every(2, anchor="start"))
    with dittocache.enable(model, plan, scheduler=scheduler):
        without = tiny.sample(model, scheduler, 4)
    with dittocache.enable(model, Recipe(when=Every(2, anchor="start"), fix=Scale(1.0)), scheduler=scheduler):
        assert torch.equal(tiny.sample(model, scheduler, 4), without)
    assert seen == [(0, 4, 1.0), (1, 4, 0.0), (2, 4, 1.0), (3, 4, 0.0)]
    with dittocache.enable(model, Recipe(when=Every(2, anchor="start"), fix=Scale(3.0)), scheduler=scheduler):
        fixed = tiny.sample(model, scheduler, 4)
    handmade = DDIMScheduler()
    with dittocache.enable(model, plan) as cache, cache.run(4), torch.no_grad():
        x = tiny.latents(model)
        handmade.set_timesteps(4)
        for k, t in enumerate(handmade.timesteps):
            cache.step(k)
            x = handmade.step(tiny.predict(model, x, t) * (3.0 if k % 2 else 1.0), t, x).prev_sample
    assert torch.equal(fixed, x)


@dataclass(frozen=True)
class EveryOther(Which):
    """Tokens 0, 2, 4, ..."""

    name = "every-other"
    normalized = False

    def base(self, observed, x, held, halves, generator):
        return -(torch.arange(x.shape[1]) % 2).float().expand(len(x), -1)


def test_a_selector_of_ones_own():
    model = tiny.dit()
    which = EveryOther(ratio=0.5, ratio_schedule="constant", soft_weight=0.0, spatial_bonus=None)
    inputs, rows = [], []
    with dittocache.enable(model, Recipe(when=FirstThenPartial(), which=which)) as cache:
        model.transformer_blocks[2].ff.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        model.transformer_blocks[2].ff.net[0].register_forward_pre_hook(lambda m, a: rows.append(a[0]))
        tiny.predictions(model, cache, 3)
        assert (cache.trace.table[1:, [s.endswith("ff") for s in cache.trace.sites]] == 0.5).all()
    assert torch.equal(rows[1], inputs[1][:, ::2]) and torch.equal(rows[2], inputs[2][:, ::2])


@dataclass(frozen=True)
class Half(When):
    def table(self, num_steps, sites):
        table = np.full((num_steps, len(sites)), 0.5)
        table[0] = COMPUTE
        return table


def test_a_schedule_with_shares_needs_a_selector_and_token_wise_sites():
    """An impossible mix is refused with an error that says why, at the latest when the run begins."""
    model = tiny.dit()
    with dittocache.enable(model, Recipe(when=Half())) as cache, pytest.raises(ValueError, match="which") as e:
        tiny.predictions(model, cache, 3)
    assert "\n" not in str(e.value)
    which = Straight(**SHARE)
    with (
        dittocache.enable(model, Recipe(when=Half(), which=which)) as cache,
        pytest.raises(ValueError, match="token-wise"),
    ):
        tiny.predictions(model, cache, 3)
    with dittocache.enable(model, Recipe(when=Half(), which=which, where="feed-forward")) as cache:
        tiny.predictions(model, cache, 3)
        assert (cache.trace.table[1:] == 0.5).all()


# ---- with other people's hooks --------------------------------------------------------------------------------------
def test_hooks_that_were_there_before_stay_and_work(model):
    before, pre = [], []
    site = model.transformer_blocks[0].ff
    handles = [
        site.register_forward_hook(lambda *a: before.append(1)),
        model.register_forward_pre_hook(lambda *a: pre.append(1)),
    ]
    with dittocache.enable(model, "fora") as cache:
        tiny.predictions(model, cache, 4)
    assert len(pre) == 4 and len(before) == 2  # a block that is reused as a whole does not call its modules
    tiny.call(model, tiny.step(model, 0))
    assert len(pre) == 5 and len(before) == 3
    for handle in handles:
        handle.remove()
    assert not tiny.traces_of_cache(model)


def test_a_forward_of_the_user_s_own_comes_back():
    model = tiny.dit()
    site = model.transformer_blocks[0].ff
    own = lambda x: 2 * type(site).forward(site, x)  # noqa: E731
    site.forward = own
    expected = tiny.predictions(model, None, 1)[0]
    with dittocache.enable(model, "fora") as cache:
        for output in tiny.predictions(model, cache, 4, frozen=True):
            assert tiny.relative(output, expected) < 1e-5
    assert site.forward is own
    assert torch.equal(tiny.predictions(model, None, 1)[0], expected)


def test_diffusers_hooks_of_others_survive():
    """Layerwise casting and the like sit in the same registries."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    for order in ("before", "after"):
        model = tiny.dit()
        site, block = model.transformer_blocks[0].ff, model.transformer_blocks[1]
        Count.calls = 0
        if order == "before":
            for module in (site, block):
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Count(), "mine")
        cache = dittocache.enable(model, "fora")
        if order == "after":
            for module in (site, block):
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Count(), "mine")
        tiny.predictions(model, cache, 4)
        cache.disable()
        assert site._diffusers_hook._hook_order == block._diffusers_hook._hook_order == ["mine"]
        Count.calls = 0
        output = tiny.predictions(model, None, 1)[0]
        assert Count.calls == 2
        for module in (site, block):
            module._diffusers_hook.remove_hook("mine", recurse=False)
        assert torch.equal(tiny.predictions(model, None, 1)[0], output)


def test_cache_context_of_diffusers_is_left_alone():
    """Pipelines wrap their calls in it; hooks that come and go do not confuse it."""
    model = tiny.flux()
    expected = tiny.predictions(model, None, 1)[0]
    for _ in range(2):
        with dittocache.enable(model, "fora") as cache, torch.no_grad(), cache.run(4):
            for k in range(4):
                cache.step(k)
                with model.cache_context("cond"):
                    assert tiny.relative(tiny.call(model, tiny.step(model, 0)), expected) < 1e-5
        with model.cache_context("cond"), torch.no_grad():
            assert torch.equal(tiny.call(model, tiny.step(model, 0)), expected)


def test_gradient_checkpointing_computes_the_same():
    model = tiny.dit()
    model.enable_gradient_checkpointing()
    plain = tiny.call(tiny.dit(), tiny.step(model, 0)).detach()
    with dittocache.enable(model, "fora") as cache, cache.run(4):
        for k in range(4):
            cache.step(k)
            given = tiny.step(model, 0)
            given["hidden_states"].requires_grad_()
            output = tiny.call(model, given)
            assert tiny.relative(output.detach(), plain) < 1e-5
            if k == 0:
                output.sum().backward()


def test_nothing_of_the_hooks_module_leaks_to_models_without_a_cache():
    on, off = tiny.dit(), tiny.dit()
    with dittocache.enable(on, "fora"):
        assert not tiny.traces_of_cache(off) and tiny.traces_of_cache(on)
        assert hooks.caches_on(off) == [] and len(hooks.caches_on(on)) == 1


def test_flops_do_not_depend_on_the_recipe_that_counted_them():
    """A fused block's attention is counted on its own, and with the block's one site."""

    def done(*places):
        model, found = tiny.build("flux"), {}
        for where in places:
            with dittocache.enable(model, Recipe(when=Every(3), where=where)) as cache:
                tiny.predictions(model, cache, 6)
                found[where] = cache.report().flops_done
        return found

    places = ["attention", "module", "linear", "block"]
    assert done(*places) == done(*reversed(places))
