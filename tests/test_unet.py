"""U-Nets: what lies below a skip branch is left out, attentions keep their change. DeepCache and Block Caching."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dittocache
from dittocache import Plan, Recipe
from dittocache.calibrate import Setup, calibrate
from dittocache.plan import COMPUTE, OPEN, Site
from dittocache.when import ChangeBudget, Every, PowerSteps, When
from dittocache.when.power import spread

STEPS = 6
KINDS = {
    "sd": {},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
    },
    "one pair": {"layers_per_block": 1},
    "uneven": {"layers_per_block": (1, 2, 1)},
    "no middle": {"mid_block_type": None},
    "simple": {  # Kandinsky 2, DeepFloyd IF
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2 + ("ResnetDownsampleBlock2D",),
        "up_block_types": ("ResnetUpsampleBlock2D",) + ("SimpleCrossAttnUpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
}
# number of skip sources: conv_in, pairs of every level, downsamplers of all levels but the last
BRANCHES = {"sd": 9, "sdxl": 9, "one pair": 6, "uneven": 7, "no middle": 8, "simple": 9}
ALL = [(kind, b) for kind in KINDS for b in range(BRANCHES[kind])]


def build(kind="sd", **config):
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    } | KINDS[kind]
    return tiny.randomize(UNet2DConditionModel(**config))


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture
def unet(built):
    yield built["sd"]
    assert not tiny.traces_of_cache(built["sd"])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(k, batch=2, side=8, **more):
    """Of step k; different ones in every step."""
    text = noise(4, tiny.TEXT, 12, seed=99)[:batch]
    return {
        "sample": noise(4, 4, side, side, seed=k)[:batch],
        "timestep": 900 - 100 * k,
        "encoder_hidden_states": text,
    } | more


@torch.no_grad()
def predict(unet, given):
    return unet(**given).sample


def sample(unet, cache=None, steps=STEPS, given=inputs):
    """The prediction of every step."""
    outputs = []
    with contextlib.nullcontext() if cache is None else cache.run(steps):
        for k in range(steps):
            if cache is not None:
                cache.step(k)
            outputs.append(predict(unet, given(k)))
    return outputs


def frozen(k):
    return inputs(0)


def member(name, path):
    return name == path or name.startswith(f"{path}.")


def modules_of(unet, branch):
    """Paths of the modules of deep.BRANCH, in order of execution."""
    description = dittocache.describe(unet)
    span = next(span for span in description.spans if span.site.name == f"deep.{branch}")
    return [description.blocks[n].name for n in span.blocks]


class Calls:
    """How often each convolution and linear layer really runs."""

    def __init__(self, unet):
        self.counts = Counter()
        self.handles = [
            module.register_forward_pre_hook(lambda m, a, name=name: self.counts.update([name]))
            for name, module in unet.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ]

    def __enter__(self):
        return self.counts

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


# ---- spans ----------------------------------------------------------------------------------------------------------
def plugin_members(levels, branch):
    """The rule of the authors' plug-in, for two pairs to a level: (place, level, number) of what is left out."""
    level, number = divmod(branch, 3)
    down = [(q, r) for q in range(levels) for r in range(3 if q < levels - 1 else 2)]
    left = {
        f"down_blocks.{q}.{'downsamplers.0' if r == 2 else f'pair.{r}'}" for q, r in down if (q, r) >= (level, number)
    }
    up = [(q, r) for q in range(levels) for r in range(3)]  # both counted from the end
    left |= {f"up_blocks.{levels - 1 - q}.pair.{2 - r}" for q, r in up if q > level or (q == level and r > number)}
    return left | {f"up_blocks.{levels - 1 - q}.upsamplers.0" for q in range(1, levels) if q > level} | {"mid_block"}


