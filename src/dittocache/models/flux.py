"""FLUX and its kin: dual-stream blocks, and single-stream ones whose last projection holds attention and feed-forward.

Bria, Bria FIBO, LongCat-Image and Ovis-Image have the very blocks of FLUX.1; the rest differ as noted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..describe import Family, Layout, register_family, register_layout

Streams = tuple[Tensor, Tensor]


def reuse_dual(
    block: Any,
    features: dict[str, tuple[Tensor, ...]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    *positions: Any,
    **extras: Any,
) -> Streams | Any:
    """A dual-stream block from kept outputs; image and text are [batch, tokens, channels]."""
    if hidden_states.dtype == torch.float16 or len(features["attn"]) != 2:
        return NotImplemented
    streams = []
    attention = features["attn"]
    for x, norm, attended, ff in (
        (hidden_states, block.norm1, attention[0], features["ff"][0]),
        (encoder_hidden_states, block.norm1_context, attention[1], features["ff_context"][0]),
    ):
        modulation = norm.linear(norm.silu(temb)).unflatten(1, (6, -1))
        x = torch.addcmul(x, modulation[:, 2:3], attended)
        streams.append(torch.addcmul(x, modulation[:, 5:6], ff))
    return streams[1], streams[0]


def fused_gate(block: Any, temb: Tensor) -> Tensor:
    """The one gate [batch, 1, channels] of a single-stream block with AdaLayerNormZeroSingle."""
    gate: Tensor = block.norm.linear(block.norm.silu(temb)).unflatten(1, (3, -1))[:, 2:3]
    return gate


def gated(gate: Tensor, feature: Tensor, first: Tensor, second: Tensor) -> Streams:
    """Two streams [batch, tokens, channels] plus their parts of a gated feature of both, one after the other."""
    parts = feature.split([first.shape[1], second.shape[1]], dim=1)
    return torch.addcmul(first, gate, parts[0]), torch.addcmul(second, gate, parts[1])


def reuse_single(
    block: Any,
    features: dict[str, tuple[Tensor, ...]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    *positions: Any,
    **extras: Any,
) -> Streams | Any:
    """A single-stream block from the kept output of its last projection; text comes before image."""
    if hidden_states.dtype == torch.float16:
        return NotImplemented
    return gated(fused_gate(block, temb), features["proj_out"][0], encoder_hidden_states, hidden_states)


def reuse_joined(
    block: Any, features: dict[str, tuple[Tensor, ...]], hidden_states: Tensor, temb: Tensor, *rest: Any, **extras: Any
) -> Tensor | Any:
    """The same where text and image come as one."""
    if hidden_states.dtype == torch.float16:
        return NotImplemented
    return torch.addcmul(hidden_states, fused_gate(block, temb), features["proj_out"][0])


NAMES = ("Flux", "Bria", "BriaFibo", "LongCatImage", "OvisImage")
MUTES = ("attn", "proj_mlp", "act_mlp")
register_family(
    Family(
        blocks=tuple(f"{name}TransformerBlock" for name in NAMES),
        reuse_block=reuse_dual,
        ff_input=lambda block: "norm2",
        text="first",
    )
)
register_family(
    Family(
        blocks=tuple(f"{name}SingleTransformerBlock" for name in NAMES if name != "BriaFibo"),
        fused="proj_out",
        mutes=MUTES,
        reuse_block=reuse_single,
        text="first",
        splits=True,
    )
)
register_family(
    Family(
        blocks=("BriaFiboSingleTransformerBlock",),
        fused="proj_out",
        mutes=MUTES,
        reuse_block=reuse_joined,
        text="first",
        splits=True,
    )
)
# Chroma: its gates come from one network for all blocks
register_family(
    Family(blocks=("ChromaSingleTransformerBlock",), fused="proj_out", mutes=MUTES, text="first", splits=True)
)
register_family(Family(blocks=("ChromaTransformerBlock", "Flux2TransformerBlock"), text="first"))
# FLUX.2: both projections lie within the attention
register_family(Family(blocks=("Flux2SingleTransformerBlock",), fused="attn", text="first"))
# FLUX.3: streams of text, image and condition on their own, then blocks that run attention and feed-forward in turn
# of all three at once
register_family(Family(blocks=("Flux3SingleTransformerBlock",), text="first"))
register_layout(
    Layout(
        models=("Flux3Transformer2DModel",),
        main=("mode_blocks.image",),
        order=("txt_mode_blocks", "mode_blocks", "single_transformer_blocks"),
    )
)
