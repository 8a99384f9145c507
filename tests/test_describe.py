"""What a transformer is made of."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

import dittocache
from dittocache import describe

EXPECTED = {
    "dit": ([("attn1", "attention", False), ("ff", "feed-forward", True)], 3),
    "pixart": ([("attn1", "attention", False), ("attn2", "cross-attention", True), ("ff", "feed-forward", True)], 3),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_of_single_stream_models(name):
    parts, depth = EXPECTED[name]
    model = tiny.build(name)
    found = describe(model)
    modules = [site for site in found.sites if site.kind != "stack"]
    assert [(s.name, s.kind, s.tokenwise, s.block, s.depth) for s in modules] == [
        (f"transformer_blocks.{l}.{path}", kind, tokenwise, l, depth)
        for l in range(depth)
        for path, kind, tokenwise in parts
    ]
    (stack,) = found.stacks
    assert (stack.site.name, stack.site.kind, len(stack.blocks)) == ("transformer_blocks", "stack", depth)
    for entry in found.entries:
        assert model.get_submodule(entry.site.name) is entry.module


def test_sites_of_flux():
    found = describe(tiny.flux())
    names = [(s.name, s.kind, s.tokenwise) for s in found.sites]
    assert names == [
        *(
            (f"transformer_blocks.{l}.{path}", kind, tokenwise)
            for l in range(2)
            for path, kind, tokenwise in (
                ("attn", "attention", False),
                ("ff", "feed-forward", True),
                ("ff_context", "context-feed-forward", True),
            )
        ),
        *(
            (f"single_transformer_blocks.{l}.{path}", kind, kind == "fused")
            for l in range(2)
            for path, kind in (("proj_out", "fused"), ("attn", "attention"))
        ),
        ("transformer_blocks", "stack", False),
        ("single_transformer_blocks", "stack", False),
    ]
    assert [b.name for b in found.blocks] == [
        *(f"transformer_blocks.{l}" for l in range(2)),
        *(f"single_transformer_blocks.{l}" for l in range(2)),
    ]
    assert [stack.blocks for stack in found.stacks] == [(0, 1), (2, 3)]


def test_it_prints_as_a_table_and_goes_to_json(model):
    found = describe(model)
    text = str(found)
    assert (
        type(model).__name__ in text
        and "transformer_blocks" in text
        and "feed-forward" in text
        and "token-wise" in text
    )
    assert len(text.splitlines()) < 15
    data = found.to_dict()
    import json

    assert json.loads(json.dumps(data)) == data
    assert [s["name"] for s in data["sites"]] == [e.site.name for e in found.entries]


def test_bundled_model(bundled_pipe):
    found = describe(bundled_pipe.transformer)
    assert len(found.entries) == 16 and len(found.blocks) == 8
    assert str(describe(bundled_pipe)) == str(found)  # a pipeline will do


def test_describing_changes_nothing(model):
    before, plain = tiny.fingerprint(model), tiny.sample(model, steps=2)
    describe(model)
    assert tiny.fingerprint(model) == before and torch.equal(tiny.sample(model, steps=2), plain)


def test_a_description_is_the_same_while_a_cache_is_on(model):
    before = describe(model).sites
    with dittocache.enable(model, "fora"):
        assert describe(model).sites == before


def test_a_plain_torch_transformer_of_ones_own():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_attn, self.attn = nn.LayerNorm(8), SelfAttention()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.layers = nn.ModuleList([Layer() for _ in range(3)])
            self.embedders = nn.ModuleList([nn.Linear(4, 8)] * 2)

    found = describe(Net())
    assert [s.name for s in found.sites if s.kind != "stack"] == [
        f"inner.layers.{l}.{m}" for l in range(3) for m in ("attn", "mlp")
    ]
    assert [s.kind for s in found.sites][:2] == ["attention", "feed-forward"]


def test_a_feed_forward_that_mixes_tokens_is_not_token_wise():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv, self.down = nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": Mlp()}) for _ in range(2)])

    assert [s.tokenwise for s in describe(Net()).sites if s.kind == "feed-forward"] == [False, False]


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.ModuleList(), nn.Identity()],
    ids=lambda m: type(m).__name__,
)
def test_a_module_without_blocks(module):
    with pytest.raises(ValueError, match=f"{type(module).__name__} has no list of blocks.*nothing to cache") as e:
        describe(module)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("what", [None, 3, "DiT", torch.zeros(2), [1]], ids=str)
def test_not_a_module(what):
    with pytest.raises(TypeError, match=f"got {type(what).__name__}") as e:
        describe(what)
    assert "\n" not in str(e.value)


def test_an_autoencoder_is_not_a_transformer():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    with pytest.raises(ValueError, match="nothing to cache"):
        describe(vae)


def test_a_unet_does_not_crash():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        layers_per_block=1,
    )
    assert describe(unet).spans