@pytest.mark.parametrize("branch", range(9))
def test_branches_are_those_of_the_plugin(unet, branch):
    paths = {p.replace("resnets", "pair").replace("attentions", "pair") for p in modules_of(unet, branch)}
    assert {"mid_block" if p.startswith("mid_block") else p for p in paths} == plugin_members(3, branch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_skip_source_is_a_branch(built, kind):
    spans = [span.site for span in dittocache.describe(built[kind]).spans]
    assert [site.name for site in spans if site.kind == "deep"] == [f"deep.{b}" for b in range(BRANCHES[kind])]
    attentions = [name for name, m in built[kind].named_modules() if ".attentions." in name and name[-1].isdigit()]
    attentions = [name for name in attentions if name.rpartition(".")[0].endswith(".attentions")]
    assert {site.name for site in spans if site.kind == "block"} == set(attentions)
    assert len({site.name for site in dittocache.describe(built[kind]).columns}) == len(
        dittocache.describe(built[kind]).columns
    )


def test_modules_are_in_order_of_execution(unet):
    description, seen = dittocache.describe(unet), []
    names = {id(block.module): block.name for block in description.blocks}
    handles = [
        block.module.register_forward_pre_hook(lambda m, a: seen.append(names[id(m)])) for block in description.blocks
    ]
    predict(unet, inputs(0))
    for handle in handles:
        handle.remove()
    inner = [block.name for block in description.blocks if block.sites]
    assert inner == [name for name in seen if name in inner]
    outer = [block.name for block in description.blocks if not block.sites]
    assert outer == [name for name in seen if name in outer]


def test_what_is_printed(built):
    text = str(dittocache.describe(built["sdxl"]))
    assert text.startswith("UNet2DConditionModel: 84 sites in 28 blocks\n  all: 28 x BasicTransformerBlock")
    assert "\n  block: 11 x Transformer2DModel" in text and "\n  resnet: 17 x ResnetBlock2D" in text
    assert "\n  deep.8: 3 modules, mid_block.resnets.0 to mid_block.resnets.1" in text
    assert len(text.splitlines()) == 18
    simple = str(dittocache.describe(built["simple"]))
    assert simple.startswith("UNet2DConditionModel: 0 sites in 0 blocks\n") and "\n  block: 11 x Attention" in simple


# ---- DeepCache ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "branch"), ALL)
def test_frozen_input_is_exact_and_only_shallow_modules_run(built, kind, branch):
    unet = built[kind]
    with Calls(unet) as full:
        expected = predict(unet, frozen(0))
    deep = modules_of(unet, branch)
    with dittocache.enable(unet, "deepcache", interval=3, branch_id=branch) as cache:
        with Calls(unet) as counts:
            outputs = sample(unet, cache, given=frozen)
        trace = cache.trace
    assert all(torch.equal(output, expected) for output in outputs)
    assert trace.sites == (f"deep.{branch}",) and trace.table[:, 0].tolist() == [1, 0, 0, 1, 0, 0]
    for name, calls in full.items():
        skipped = any(member(name, path) for path in deep)
        assert counts[name] == calls * (2 if skipped else STEPS), name
    assert not tiny.traces_of_cache(unet)


def test_branch_0_runs_the_ends_only(unet):
    with dittocache.enable(unet, "deepcache", interval=STEPS, branch_id=0) as cache, cache.run(2):
        cache.step(0)
        predict(unet, inputs(0))
        cache.step(1)
        with Calls(unet) as counts:
            predict(unet, inputs(1))
    ends = ("time_embedding", "conv_in", "up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "conv_out")
    assert {next(end for end in (*ends, "other") if member(name, end) or end == "other") for name in counts} == set(
        ends
    )


def by_hand(unet, branch, interval, steps=STEPS, given=inputs):
    """Whole forwards, with the output of the span's last module replaced by that of the last full step."""
    module, kept, outputs = unet.get_submodule(modules_of(unet, branch)[-1]), [], []

    def see(module, args, output):
        kept[:] = [output.clone() if isinstance(output, torch.Tensor) else output[0].clone()]

    def replace(module, args, output):
        return kept[0].clone() if isinstance(output, torch.Tensor) else (kept[0].clone(),)

    for k in range(steps):
        handle = module.register_forward_hook(replace if k % interval else see)
        outputs.append(predict(unet, given(k)))
        handle.remove()
    return outputs


def check_by_hand(unet, branch, interval=2, given=inputs, **params):
    expected = by_hand(unet, branch, interval, given=given)
    with dittocache.enable(unet, "deepcache", interval=interval, branch_id=branch, **params) as cache:
        outputs = sample(unet, cache, given=given)
    for output, right in zip(outputs, expected, strict=True):
        assert torch.equal(output, right)


@pytest.mark.parametrize(("kind", "branch"), ALL)
def test_what_is_reused_is_the_input_of_the_branch(built, kind, branch):
    check_by_hand(built[kind], branch)
    full, reused = predict(built[kind], inputs(1)), by_hand(built[kind], branch, 2, steps=2)[1]
    assert not torch.equal(full, reused)  # it is another prediction than a full step's


@pytest.mark.parametrize("branch", [0, 2, 5, 8])
@pytest.mark.parametrize("side", [9, 10])
def test_sizes_that_do_not_divide(unet, branch, side):
    check_by_hand(unet, branch, given=lambda k: inputs(k, side=side))


@pytest.mark.parametrize("branch", [0, 1, 2, 4, 5, 7, 8])
def test_control_and_adapters(unet, branch):
    """A T2I adapter writes into what levels return, left out or not; a ControlNet's residuals are fresh."""

    def adapted(k):
        shapes = ((2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 2, 2))
        return inputs(k, down_intrablock_additional_residuals=[noise(*shape, seed=k + 50) for shape in shapes])

    check_by_hand(unet, branch, given=adapted)
    sides = [(8, 8)] * 3 + [(8, 4)] + [(16, 4)] * 2 + [(16, 2)] * 3

    def controlled(k):
        residuals = [noise(2, c, s, s, seed=k + 70) for c, s in sides]
        middle = noise(2, 16, 2, 2, seed=k + 80)
        return inputs(k, down_block_additional_residuals=residuals, mid_block_additional_residual=middle)

    check_by_hand(unet, branch, given=controlled)


@pytest.mark.parametrize("branch", [1, 4, 8])
def test_freeu_which_changes_features_in_place(built, branch):
    unet = built["sd"]
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    try:
        with dittocache.enable(unet, "deepcache", interval=2, branch_id=branch) as cache:
            sample(unet, cache)  # what is changed in place is noticed, computed again, and copied from then on
            outputs, trace = sample(unet, cache), cache.trace
        assert trace.table[:, 0].tolist() == [1, 0, 1, 0, 1, 0]
        assert all(torch.equal(a, b) for a, b in zip(outputs, by_hand(unet, branch, 2), strict=True))
    finally:
        unet.disable_freeu()


@pytest.mark.parametrize("branch", [0, 4])
def test_one_tensor_is_kept(unet, branch):
    with dittocache.enable(unet, "deepcache", interval=2, branch_id=branch) as cache:
        sample(unet, cache)
        kept = cache.report().bytes_peak
    assert kept == {0: 2 * 8 * 8 * 8, 4: 2 * 16 * 4 * 4}[branch] * 4


@pytest.mark.parametrize("branch", [0, 1, 5, 8])
def test_flops_are_those_that_are_spent(unet, branch):
    each = tiny.count_flops(lambda: predict(unet, inputs(0)))
    with dittocache.enable(unet, "deepcache", interval=3, branch_id=branch) as cache:
        sample(unet, cache)
        spent = tiny.count_flops(lambda: sample(unet, cache))
        report = cache.report()
    assert report.flops_full == STEPS * each and report.flops_done == spent
    assert report.compute_fraction == pytest.approx(spent / (STEPS * each))


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "text", "side", "shares"),
    [
        ({"attention_head_dim": 8}, 768, 64, [8, 22, 38, 47, 56, 67, 76, 85, 94, 96, 97, 98]),
        (XL, 2048, 128, [1, 4, 7, 13, 21, 31, 44, 66, 88]),
    ],
    ids=["sd", "sdxl"],
)
def test_shares_of_the_published_shapes(config, text, side, shares):
    """The table in docs/methods/deepcache.md, in percent."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=text, **config)
        given = {"sample": torch.empty(1, 4, side, side), "timestep": torch.tensor(500)}
        given["encoder_hidden_states"] = torch.empty(1, 77, text)
    description, began, spent = dittocache.describe(unet), {}, {}
    with FlopCounterMode(display=False) as counter:
        for block in description.blocks:
            block.module.register_forward_pre_hook(lambda m, a: began.__setitem__(m, counter.get_total_flops()))
            block.module.register_forward_hook(
                lambda m, a, out, name=block.name: spent.__setitem__(name, counter.get_total_flops() - began[m])
            )
        predict(unet, given)
    deep = [span for span in description.spans if span.site.kind == "deep"]
    below = [sum(spent[description.blocks[n].name] for n in span.blocks) for span in deep]
    assert [round(100 * (1 - flops / counter.get_total_flops())) for flops in below] == shares


def test_all_computed_is_the_untouched_model(unet):
    plain = sample(unet)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped nothing")
        with dittocache.enable(unet, "deepcache", interval=1, branch_id=3) as cache:
            assert all(torch.equal(a, b) for a, b in zip(sample(unet, cache), plain, strict=True))


def test_disabling_restores_the_model(unet):
    before, plain = tiny.fingerprint(unet), predict(unet, inputs(1))
    cache = dittocache.enable(unet, "deepcache")
    sample(unet, cache)
    cache.disable()
    assert tiny.fingerprint(unet) == before and torch.equal(predict(unet, inputs(1)), plain)


def test_runs_do_not_see_each_other(unet):
    with dittocache.enable(unet, "deepcache", interval=3, branch_id=1) as cache:
        first = sample(unet, cache)
        sample(unet, cache, given=lambda k: inputs(k + 7, batch=1, side=10))
        with contextlib.suppress(ZeroDivisionError), cache.run(STEPS):
            cache.step(0)
            predict(unet, inputs(3))
            raise ZeroDivisionError
        assert all(torch.equal(a, b) for a, b in zip(sample(unet, cache), first, strict=True))
        one, other, outputs = cache.run(2), cache.run(2), {9: [], 10: []}
        for k in range(2):  # in turn: 5 x 5 grows to another size in each
            for run, side in ((one, 9), (other, 10)):
                with run:
                    run.step(k)
                    outputs[side].append(predict(unet, inputs(k, side=side)))
    for side, found in outputs.items():
        expected = by_hand(unet, 1, 3, steps=2, given=lambda k, side=side: inputs(k, side=side))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), side


def test_branches_of_guidance_are_kept_apart(unet):
    def unconditional(k):
        return inputs(k, encoder_hidden_states=torch.zeros(2, tiny.TEXT, 12))

    with dittocache.enable(unet, "deepcache", interval=3, branch_id=3) as cache:
        apart = [sample(unet, cache, given=given) for given in (inputs, unconditional)]
        with cache.run(STEPS):
            for k in range(STEPS):
                cache.step(k)
                for given, alone in zip((inputs, unconditional), apart, strict=True):
                    assert torch.equal(predict(unet, given(k)), alone[k])


def test_in_inference_mode(unet):
    with torch.inference_mode():
        check_by_hand(unet, 3)


def test_a_trace_is_replayed(unet):
    with dittocache.enable(unet, "deepcache", interval=3, branch_id=4) as cache:
        first, trace = sample(unet, cache), cache.trace
    with dittocache.enable(unet, Plan.from_json(trace.to_json())) as cache:
        assert all(torch.equal(a, b) for a, b in zip(sample(unet, cache), first, strict=True))


@dataclass(frozen=True)
class Alternate(When):
    """Sample j is computed at steps of j's parity, all at step 0."""

    def table(self, num_steps, sites):
        return np.full((num_steps, len(sites)), OPEN)

    def decide(self, look, memory):
        return (torch.arange(len(look.state)) + look.step) % 2 == 0


