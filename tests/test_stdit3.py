"""STDiT3: the network, its checkpoints, what mixes with what, its sites, and the authors' numbers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import dittocache
from dittocache import describe
from dittocache.models.stdit3 import STDiT3, load_stdit3, position_embedding, rotate

SIZES: dict[str, Any] = {
    "hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 6, "model_max_length": 5,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "velocity-only": {"pred_sigma": False},
    "plain-qk": {"qk_norm": False},
    "wide-mlp": {"mlp_ratio": 2.125},
    "patches": {"patch_size": (2, 1, 3), "in_channels": 3},
    "deeper": {"depth": 3},
    "no-depth-but-one": {"depth": 1},
    "long-text": {"model_max_length": 9, "caption_channels": 10},
}
BATCH, FRAMES, ROWS, COLUMNS = 2, 3, 2, 4  # in tokens
FOLDER = Path(os.environ.get("DITTOCACHE_GOLDENS") or Path(__file__).parents[2] / "shared" / "goldens")
needs_goldens = pytest.mark.skipif(
    not (FOLDER / "networks" / "stdit3-tiny.safetensors").is_file(), reason="the goldens of STDiT3 are not at hand"
)


def build(seed: int = 0, **changes: Any) -> STDiT3:
    """A small network with weights large enough for everything to matter."""
    torch.manual_seed(seed)
    model = STDiT3(**{**SIZES, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(model: STDiT3, seed: int = 1) -> dict[str, Any]:
    """Two videos of all their own; of the second's text the last two tokens are not valid."""
    generator = torch.Generator().manual_seed(seed)
    sides = [n * patch for n, patch in zip((FRAMES, ROWS, COLUMNS), model.patch_size)]
    text, channels = model.y_embedder.y_embedding.shape
    mask = torch.ones(BATCH, text, dtype=torch.int64)
    mask[1, -2:] = 0
    return {
        "x": torch.randn(BATCH, model.in_channels, *sides, generator=generator),
        "timestep": torch.tensor([970.25, 41.5]),
        "y": torch.randn(BATCH, 1, text, channels, generator=generator),
        "mask": mask,
        "fps": torch.tensor([24.0, 8.0]),
        "height": torch.tensor([256.0, 480.0]),
        "width": torch.tensor([256.0, 854.0]),
    }


@torch.no_grad()
def run(model: STDiT3, given: dict[str, Any], **changes: Any) -> Tensor:
    return model(**{**given, **changes})


