"""U-ViT and its sampler: the network, its checkpoints, its sites, the solver, and the authors' numbers."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dittocache
from dittocache import describe
from dittocache.models import dpm_solver
from dittocache.models.uvit import UViT, UViTBlock, load_uvit, time_embedding

SIZES = {"img_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "conv": {"conv": True},
    "time-mlp": {"mlp_time_embed": True},
    "no-labels": {"num_classes": -1},
    "no-skips": {"skip": False},
    "qkv-bias": {"qkv_bias": True},
    "wide-mlp": {"mlp_ratio": 2.6875},
    "pixels": {"in_chans": 3, "patch_size": 4},
    "no-depth": {"depth": 0},
}
FOLDER = Path(os.environ.get("DITTOCACHE_GOLDENS") or Path(__file__).parents[2] / "shared" / "goldens")
needs_goldens = pytest.mark.skipif(
    not (FOLDER / "networks" / "uvit-tiny.safetensors").is_file(), reason="the goldens of U-ViT are not at hand"
)


def build(seed: int = 0, **changes: Any) -> UViT:
    """A small network with weights large enough for everything to matter."""
    torch.manual_seed(seed)
    model = UViT(**{**SIZES, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs(model: UViT, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.in_chans, model.img_size, model.img_size, generator=generator)
    return x, torch.tensor([500.25, 41.5, 999.0])[:batch], torch.arange(batch) if model.num_classes else None


@pytest.fixture
def uvit() -> UViT:
    return build()


# ---- the network ----------------------------------------------------------------------------------------------------
def test_the_names_are_those_of_the_release():
    def block(name: str, skip: bool = False) -> set[str]:
        parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", *(["skip_linear"] if skip else [])]
        return {f"{name}.{part}.{kind}" for part in parts for kind in ("weight", "bias")} - {f"{name}.attn.qkv.bias"}

    both = ("patch_embed.proj", "norm", "decoder_pred")
    plain = {"pos_embed", "label_emb.weight", *(f"{name}.{kind}" for name in both for kind in ("weight", "bias"))}
    plain |= block("in_blocks.0") | block("in_blocks.1") | block("mid_block")
    plain |= block("out_blocks.0", skip=True) | block("out_blocks.1", skip=True)
    assert set(build().state_dict()) == plain
    assert set(build(conv=True).state_dict()) - plain == {"final_layer.weight", "final_layer.bias"}
    linears = {f"time_embed.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert set(build(mlp_time_embed=True).state_dict()) - plain == linears
    assert plain - set(build(num_classes=-1).state_dict()) == {"label_emb.weight"}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_state_dict_tells_all_sizes_but_the_heads(changes, dtype):
    model = build(**changes)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load_uvit(state, heads=2)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    model.load_state_dict(state)  # the rounded weights
    with torch.no_grad():
        out, again = loaded(*inputs(loaded)), model(*inputs(model))
    assert out.shape == inputs(model)[0].shape and torch.equal(out, again)
    state["pos_embed"].zero_()
    assert loaded.pos_embed.any()  # the caller's tensors are copied


def test_every_part_matters(uvit):
    x, t, y = inputs(uvit)
    with torch.no_grad():
        plain = uvit(x, t, y)
        assert (uvit(x, t, y + 1) - plain).abs().amax() > 1e-4
        for name, parameter in uvit.named_parameters():
            kept = parameter.clone()
            parameter.add_(torch.randn_like(parameter))
            assert (uvit(x, t, y) - plain).abs().amax() > 1e-4, name
            parameter.copy_(kept)


def test_fractional_timesteps(uvit):
    x, _, y = inputs(uvit)
    with torch.no_grad():
        whole, between, next_one = (uvit(x, torch.full((2,), t), y) for t in (600.0, 600.4, 601.0))
        assert not torch.equal(whole, between) and not torch.equal(between, next_one)
        assert torch.equal(uvit(x, torch.tensor([600, 600]), y), whole)
        assert torch.equal(uvit(x, torch.tensor(600.4), y), between)  # one for all rows
        rows = uvit(x, torch.tensor([600.0, 600.4]), y)
    assert torch.allclose(rows[0], whole[0], atol=1e-6) and torch.allclose(rows[1], between[1], atol=1e-6)


def test_time_embedding():
    t = torch.tensor([0.0, 1.0, 600.4])
    got = time_embedding(t, 8)
    angles = t.double()[:, None] * torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    assert torch.allclose(got.double(), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-4)
    assert got.dtype == torch.float32 and torch.equal(time_embedding(t.double(), 8), got)


def test_half_precision(uvit):
    x, t, y = inputs(uvit)
    with torch.no_grad():
        plain = uvit(x, t, y)
        half = uvit.to(torch.bfloat16)(x.bfloat16(), t, y)
    assert half.dtype == torch.bfloat16 and tiny.relative(half.float(), plain) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 9}, "img_size must be a multiple of patch_size 2; got 9"),
        ({"num_heads": 5}, "num_heads must divide embed_dim 32, an even number; got 5"),
        ({"num_heads": 0}, "num_heads must divide embed_dim 32, an even number; got 0"),
        ({"depth": 5}, "depth must be even, since mid_block is not counted; got 5"),
    ],
)
def test_sizes_that_do_not_divide(changes, message):
    with pytest.raises(ValueError) as e:
        UViT(**{**SIZES, **changes})
    assert str(e.value) == message


def test_wrong_inputs(uvit):
    x, t, y = inputs(uvit)
    with pytest.raises(ValueError, match=r"^x must be \[batch, 4, 8, 8\]; got \[2, 4, 16, 16\]$"):
        uvit(torch.cat([torch.cat([x, x], 2)] * 2, 3), t, y)
    with pytest.raises(ValueError, match=r"^y must be labels \[batch\]; got None$"):
        uvit(x, t)
    with pytest.raises(ValueError, match=r"^y must be None: the network has no labels; got labels$"):
        build(num_classes=-1)(x, t, y)


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name not in names}


FOREIGN = {
    "empty": (lambda s: {}, "'patch_embed.proj.weight'"),
    "not a mapping": (lambda s: [1], "no attribute 'items'"),
    "not tensors": (lambda s: {"patch_embed.proj.weight": 3}, "no attribute 'shape'"),
    "of another network": (lambda s: {"x_embedder.proj.weight": torch.zeros(3)}, "'patch_embed.proj.weight'"),
    "flat": (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(4)}, "not enough values"),
    "empty patches": (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(32, 4, 0, 0)}, "is empty"),
    "missing": (lambda s: without(s, "norm.bias"), "'norm.bias' is missing, where (32,) was expected"),
    "no middle": (lambda s: {k: v for k, v in s.items() if "mid" not in k}, "'mid_block.mlp.fc1.weight'"),
    "a lost block": (
        lambda s: {k: v for k, v in s.items() if "in_blocks.0" not in k},
        "'in_blocks.0.attn.proj.bias' is missing, where (32,) was expected",
    ),
    "one skip fewer": (
        lambda s: without(s, "out_blocks.1.skip_linear.weight"),
        "'out_blocks.1.skip_linear.weight' is missing, where (32, 64) was expected",
    ),
    "too much": (
        lambda s: {**s, "extra": torch.zeros(2)},
        "'extra' is (2,), where no such tensor was expected",
    ),
    "another shape": (
        lambda s: {**s, "decoder_pred.bias": torch.zeros(32)},
        "'decoder_pred.bias' is (32,), where (16,) was expected",
    ),
    "not square": (
        lambda s: {**s, "pos_embed": torch.zeros(1, 20, 32)},
        "'pos_embed' is (1, 20, 32), where (1, 18, 32) was expected",
    ),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_state_dicts(uvit, change, message):
    with pytest.raises(ValueError, match=r"^not a state dict of U-ViT: ") as e:
        load_uvit(change(uvit.state_dict()), heads=2)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("heads", [0, 3, -2, 64, 2.0, None], ids=str)
def test_foreign_heads(uvit, heads):
    with pytest.raises(ValueError, match=f"^heads must divide the width 32; got {heads}$"):
        load_uvit(uvit.state_dict(), heads)


# ---- sites and caching ----------------------------------------------------------------------------------------------
BLOCKS = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]


def test_sites(uvit):
    found = describe(uvit)
    modules = [site for site in found.sites if site.kind != "stack"]
    assert [(s.name, s.kind, s.tokenwise, s.order) for s in modules] == [
        (f"{block}.{path}", kind, tokenwise, order)
        for order, block in enumerate(BLOCKS)
        for path, kind, tokenwise in (("attn", "attention", False), ("mlp", "feed-forward", True))
    ]
    assert [(s.stack, s.block, s.depth) for s in modules[::2]] == [
        ("in_blocks", 0, 2), ("in_blocks", 1, 2), ("mid_block", 0, 1), ("out_blocks", 0, 2), ("out_blocks", 1, 2),
    ]  # fmt: skip
    assert [(s.name, s.kind, s.depth) for s in (span.site for span in found.stacks)] == [
        ("in_blocks", "stack", 2), ("mid_block", "stack", 1), ("out_blocks", "stack", 2),
    ]  # fmt: skip
    for entry in found.entries:
        assert uvit.get_submodule(entry.site.name) is entry.module
    for block in found.blocks:
        assert uvit.get_submodule(block.name) is block.module
    assert [b.name for b in found.blocks] == ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert [stack.blocks for stack in found.stacks] == [(0, 1), (2,), (3, 4)]
    assert "mid_block: 1 x UViTBlock (with shortcut)" in str(found)
    assert [stack["name"] for stack in found.to_dict()["stacks"]] == ["in_blocks", "mid_block", "out_blocks"]


def test_only_lone_blocks_of_registered_families_are_found():
    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = UViTBlock(8, 2, 16, False, False).attn

    class Net(nn.Module):
        def __init__(self, known: bool) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.first = UViTBlock(8, 2, 16, False, False) if known else Stranger()
            self.layers = nn.ModuleList([Stranger(), Stranger()])
            self.mixed = nn.ModuleList([UViTBlock(8, 2, 16, False, False), nn.Identity()])

    assert [s.site.name for s in describe(Net(True)).stacks] == ["inner.first", "layers"]
    assert [s.site.name for s in describe(Net(False)).stacks] == ["layers"]
    again = Net(True)
    again.second = again.inner.first
    with pytest.raises(ValueError, match="uses one of its blocks several times"):
        describe(again)


def guided(model: UViT, nfe: int = 8, **kwargs: Any) -> Tensor:
    x, _, y = inputs(model)
    return dpm_solver.sample(model, x, y, nfe, null_label=model.num_classes - 1, **kwargs)


def test_a_cache_steps_with_the_evaluations(uvit):
    plain, before = guided(uvit), tiny.fingerprint(uvit)
    with dittocache.enable(uvit, "fora", interval=2, anchor="start") as cache:
        with cache.run(8):
            cached = guided(uvit, before_evaluation=cache.step)
        trace, run = cache.trace, cache._last
    assert trace.table.shape[0] == 8 and run.branches == 2
    modules = [n for n, kind in enumerate(trace.kinds) if kind in ("attention", "feed-forward")]
    assert [trace.sites[n] for n in modules] == [f"{block}.{path}" for block in BLOCKS for path in ("attn", "mlp")]
    for k, row in enumerate(trace.table[:, modules]):
        assert (row == (k % 2 == 0)).all()
    assert 1e-4 < tiny.relative(cached, plain) < 1
    assert tiny.fingerprint(uvit) == before and torch.equal(guided(uvit), plain)


@pytest.mark.parametrize("shortcut", [True, False])
def test_reuse_on_frozen_inputs_equals_computing(uvit, shortcut):
    ran: list[nn.Module] = []
    watched = [uvit.mid_block.attn.qkv, *(block.skip_linear for block in uvit.out_blocks)]
    for module in watched:
        module.register_forward_hook(lambda module, *rest: ran.append(module))
    x, t, y = inputs(uvit)
    changes = {} if shortcut else {"reuse_block": None}
    with tiny.patched_family("UViTBlock", **changes), torch.no_grad():
        plain = uvit(x, t, y)
        with dittocache.enable(uvit, "fora", interval=4, anchor="start") as cache, cache.run(4):
            for k in range(4):
                cache.step(k)
                ran.clear()
                assert torch.equal(uvit(x, t, y), plain)
                assert ran == (watched if k == 0 else watched[1:])  # long skips are joined at every step


def test_the_shortcut_equals_the_plain_path(uvit):
    results = []
    for changes in ({}, {"reuse_block": None}):
        with tiny.patched_family("UViTBlock", **changes):
            cache = dittocache.enable(uvit, "fora", interval=3)
            with cache, cache.run(8):
                results.append(guided(uvit, before_evaluation=cache.step))
    assert torch.equal(*results)


# ---- the solver -----------------------------------------------------------------------------------------------------
def test_the_noise_schedule():
    times = dpm_solver.outer_times(10)
    assert times.shape == (6,) and times[0] == 1 and times[-1] == torch.tensor(0.001) and times.dtype == torch.float32
    for s, t in itertools.pairwise(times):
        mid = dpm_solver.mid_time(s, t)
        start, middle, end = (dpm_solver.marginal(time) for time in (s, mid, t))
        assert t < mid < s and float(middle.lam) == pytest.approx(float(start.lam + end.lam) / 2, abs=1e-5)
        assert start.alpha.ndim == 0 and start.alpha.dtype == torch.float32
        assert float(start.alpha**2 + start.sigma**2) == pytest.approx(1, abs=1e-6)
        assert float(start.lam) == pytest.approx(float((start.alpha / start.sigma).log()), abs=1e-5)
    assert dpm_solver.marginal(0.5) == dpm_solver.marginal(torch.tensor(0.5))
    kept = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    assert float(dpm_solver.marginal(0.3).alpha ** 2) == pytest.approx(float((1 - kept**2)[:300].prod()), rel=1e-5)


def test_the_schedule_is_not_spoilt_by_its_first_caller():
    dpm_solver._schedule.cache_clear()
    dpm_solver._betas.cache_clear()
    with torch.inference_mode():
        dpm_solver.mid_time(0.5, 0.4)
    x = torch.ones(1, requires_grad=True)
    out = dpm_solver.second_update(x, x, x, 0.5, dpm_solver.mid_time(0.5, 0.4), 0.4)
    out.sum().backward()
    assert x.grad is not None


def test_updates_are_exact_where_x0_does_not_change():
    x0, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    s, t = 0.8, 0.3
    mid = dpm_solver.mid_time(s, t)

    def at(time: Any) -> Tensor:
        alpha, sigma, _ = dpm_solver.marginal(time)
        return alpha * x0 + sigma * noise

    half = dpm_solver.first_update(at(s), noise, s, mid)
    assert torch.allclose(half, at(mid), atol=1e-6)
    assert torch.allclose(dpm_solver.second_update(at(s), noise, noise, s, mid, t), at(t), atol=1e-6)


def test_the_solver_is_of_second_order():
    """Data from a normal distribution, where the exact predictions and the exact path are known."""
    variance = 0.3

    def scale(time: Any) -> float:
        alpha, sigma, _ = dpm_solver.marginal(time)
        return float(variance * alpha**2 + sigma**2)

    def solve(steps: int) -> float:
        x = torch.ones(1, dtype=torch.float64)
        times = torch.linspace(0.9, 0.3, steps + 1).tolist()
        for s, t in itertools.pairwise(times):
            mid = dpm_solver.mid_time(s, t)
            start = x * dpm_solver.marginal(s).sigma / scale(s)
            half = dpm_solver.first_update(x, start, s, mid)
            x = dpm_solver.second_update(x, start, half * dpm_solver.marginal(mid).sigma / scale(mid), s, mid, t)
        return abs(float(x) - (scale(0.3) / scale(0.9)) ** 0.5)

    errors = [solve(steps) for steps in (2, 4, 8)]
    assert errors[0] < 0.02
    assert all(3 < coarse / fine < 6 for coarse, fine in itertools.pairwise(errors)), errors


def test_evaluations_and_calls_in_order():
    calls: list[Any] = []

    def model(x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        assert timesteps.dtype == torch.float32 and timesteps.shape == (2,)
        calls.append((float(timesteps[1]), y.tolist()))
        return x * (2.0 if y[0] == 9 else 1.0)

    x, y = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4])
    out = dpm_solver.sample(model, x, y, 5, null_label=9, before_evaluation=calls.append)
    s, t, u = dpm_solver.outer_times(4)
    times = [1000 * time for time in (s, dpm_solver.mid_time(s, t), t, dpm_solver.mid_time(t, u))]
    assert [call for call in calls if isinstance(call, int)] == [0, 1, 2, 3]
    assert calls == [
        entry for k, time in enumerate(times) for entry in (k, (float(time), [3, 4]), (float(time), [9, 9]))
    ]
    assert calls[1][0] == 1000.0 and out.shape == x.shape

    # cond + 0.4 (cond - uncond) = 0.6 x
    want = dpm_solver.sample(lambda x, t, y: 0.6 * x, x, y, 4, null_label=9)
    assert torch.allclose(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nfe", [1, 0, -4, 2.0, "20", None], ids=repr)
def test_too_few_evaluations(nfe):
    with pytest.raises(ValueError, match=rf"^nfe must be a whole number of 2 or more; got {nfe!r}$"):
        dpm_solver.outer_times(nfe)


@pytest.mark.parametrize("time", [0, 1.01, -0.5, 600.0, float("nan")], ids=str)
def test_times_outside_of_the_schedule(time):
    with pytest.raises(ValueError, match=rf"^time must lie in \[0.001, 1\]; got {time:g}$"):
        dpm_solver.marginal(time)


@pytest.mark.parametrize("index", [0, 1001, 3.0], ids=str)
def test_indices_outside_of_the_schedule(index):
    with pytest.raises(ValueError, match=f"^index must be a whole number from 1 to 1000; got {index}$"):
        dpm_solver.add_noise(torch.zeros(1), torch.zeros(1), index)


# ---- the authors' numbers -------------------------------------------------------------------------------------------
def cases() -> dict[str, Any]:
    return json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))


def golden(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / file)


def golden_network(data: dict[str, Any]) -> UViT:
    entry = data["networks"]["uvit-tiny"]
    model = load_uvit(golden(entry["file"]), heads=entry["config"]["num_heads"])
    configured = UViT(**entry["config"]).eval()
    configured.load_state_dict(model.state_dict())  # strict: the config says what the tensors say
    return configured


@needs_goldens
def test_golden_schedule():
    spec = cases()["samplers"]["dpm2s-uvit-20"]
    times = dpm_solver.outer_times(spec["num_steps"])
    mids = [dpm_solver.mid_time(s, t) for s, t in itertools.pairwise(times)]
    outer, middle = [dpm_solver.marginal(t) for t in times], [dpm_solver.marginal(t) for t in mids]
    found = {
        "outer_times": times,
        "outer_lambda": [m.lam for m in outer],
        "outer_alpha": [m.alpha for m in outer],
        "outer_sigma": [m.sigma for m in outer],
        "mid_times": mids,
        "mid_alpha": [m.alpha for m in middle],
        "mid_sigma": [m.sigma for m in middle],
        "model_timesteps": [1000 * t for pair in zip(times[:-1], mids) for t in pair],
    }
    for name, values in found.items():
        assert [float(v) for v in values] == pytest.approx(spec[name], abs=1e-6), name


@needs_goldens
def test_golden_sampling():
    data = cases()
    chosen = [case for case in data["cases"] if case["id"].startswith("uvit-none-")]
    assert chosen
    for case in chosen:
        given, want = golden(data["inputs"][case["input"]]["file"]), golden(case["expect"]["file"])
        guidance, model, outputs = data["guidance"][case["guidance"]], golden_network(data), []
        model.register_forward_hook(lambda module, args, output, kept=outputs: kept.append(output))
        latents = dpm_solver.sample(
            model,
            given["z"],
            given["y"],
            case["num_steps"],
            null_label=guidance["null_label"],
            scale=guidance["scale"],
        )
        raw = torch.stack(outputs).unflatten(0, (case["num_steps"], 2))
        eps = raw[:, 0] + guidance["scale"] * (raw[:, 0] - raw[:, 1])
        assert tiny.relative(latents, want["latents"]) <= 1e-5
        assert max(map(tiny.relative, eps, want["eps"])) <= 2e-5
        assert max(map(tiny.relative, raw.flatten(0, 1), want["network_outputs"].flatten(0, 1))) <= 1e-5


@needs_goldens
def test_golden_solver_update():
    """The recording half of a training step of L2C: no guidance, noise of the rounded timestep, one outer step."""
    data = cases()
    case = next(c for c in data["cases"] if c["id"] == "l2c-uvit-unit-train-r4")
    model, want, settings = golden_network(data), golden(case["expect"]["file"]), case["settings"]
    given = {name: golden(ref["file"])[ref["key"]] for name, ref in case["inputs"].items()}
    times, r = dpm_solver.outer_times(data["samplers"][settings["sampler"]]["num_steps"]), settings["outer_step"]
    s, t = times[r], times[r + 1]
    mid = dpm_solver.mid_time(s, t)
    index = round(1000 * float(s))
    assert index == settings["noise_index"] and round(1000 * float(t)) == settings["student_timestep"]
    assert [float(1000 * s), float(1000 * mid)] == pytest.approx(settings["record_timesteps"], abs=1e-4)
    with torch.no_grad():
        x = dpm_solver.add_noise(given["x_start"], given["noise"], index)
        start = model(x, 1000 * s, given["y"])
        half = dpm_solver.first_update(x, start, s, mid)
        middle = model(half, 1000 * mid, given["y"])
        end = dpm_solver.second_update(x, start, middle, s, mid, t)
    found = {"x_noised": x, "out_start": start, "x_mid": half, "out_mid": middle, "x_next": end}
    for name, tensor in found.items():
        assert tiny.relative(tensor, want[name]) <= case["tolerance"]["outputs_rel_l2"], name
    # the updates alone, on the authors' own tensors
    x = want["x_noised"]
    assert tiny.relative(dpm_solver.first_update(x, want["out_start"], s, mid), want["x_mid"]) <= 1e-6
    update = dpm_solver.second_update(x, want["out_start"], want["out_mid"], s, mid, t)
    assert tiny.relative(update, want["x_next"]) <= 1e-6