@pytest.mark.parametrize("branch", [0, 3, 8])
def test_samples_can_be_decided_on_their_own(unet, branch):
    """Of each sample comes what a run of its own, with its own steps, gives."""

    def alone(j):
        return lambda k: {name: v[j : j + 1] if isinstance(v, torch.Tensor) else v for name, v in inputs(k).items()}

    with dittocache.enable(unet, Recipe(Alternate(), where=f"deep.{branch}")) as cache:
        together = sample(unet, cache)
        assert cache.trace.table[:, 0].tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0.5]
    for j in range(2):
        table = [[float(k == 0 or (k + j) % 2 == 0)] for k in range(STEPS)]
        with dittocache.enable(unet, Plan(table, (f"deep.{branch}",))) as cache:
            expected = sample(unet, cache, given=alone(j))
        for output, right in zip(together, expected, strict=True):
            torch.testing.assert_close(output[j : j + 1], right, rtol=1e-4, atol=1e-5)


def test_a_narrow_span_within_a_wide_one(unet):
    """Full, below source 5 from before, all below source 1 from before."""
    with dittocache.enable(unet, Plan([[1, 1], [1, 0], [0, 0]], ("deep.1", "deep.5"))) as cache:
        outputs = sample(unet, cache, steps=3)
    expected = by_hand(unet, 5, 3, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=False))
    inner, outer = (unet.get_submodule(modules_of(unet, b)[-1]) for b in (5, 1))
    kept = {}
    handles = [inner.register_forward_hook(lambda m, a, o: kept.setdefault("inner", o))]
    predict(unet, inputs(0))
    handles.append(inner.register_forward_hook(lambda m, a, o: kept["inner"]))
    handles.append(outer.register_forward_hook(lambda m, a, o: kept.setdefault("outer", o)))
    predict(unet, inputs(1))
    assert torch.equal(predict(unet, inputs(2)), outputs[2])
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("branch", range(6))
def test_unconditional_unets(branch):
    """Those of DDPM: attentions without blocks of a transformer."""
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4}
    unet = tiny.randomize(diffusers.UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **kinds, **sizes))
    check_by_hand(unet, branch, given=lambda k: {"sample": noise(2, 4, 8, 8, seed=k), "timestep": 900 - 100 * k})