def differs(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Where two outputs differ, over all dimensions but `dims` of [batch, channels, frames, rows, columns]."""
    rest = [dim for dim in range(a.ndim) if dim not in dims]
    return (a - b).abs().amax(rest) > 1e-6


def silence(blocks: Any, *paths: str) -> None:
    """Makes modules of all blocks put out zeros."""
    with torch.no_grad():
        for block in blocks:
            for path in paths:
                for parameter in block.get_submodule(path).parameters():
                    parameter.zero_()


@pytest.fixture
def stdit3() -> STDiT3:
    return build()


@pytest.fixture
def given(stdit3: STDiT3) -> dict[str, Any]:
    return inputs(stdit3)


# ---- the network and its checkpoints --------------------------------------------------------------------------------
def test_the_names_are_those_of_the_release():
    def linear(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    def block(name: str, norms: bool = True) -> set[str]:
        parts = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
        normed = {f"{name}.attn.{letter}_norm.weight" for letter in "qk"} if norms else set()
        table = {f"{name}.scale_shift_table"}
        return table | normed | linear(*(f"{name}.{part}" for part in (*parts, "mlp.fc1", "mlp.fc2")))

    outside = linear("x_embedder.proj", "t_block.1", "final_layer.linear", "y_embedder.y_proj.fc1")
    outside |= linear("y_embedder.y_proj.fc2", *(f"{x}_embedder.mlp.{n}" for x in ("t", "fps") for n in (0, 2)))
    outside |= {"y_embedder.y_embedding", "rope.freqs", "final_layer.scale_shift_table"}
    names = [f"{kind}_blocks.{n}" for kind in ("spatial", "temporal") for n in range(2)]
    assert set(build().state_dict()) == outside.union(*(block(name) for name in names))
    assert set(build(qk_norm=False).state_dict()) == outside.union(*(block(name, norms=False) for name in names))
    assert build().rope.freqs.tolist() == pytest.approx([10000 ** (-m / 6) for m in range(6)])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_state_dict_tells_all_sizes_but_the_heads(changes, dtype):
    model = build(**changes)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load_stdit3(state, heads=2)
    assert not loaded.training and {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    model.load_state_dict(state)  # the rounded weights
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    out, again = run(loaded, inputs(loaded)), run(model, inputs(model))
    channels = model.in_channels * (2 if changes.get("pred_sigma", True) else 1)
    assert out.shape == (BATCH, channels, *inputs(model)["x"].shape[2:]) and torch.equal(out, again)
    state["x_embedder.proj.bias"].zero_()
    assert loaded.x_embedder.proj.bias.any()  # the caller's tensors are copied


def test_every_part_matters(stdit3, given):
    plain = run(stdit3, given)
    assert plain.isfinite().all()
    tensors = {name: tensor for name, tensor in stdit3.state_dict().items() if name != "y_embedder.y_embedding"}
    for name, tensor in tensors.items():
        kept = tensor.clone()
        tensor.add_(torch.randn_like(tensor))
        assert (run(stdit3, given) - plain).abs().amax() > 1e-5, name
        tensor.copy_(kept)
    for name in ("x", "timestep", "y", "fps", "height", "width"):
        assert (run(stdit3, given, **{name: given[name] * 1.5}) - plain).abs().amax() > 1e-5, name
    assert torch.equal(run(stdit3, given), plain)


def test_half_precision(stdit3, given):
    plain = run(stdit3, given)
    half = run(stdit3.bfloat16(), given, x=given["x"].bfloat16(), y=given["y"].bfloat16())
    assert half.dtype == torch.bfloat16 and tiny.relative(half.float(), plain) < 0.05


# ---- what mixes with what -------------------------------------------------------------------------------------------
def test_rows_of_a_batch_are_independent(stdit3, given):
    both = run(stdit3, given)
    for row in range(BATCH):
        alone = run(stdit3, {name: value[row : row + 1] for name, value in given.items()})
        assert torch.allclose(alone[0], both[row], atol=1e-5)
    for name, value in given.items():
        changed = value.clone()
        changed[0] = changed[0] * 0.5 if value.is_floating_point() else 1 - torch.eye(len(value[0]))[0].long()
        assert differs(run(stdit3, given, **{name: changed}), both, (0,)).tolist() == [True, False], name


def test_one_number_for_all_rows(stdit3, given):
    for name, value in (("timestep", 600.0), ("fps", 24.0), ("height", 256.0), ("width", 320.0)):
        rows = run(stdit3, given, **{name: torch.full((BATCH,), value)})
        for one in (value, torch.tensor(value), torch.tensor([value]), torch.tensor(value).double()):
            assert torch.equal(run(stdit3, given, **{name: one}), rows), name
    assert torch.equal(run(stdit3, given, timestep=600), run(stdit3, given, timestep=torch.tensor([600, 600])))


@pytest.mark.parametrize(
    ("silenced", "changed", "spread"),
    [
        ("temporal_blocks", (slice(None), slice(None), 1), "frame"),
        ("spatial_blocks", (slice(None), slice(None), slice(None), slice(2, 4), slice(4, 6)), "place"),
    ],
)
def test_spatial_attention_keeps_to_frames_and_temporal_attention_to_places(stdit3, given, silenced, changed, spread):
    x = given["x"].clone()
    x[changed] += 1.0
    everywhere = differs(run(stdit3, given, x=x), run(stdit3, given), (2, 3, 4))
    assert everywhere.all()
    silence(getattr(stdit3, silenced), "attn")
    found = differs(run(stdit3, given, x=x), run(stdit3, given), (2, 3, 4))
    want = torch.zeros_like(found)
    if spread == "frame":
        want[1] = True
    else:
        want[:, 2:4, 4:6] = True  # the four pixels of one patch, in every frame
    assert torch.equal(found, want)


def test_frames_have_an_order_in_temporal_attention_only(stdit3, given):
    def turned() -> bool:
        out = run(stdit3, given).flip(2)
        return torch.allclose(run(stdit3, given, x=given["x"].flip(2)), out, atol=1e-5)

    assert not turned()
    silence(stdit3.temporal_blocks, "attn")
    assert turned()


def test_text_that_is_not_valid_is_not_seen(stdit3, given):
    plain = run(stdit3, given)
    hidden, seen = given["y"].clone(), given["y"].clone()
    hidden[1, 0, -2:] += 10.0
    assert torch.equal(run(stdit3, given, y=hidden), plain)
    assert torch.equal(run(stdit3, given, mask=given["mask"].bool()), plain)
    seen[1, 0, -3] += 10.0
    assert differs(run(stdit3, given, y=seen), plain, (0,)).tolist() == [False, True]
    short = {**given, "y": given["y"][:, :, :3], "mask": None}  # without a mask all of any number of tokens is valid
    assert torch.allclose(run(stdit3, short)[1], plain[1], atol=1e-5)
    assert differs(run(stdit3, given, mask=None), plain, (0,)).tolist() == [False, True]


def test_given_frames_are_seen_at_timestep_0(stdit3, given):
    ones = torch.ones(BATCH, FRAMES)
    plain, start = run(stdit3, given), run(stdit3, given, timestep=0.0)
    assert torch.allclose(run(stdit3, given, x_mask=ones), plain, atol=1e-6)
    assert torch.allclose(run(stdit3, given, x_mask=0 * ones), start, atol=1e-6)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    chosen = torch.where(mask[:, None, :, None, None].bool(), plain, start)
    assert not torch.allclose(run(stdit3, given, x_mask=mask), chosen, atol=1e-3)  # temporal attention sees both
    silence(stdit3.temporal_blocks, "attn")
    plain, start = run(stdit3, given), run(stdit3, given, timestep=0.0)
    chosen = torch.where(mask[:, None, :, None, None].bool(), plain, start)
    for wanted in (mask, mask.bool()):
        assert torch.allclose(run(stdit3, given, x_mask=wanted), chosen, atol=1e-6)
    assert not torch.allclose(plain, start, atol=1e-3)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 3)], ids=str)
def test_sides_that_are_no_multiple_of_a_patch(patch_size):
    model = build(patch_size=patch_size)
    given = inputs(model)
    padded = given["x"].clone()
    padded[..., -1], padded[..., -1, :] = 0, 0
    cut = given["x"][..., :-1, :-1]
    if patch_size[0] == 2:
        padded[:, :, -1], cut = 0, cut[:, :, :-1]
    out = run(model, given, x=cut)
    assert out.shape[2:] == cut.shape[2:]
    whole = run(model, given, x=padded)
    assert torch.equal(out, whole[:, :, : cut.shape[2], : cut.shape[3], : cut.shape[4]])


# ---- the parts ------------------------------------------------------------------------------------------------------
def test_position_embedding():
    rows, columns, width = 3, 4, 16
    scale = torch.tensor([0.5, 1.25])
    found = position_embedding(rows, columns, scale, width)
    assert found.shape == (2, rows * columns, width) and found.dtype == torch.float32
    for n, s in enumerate((0.5, 1.25)):
        for i in range(rows):
            for j in range(columns):
                places = [j / s * 3 / columns, i / s * 3 / rows]  # round(sqrt(12)) = 3
                waves = [10000 ** (-2 * m / 8) for m in range(4)]
                want = [f(place * w) for place in places for f in (math.sin, math.cos) for w in waves]
                assert found[n, i * columns + j].tolist() == pytest.approx(want, abs=1e-5)


def test_rotation():
    q, k = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3, 0.05])
    turned_q, turned_k = (rotate(t.expand(5, -1), (angles.cos(), angles.sin())) for t in (q, k))
    found = turned_q @ turned_k.T
    complex_q, complex_k = (torch.view_as_complex(t.reshape(3, 2).contiguous()) for t in (q, k))
    for i in range(5):
        for j in range(5):  # products depend on the distance alone
            turn = torch.polar(torch.ones(3), angles[i] - angles[j])
            assert float(found[i, j]) == pytest.approx(
                float((complex_q * turn * complex_k.conj()).real.sum()), abs=1e-5
            )
    assert (
        torch.equal(turned_q[0], q[0])
        and rotate(q.half(), (angles.cos()[:1], angles.sin()[:1])).dtype == q.half().dtype
    )


@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
@torch.no_grad()
def test_attention_is_that_of_each_group_alone(stdit3, temporal):
    module = stdit3.temporal_blocks[0].attn
    x = torch.randn(BATCH, FRAMES * 5, 24, generator=torch.Generator().manual_seed(0))
    rotation = stdit3.rope(FRAMES) if temporal else None
    found = module(x, FRAMES, rotation).unflatten(1, (FRAMES, 5))
    assert found.shape == (BATCH, FRAMES, 5, 24)
    groups = x.unflatten(1, (FRAMES, 5))
    groups = groups.transpose(1, 2) if temporal else groups
    want = torch.empty_like(groups)
    for row in range(BATCH):
        for n, group in enumerate(groups[row]):
            heads = []
            for q, k, v in zip(*(part.split(12, -1) for part in module.qkv(group).split(24, -1))):
                q, k = (F.rms_norm(t, (12,), norm.weight, 1e-6) for t, norm in ((q, module.q_norm), (k, module.k_norm)))
                if temporal:
                    q, k = rotate(q, rotation), rotate(k, rotation)
                heads.append((q @ k.T / 12**0.5).softmax(-1) @ v)
            want[row, n] = module.proj(torch.cat(heads, -1))
    assert torch.allclose(found, want.transpose(1, 2) if temporal else want, atol=1e-5)


@torch.no_grad()
def test_modules_of_a_block_put_out_what_comes_before_the_gate(stdit3, given):
    outputs: dict[tuple[str, str], Tensor] = {}
    calls: dict[str, tuple[Any, ...]] = {}
    for kind in ("spatial", "temporal"):
        block = getattr(stdit3, f"{kind}_blocks")[1]
        block.register_forward_hook(lambda m, args, out, kind=kind: calls.update({kind: (m, args, out)}))
        for path in ("attn", "cross_attn", "mlp"):
            block.get_submodule(path).register_forward_hook(
                lambda m, args, out, key=(kind, path): outputs.update({key: out})
            )
    stdit3(**given)
    time = stdit3.t_embedder(given["timestep"], torch.float32) + stdit3.fps_embedder(given["fps"], torch.float32)
    six = stdit3.t_block(time).unflatten(-1, (6, 24))
    for kind, (block, args, out) in calls.items():
        attended, crossed, fed = (outputs[kind, path] for path in ("attn", "cross_attn", "mlp"))
        assert {t.shape for t in (attended, crossed, fed, out)} == {(BATCH, FRAMES * ROWS * COLUMNS, 24)}
        gate1, gate2 = (block.scale_shift_table[n] + six[:, n : n + 1] for n in (2, 5))
        assert torch.allclose(args[0] + gate1 * attended + crossed + gate2 * fed, out, atol=1e-5)
    assert calls["temporal"][1][0] is calls["spatial"][2]  # the temporal block goes on from the spatial one
    # cross-attention and feed-forward of some tokens are those of all, so that some can be computed alone
    some = torch.tensor([0, 7, 19])
    text = stdit3.y_embedder(given["y"].squeeze(1))
    block, (x, *_), _ = calls["spatial"]
    part = block.cross_attn(x[:, some], text, given["mask"].bool())
    assert torch.allclose(part, block.cross_attn(x, text, given["mask"].bool())[:, some], atol=1e-6)
    assert torch.allclose(block.mlp(x[:, some]), block.mlp(x)[:, some], atol=1e-6)


@torch.no_grad()
def test_the_feed_forward_and_the_final_layer(stdit3):
    x, time = torch.randn(BATCH, 6, 24, generator=torch.Generator().manual_seed(0)), torch.ones(BATCH, 1, 24) * 0.3
    mlp, final = stdit3.spatial_blocks[0].mlp, stdit3.final_layer
    hidden = mlp.fc1(x)
    bent = hidden / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    assert torch.allclose(mlp(x), mlp.fc2(bent), atol=1e-5)
    shift, scale = final.scale_shift_table + 0.3
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    assert torch.allclose(final(x, time), final.linear(normed * (1 + scale) + shift), atol=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(24, 5), (24, 0), (24, 8), (24, -2), (22, 1)], ids=str
)  # 24 / 8 = 3 channels cannot turn in pairs
def test_sizes_that_do_not_divide(hidden_size, heads):
    with pytest.raises(ValueError) as e:
        build(hidden_size=hidden_size, num_heads=heads)
    assert str(e.value) == (
        f"num_heads must divide hidden_size {hidden_size}, a multiple of 4, into even parts; got {heads}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, 4, 8)}, "x must be [batch, 4, frames, rows, columns]; got [2, 4, 4, 8]"),
        ({"x": torch.zeros(2, 3, 3, 4, 8)}, "x must be [batch, 4, frames, rows, columns]; got [2, 3, 3, 4, 8]"),
        ({"y": torch.zeros(2, 5, 6)}, "y must be [2, 1, text, 6]; got [2, 5, 6]"),
        ({"y": torch.zeros(1, 1, 5, 6)}, "y must be [2, 1, text, 6]; got [1, 1, 5, 6]"),
        ({"y": torch.zeros(2, 1, 5, 7)}, "y must be [2, 1, text, 6]; got [2, 1, 5, 7]"),
        ({"mask": torch.ones(1, 5)}, "mask must be [2, 5]; got [1, 5]"),
        ({"mask": torch.ones(2, 1, 5)}, "mask must be [2, 5]; got [2, 1, 5]"),
        ({"mask": torch.eye(5)[:2] * torch.tensor([[1], [0]])}, "mask must leave every row a text token"),
        ({"x_mask": torch.ones(2, 5)}, "x_mask must be [2, 3]; got [2, 5]"),
        ({"timestep": torch.ones(3)}, "timestep must be one number, or [2]; got [3]"),
        ({"fps": torch.ones(2, 1)}, "fps must be one number, or [2]; got [2, 1]"),
        ({"height": torch.ones(4)}, "height must be one number, or [2]; got [4]"),
        ({"width": torch.ones(0)}, "width must be one number, or [2]; got [0]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_inputs(stdit3, given, changes, message):
    with pytest.raises(ValueError) as e:
        run(stdit3, given, **changes)
    assert str(e.value) == message


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name not in names}


FOREIGN = {
    "empty": (lambda s: {}, "'x_embedder.proj.weight'"),
    "not a mapping": (lambda s: [1], "no attribute 'items'"),
    "not tensors": (lambda s: {"x_embedder.proj.weight": 3}, "no attribute 'shape'"),
    "of another network": (lambda s: {"patch_embed.proj.weight": torch.zeros(3)}, "'x_embedder.proj.weight'"),
    "of an image network": (
        lambda s: {**s, "x_embedder.proj.weight": torch.zeros(24, 4, 2, 2)},
        "'x_embedder.proj.weight' is (24, 4, 2, 2)",
    ),
    "empty patches": (
        lambda s: {**s, "x_embedder.proj.weight": torch.zeros(24, 4, 1, 0, 2)},
        "'x_embedder.proj.weight' is (24, 4, 1, 0, 2)",
    ),
    "a scalar": (lambda s: {**s, "x_embedder.proj.weight": torch.zeros(())}, "not enough values"),
    "no null text": (lambda s: without(s, "y_embedder.y_embedding"), "'y_embedder.y_embedding'"),
    "missing": (
        lambda s: without(s, "temporal_blocks.1.mlp.fc2.bias"),
        "'temporal_blocks.1.mlp.fc2.bias' is missing, where (24,) was expected",
    ),
    "a lost block": (
        lambda s: {k: v for k, v in s.items() if "temporal_blocks.1" not in k},
        "'temporal_blocks.1.attn.k_norm.weight' is missing, where (12,) was expected",
    ),
    "one norm fewer": (
        lambda s: without(s, "spatial_blocks.0.attn.k_norm.weight"),
        "'spatial_blocks.0.attn.k_norm.weight' is missing, where (12,) was expected",
    ),
    "too much": (
        lambda s: {**s, "pos_embed": torch.zeros(2)},
        "'pos_embed' is (2,), where no such tensor was expected",
    ),
    "another shape": (
        lambda s: {**s, "final_layer.linear.bias": torch.zeros(20)},
        "'final_layer.linear.bias' is (20,), where (16,) was expected",
    ),
    "no width": (
        lambda s: {**s, "spatial_blocks.0.mlp.fc1.weight": torch.zeros(())},
        "index out of range",
    ),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_state_dicts(stdit3, change, message):
    with pytest.raises(ValueError, match=r"^not a state dict of STDiT3: ") as e:
        load_stdit3(change(stdit3.state_dict()), heads=2)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("heads", [0, 5, -2, 24, 8, 2.0, None], ids=str)
def test_heads_that_do_not_divide(stdit3, heads):
    with pytest.raises(ValueError, match=f"^heads must divide the width 24 into even parts; got {heads}$"):
        load_stdit3(stdit3.state_dict(), heads)


def test_heads_of_another_network(stdit3):
    with pytest.raises(ValueError, match=r"^not a state dict of STDiT3: 'rope.freqs' is \(6,\), where \(3,\) was exp"):
        load_stdit3(stdit3.state_dict(), heads=4)
    assert load_stdit3(stdit3.state_dict(), heads=2).spatial_blocks[0].attn.heads == 2


# ---- sites and caching ----------------------------------------------------------------------------------------------
def test_sites(stdit3):
    found = {site.name: (site.kind, site.tokenwise) for site in describe(stdit3).sites}
    blocks = [f"{kind}_blocks.{n}" for kind in ("spatial", "temporal") for n in range(2)]
    for block in blocks:
        assert found.pop(f"{block}.attn") == ("attention", False)
        assert found.pop(f"{block}.mlp") == ("feed-forward", True)
    rest = {name for name, (kind, _) in found.items() if kind != "stack"}
    assert rest <= {f"{block}.cross_attn" for block in blocks}


def sampled(model: STDiT3, given: dict[str, Any], steps: int = 6, before: Any = lambda k: None) -> Tensor:
    """Euler steps of the velocity, without guidance."""
    x = given["x"]
    for k in range(steps):
        before(k)
        x = x + run(model, given, x=x, timestep=1000 * (1 - k / steps))[:, : model.in_channels] / steps
    return x


def test_a_cached_run(stdit3, given):
    before = tiny.fingerprint(stdit3)
    plain = sampled(stdit3, given)
    with dittocache.enable(stdit3, "fora", interval=2, anchor="start") as cache:
        with cache.run(6):
            cached = sampled(stdit3, given, before=cache.step)
        trace = cache.trace
    modules = [n for n, site in enumerate(trace.sites) if site.endswith((".attn", ".mlp"))]
    assert len(modules) == 8
    for k, row in enumerate(trace.table[:, modules]):
        assert (row == (k % 2 == 0)).all()
    assert 1e-4 < tiny.relative(cached, plain) < 1
    assert tiny.fingerprint(stdit3) == before and torch.equal(sampled(stdit3, given), plain)


@pytest.mark.parametrize("shortcut", [True, False])
def test_reuse_on_frozen_inputs_equals_computing(stdit3, given, shortcut):
    ran: list[nn.Module] = []
    for block in (*stdit3.spatial_blocks, *stdit3.temporal_blocks):
        for module in (block.attn.qkv, block.mlp.fc1):
            module.register_forward_hook(lambda module, *rest: ran.append(module))
    given["x_mask"] = torch.tensor([[1, 0, 1], [0, 1, 1]])
    plain = run(stdit3, given)
    ran.clear()
    changes = {} if shortcut else {"reuse_block": None}
    cache = dittocache.enable(stdit3, "fora", interval=4, anchor="start")
    with tiny.patched_family("STDiT3Block", **changes), cache, cache.run(4):
        for k in range(4):
            cache.step(k)
            assert torch.allclose(run(stdit3, given), plain, atol=1e-6)
            assert len(ran) == 8  # all at the first step, none later


def test_the_shortcut_equals_the_plain_path(stdit3, given):
    results = []
    for changes in ({}, {"reuse_block": None}):
        with tiny.patched_family("STDiT3Block", **changes):
            cache = dittocache.enable(stdit3, "fora", interval=3)
            with cache, cache.run(6):
                results.append(sampled(stdit3, given, before=cache.step))
    assert torch.allclose(*results, atol=1e-6)


# ---- the authors' numbers -------------------------------------------------------------------------------------------
@needs_goldens
def test_golden_network():
    """The first forward of the uncached reference; whole runs are in tests/parity."""
    data = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
    entry, case = data["networks"]["stdit3-tiny"], next(c for c in data["cases"] if c["id"] == "stdit3-none-30")
    model = load_stdit3(load_file(FOLDER / entry["file"]), heads=entry["config"]["num_heads"])
    configured = STDiT3(**entry["config"]).eval()
    configured.load_state_dict(model.state_dict())  # strict: the config says what the tensors say
    z = load_file(FOLDER / data["inputs"][case["input"]]["file"])
    times = data["samplers"][case["sampler"]]["timesteps"]

    ratio = (z["height"] * z["width"] / 512**2).sqrt() * (5 * (z["num_frames"] // 17)).sqrt()
    u = 1 - torch.arange(len(times))[:, None] / len(times)
    assert torch.allclose(1000 * ratio * u / (1 + (ratio - 1) * u), torch.tensor(times)[:, None], rtol=1e-6)

    null = configured.y_embedder.y_embedding.expand_as(z["y"])
    both = {name: torch.cat([z[name]] * 2) for name in ("mask", "fps", "height", "width")}
    out = run(configured, both, x=torch.cat([z["z"]] * 2), y=torch.cat([z["y"], null]), timestep=times[0])
    want = load_file(FOLDER / case["expect"]["file"])["network_outputs"][0]
    assert tiny.relative(out[:, :4], want) <= case["tolerance"]["velocity_rel_l2_per_step"] / 10