# ---- other recipes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "method", "params"),
    [
        ("sd", "fora", {"interval": 3}),
        ("sdxl", "fora", {"interval": 3}),
        ("sd", "taylorseer", {"interval": 3, "order": 1}),
        ("sdxl", "toca", {"selector": "random", "spatial_bonus": None}),
    ],
)
def test_methods_of_modules(built, kind, method, params):
    unet = built[kind]
    expected = predict(unet, frozen(0))
    with dittocache.enable(unet, method, **params) as cache:
        outputs = sample(unet, cache, steps=8, given=frozen)
        spent = tiny.count_flops(lambda: sample(unet, cache, steps=8, given=frozen))
        report = cache.report()
    assert all(tiny.relative(output, expected) < 1e-5 for output in outputs)
    assert spent < 0.99 * report.flops_full
    if method == "fora":  # the shortcut of its blocks leaves a little more out than modules
        assert 0.95 * report.flops_done < spent <= report.flops_done


def test_blocks_keep_what_they_add(unet):
    """All attentions reused: their change of step 0 is added to their present input."""
    blocks = [name for name, m in unet.named_modules() if type(m).__name__ == "Transformer2DModel"]
    added, handles = {}, []

    def see(name):
        return lambda m, args, output: added.__setitem__(name, output[0] - args[0])

    def replace(name):
        return lambda m, args, output: (args[0] + added[name],)

    for name in blocks:
        handles.append(unet.get_submodule(name).register_forward_hook(see(name)))
    expected = [predict(unet, inputs(0))]
    for handle, name in zip(list(handles), blocks, strict=True):
        handle.remove()
        handles.append(unet.get_submodule(name).register_forward_hook(replace(name)))
    expected += [predict(unet, inputs(k)) for k in (1, 2)]
    for handle in handles:
        handle.remove()
    with dittocache.enable(unet, Recipe(Every(3, anchor="start"), where="block", keeps="change")) as cache:
        outputs = sample(unet, cache, steps=3)
        spent, report = tiny.count_flops(lambda: sample(unet, cache, steps=3)), cache.report()
    assert set(cache.trace.sites) == set(blocks) and report.flops_done == spent
    for output, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)


def test_single_resnets_can_be_kept(unet):
    with dittocache.enable(unet, Recipe(Every(2, anchor="start"), where="*.1.resnets.[01]")) as cache:
        sample(unet, cache, steps=2)
        with Calls(unet) as counts:
            sample(unet, cache, steps=2)
        assert set(cache.trace.kinds) == {"resnet"} and len(cache.trace.sites) == 4
    assert counts["down_blocks.1.resnets.0.conv1"] == 1 and counts["up_blocks.1.resnets.2.conv1"] == 2


# ---- schedules ------------------------------------------------------------------------------------------------------
# T, K, centre (None: one-sided), power, full steps: from the authors' functions
TABLES = [
    (50, 10, 15, 1.4, "0,5,9,13,17,21,26,31,37,43"),
    (50, 10, 10, 1.2, "0,5,9,12,16,21,26,32,38,43"),
    (50, 17, 15, 1.4, "0,3,6,8,11,13,15,17,20,22,25,28,32,35,38,42,46"),
    (50, 25, 15, 1.4, "0,2,4,6,7,9,11,12,14,15,17,18,20,22,24,26,28,30,32,35,37,39,42,44,47"),
    (50, 5, 10, 1.2, "0,9,16,26,38"),
    (100, 10, 20, 1.2, "0,9,17,24,33,43,53,64,76,87"),
    (250, 13, 120, 1.2, "0,22,42,62,80,98,116,132,149,168,187,207,228"),
    (20, 4, 7, 1.4, "0,5,8,14"),
    (10, 4, 3, 1.4, "0,3,4,6"),
    (10, 2, 3, 1.4, "0,4"),
    (250, 13, None, 1.5, "0,5,15,27,42,59,78,98,120,144,168,194,221"),
    (
        250,
        25,
        None,
        1.5,
        "0,1,5,10,15,22,29,37,45,53,63,72,83,93,104,116,127,140,152,165,178,192,206,220,235",
    ),
    (250, 13, None, 1.2, "0,11,26,43,60,79,98,118,139,160,182,204,227"),
    (50, 10, None, 1.4, "0,1,5,9,13,18,24,30,36,43"),
    (20, 4, None, 1.4, "0,2,7,13"),
]
SITES = [Site("deep.0", "deep", "deep", 0, 9, 0)]


@pytest.mark.parametrize(("steps", "full", "center", "power", "expected"), TABLES)
def test_full_steps_of_the_authors(steps, full, center, power, expected):
    wanted = [int(k) for k in expected.split(",")]
    assert spread(steps, full, power, center)[0] == wanted
    interval = next(n for n in range(1, steps + 1) if -(-steps // n) == full)
    table = PowerSteps(interval, power, center).table(steps, SITES)
    assert np.flatnonzero(table[:, 0] == COMPUTE).tolist() == wanted


def test_the_power_falls_until_steps_are_apart():
    steps, power = spread(50, 25, 3.0, 15)
    assert len(steps) == 25 and power == pytest.approx(2.96)
    assert spread(50, 25, 2.97, 15)[1] == 2.97  # by 0.02 each time: 2.98 does not, and 2.97 is not tried
    assert spread(50, 25, 3.0, None)[1] == pytest.approx(1.2)


def test_no_interval_is_every_step():
    assert (PowerSteps(1, 1.4, 15).table(10, SITES) == COMPUTE).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("uniform", [0, 3, 6, 9]), ("centred", [0, 3, 4, 6]), ("one-sided", spread(10, 4, 1.4, None)[0])],
)
def test_schedules_of_deepcache(unet, schedule, expected):
    params = {"interval": 3, "schedule": schedule, "center": 3, "power": 1.4}
    with dittocache.enable(unet, "deepcache", branch_id=1, **params) as cache:
        sample(unet, cache, steps=10)
        assert np.flatnonzero(cache.trace.table[:, 0]).tolist() == expected


def test_a_budget_is_spent_and_begun_again():
    changes = {"a": [9.0, 0.2, 0.2, 0.2, 0.2, 0.6, 0.1], "b": [0.0] * 7}
    sites = [Site(name, "block", "blocks", n, 2, n) for n, name in enumerate("ab")]
    table = ChangeBudget(changes, 0.5).table(7, sites)
    assert table[:, 0].tolist() == [1, 0, 0, 1, 0, 1, 0] and table[:, 1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    exact = ChangeBudget({"a": [0, 0.5, 0.25, 0.25, 0.25], "b": [0] * 5}, 0.5).table(5, sites)
    assert exact[:, 0].tolist() == [1, 0, 1, 0, 0]  # as much as the budget is not more
    assert (ChangeBudget(changes, 0.0).table(7, sites[:1]) == 1).all()


# ---- Block Caching --------------------------------------------------------------------------------------------------
def changes_of(unet, steps=STEPS):
    names = [s.site.name for s in dittocache.describe(unet).spans if s.site.kind == "block"]
    return {name: [0.0] + [0.1 * (n + 1)] * (steps - 1) for n, name in enumerate(names)}


def test_block_caching_on_a_unet(unet, tmp_path):
    changes = changes_of(unet)
    with dittocache.enable(unet, "block-caching", changes=changes, delta=0.45) as cache:
        first = sample(unet, cache)
        trace = cache.trace
        assert (cache.recipe.where, cache.recipe.keeps) == ("block", "change")
        cache.recipe.save_pretrained(tmp_path)
    computed = dict(zip(trace.sites, trace.table.T.tolist(), strict=True))
    assert computed["down_blocks.0.attentions.0"] == [1, 0, 0, 0, 0, 1]  # 0.1 a step: 0.5 at step 5
    assert computed["down_blocks.1.attentions.0"] == [1, 0, 1, 0, 1, 0]  # 0.3
    assert computed["up_blocks.2.attentions.2"] == [1] * 6  # 1.1
    with dittocache.enable(unet, tmp_path) as cache:
        assert all(torch.equal(a, b) for a, b in zip(sample(unet, cache), first, strict=True))


def by_definition(pipe, setup, samples):
    """Relative L1 change of what each block adds, seen with plain hooks in uncached runs of one sample each."""
    blocks = {f"transformer_blocks.{l}": b for l, b in enumerate(pipe.transformer.transformer_blocks)}
    found = {name: torch.zeros(setup.num_steps, dtype=torch.float64) for name in blocks}
    for j in samples:
        seen = {name: [] for name in blocks}
        handles = [
            block.register_forward_hook(lambda m, a, out, seen=seen[name]: seen.append((out - a[0])[:1].double()))
            for name, block in blocks.items()
        ]
        tiny.draw(pipe, setup.num_steps, [setup.conditions[j % 2]], setup.guidance_scale, seed=setup.seed + j)
        for handle in handles:
            handle.remove()
        for name, added in seen.items():
            for k in range(1, setup.num_steps):
                found[name][k] += (added[k] - added[k - 1]).abs().sum() / added[k].abs().sum() / len(samples)
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_calibrating_block_caching(batch):
    pipe, setup = tiny.pipeline(), Setup(num_steps=5, seed=50, conditions=(3, 7))
    recipe = calibrate(pipe, "block-caching", 3, setup, batch=batch, delta=2.0)
    expected = by_definition(pipe, setup, range(3))
    assert set(recipe.when.changes) == set(expected) and recipe.when.budget == 2.0
    for name, right in expected.items():
        torch.testing.assert_close(recipe.when.changes[name], right, rtol=1e-4, atol=1e-6)
    with dittocache.enable(pipe, recipe) as cache:
        tiny.draw(pipe, 5)
        assert 0 < cache.report().compute_fraction < 1


class TextPipeline(diffusers.DiffusionPipeline):
    """Draws from prompts with a U-Net; embeddings are made from their lengths."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=5, guidance_scale=4.5, generator=None, output_type="pt"):
        text = torch.cat([noise(1, tiny.TEXT, 12, seed=len(words)) for words in ["", *prompt]])
        both = torch.cat([text[:1].expand(len(prompt), -1, -1), text[1:]])
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            no, yes = self.unet(torch.cat([x, x]), t, both).sample.chunk(2)
            x = self.scheduler.step(no + guidance_scale * (yes - no), t, x).prev_sample
        return diffusers.pipelines.ImagePipelineOutput(images=x)


def test_calibrating_a_unet(unet, tmp_path):
    pipe = TextPipeline(unet, DDIMScheduler())
    setup = Setup(num_steps=5, guidance_scale=2.0, conditions=("a cat", "two dogs"))
    recipe = calibrate(pipe, "block-caching", 3, setup, delta=1.0, out=tmp_path / "recipe", batch=2)
    blocks = {s.site.name for s in dittocache.describe(unet).spans if s.site.kind == "block"}
    assert set(recipe.when.changes) == blocks
    with dittocache.enable(pipe, tmp_path / "recipe") as cache:
        pipe(["a cat"], generator=[torch.Generator().manual_seed(0)])
        assert 0 < cache.report().compute_fraction < 1 and cache.trace.table.shape == (5, len(blocks))


def test_flops_of_blocks_within_blocks(unet):
    names = ("down_blocks.0.attentions.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "deep.0")
    with dittocache.enable(unet, Plan([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]], names)) as cache:
        sample(unet, cache, steps=4)
        spent, report = tiny.count_flops(lambda: sample(unet, cache, steps=4)), cache.report()
    assert sum(cache.trace.flops) + cache.trace.flops_rest == report.flops_full / 4
    assert report.flops_full / 4 == tiny.count_flops(lambda: predict(unet, inputs(0)))
    assert report.flops_done == spent < report.flops_full


# ---- pipelines ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("branch", [0, 3])
def test_pipelines(name, branch):
    pipelines = pytest.importorskip("pipelines")
    case = pipelines.CASES[name]
    pipe = case.build(0)
    plain = pipelines.run(case, pipe, steps=6, batch=2)
    before = tiny.fingerprint(pipe.unet)
    assert str(dittocache.describe(pipe)).startswith("UNet2DConditionModel")
    with dittocache.enable(pipe, "deepcache", interval=3, branch_id=branch) as cache:
        first = pipelines.run(case, pipe, steps=6, batch=2)
        steps = np.array(cache.trace.steps)
        assert np.array_equal(cache.trace.table[:, 0], steps % 3 == 0) and len(steps) >= 6
        assert torch.equal(pipelines.run(case, pipe, steps=6, batch=2), first)
        alone = pipelines.run(case, pipe, steps=6, seed=1, prompt=pipelines.PROMPTS[1])
    assert tiny.relative(first[1:], alone) < 1e-4 < tiny.relative(first, plain) < 1
    assert torch.equal(pipelines.run(case, pipe, steps=6, batch=2), plain)
    assert tiny.fingerprint(pipe.unet) == before


# ---- what does not work ---------------------------------------------------------------------------------------------
OTHERS = {
    "UNet3DConditionModel": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "layers_per_block": 1,
    },
    "UNetMotionModel": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "layers_per_block": 1,
    },
    "Kandinsky3UNet": {
        "time_embedding_dim": 4,
        "groups": 2,
        "attention_head_dim": 4,
        "layers_per_block": 3,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 4,
        "encoder_hid_dim": 32,
    },
}


def refused(target, recipe, message, **params):
    with pytest.raises(ValueError, match=message) as error:
        dittocache.enable(target, recipe, **params)
    assert "\n" not in str(error.value)
    assert not tiny.traces_of_cache(target)


@pytest.mark.parametrize("cls", OTHERS)
def test_other_unets_are_refused(cls):
    other = getattr(diffusers, cls)(**OTHERS[cls])
    refused(other, "deepcache", f"'deep.0' matches no site of {cls}|{cls} has no list of blocks")


def test_levels_of_which_the_skips_are_not_known():
    types = {"down_block_types": ("KDownBlock2D",) * 3, "up_block_types": ("KUpBlock2D",) * 3, "mid_block_type": None}
    refused(
        UNet2DConditionModel(
            **types, block_out_channels=(32, 32, 32), layers_per_block=2, cross_attention_dim=12, norm_num_groups=8
        ),
        "deepcache",
        "UNet2DConditionModel",
    )


def test_branches_and_models_that_are_not_there(unet):
    refused(
        unet,
        "deepcache",
        "where='deep.9' matches no site of UNet2DConditionModel; .* 'deep.0' to 'deep.8'",
        branch_id=9,
    )
    refused(tiny.dit(), "deepcache", "where='deep.0' matches no site of DiTTransformer2DModel")
    refused(
        unet, Recipe(Every(2), where="stack"), "where='stack' matches no site of UNet2DConditionModel; it has: .*deep"
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"branch_id": -1}, "branch_id must be"),
        ({"branch_id": 1.5}, "branch_id must be"),
        ({"interval": 0}, "interval must be"),
        ({"schedule": "quadratic"}, "uniform, centred, one-sided"),
        ({"power": 0.5}, "power must be"),
        ({"center": -1}, "center must be"),
        ({"branch": 1}, "known: interval, branch_id, schedule, center, power"),
    ],
)
def test_bad_parameters_of_deepcache(unet, params, message):
    refused(unet, "deepcache", message, **params)


def test_schedules_that_cannot_be(unet):
    with pytest.raises(ValueError, match=r"no power from 1\.4 down to 1 spreads 9 computed steps over 10"):
        spread(10, 9, 1.4, 3)
    with pytest.raises(ValueError, match="center must be a step of the run, 0 to 9; got 10"):
        PowerSteps(2, 1.4, 10).table(10, SITES)


def test_bad_changes(unet):
    changes = changes_of(unet)
    refused(unet, "block-caching", "calibrate them with `dittocache calibrate block-caching`")
    refused(unet, "block-caching", "delta must be", changes=changes, delta=-1)
    for bad in ([0.0, -1.0], [[0.0, 1.0]], []):
        refused(unet, "block-caching", "'x' must be one number of 0 or more for every step", changes={"x": bad})
    refused(
        unet,
        "block-caching",
        "'mid_block.attentions.0' is in this model, but not in the changes",
        changes={name: change for name, change in changes.items() if not name.startswith("mid")},
    )
    refused(unet, "block-caching", "'x' is in the changes, but not in this model", changes={**changes, "x": [0.0] * 6})
    wrong = pytest.raises(ValueError, match="the changes are those of 6 steps, but this run has 4")
    with dittocache.enable(unet, "block-caching", changes=changes) as cache, wrong:
        cache.run(4)


def test_deepcache_with_a_scheduler(unet):
    scheduler = DDIMScheduler()
    with dittocache.enable(unet, "deepcache", interval=2, branch_id=1, scheduler=scheduler) as cache, torch.no_grad():
        scheduler.set_timesteps(4)
        x = noise(2, 4, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, inputs(0)["encoder_hidden_states"]).sample, t, x).prev_sample
        assert cache.trace.table[:, 0].tolist() == [1, 0, 1, 0]
