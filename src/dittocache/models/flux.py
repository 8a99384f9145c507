"""FLUX: dual-stream blocks, and single-stream blocks whose last projection holds attention and feed-forward at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..describe import Family, register_family

Streams = tuple[Tensor, Tensor]


def reuse_dual(
    block: Any,
    features: dict[str, tuple[Tensor, ...]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
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


def reuse_single(
    block: Any,
    features: dict[str, tuple[Tensor, ...]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> Streams | Any:
    """A single-stream block from the kept output of its last projection; text comes before image."""
    if hidden_states.dtype == torch.float16:
        return NotImplemented
    gate = block.norm.linear(block.norm.silu(temb)).unflatten(1, (3, -1))[:, 2:3]
    (feature,) = features["proj_out"]
    text = encoder_hidden_states.shape[1]
    return (
        torch.addcmul(encoder_hidden_states, gate, feature[:, :text]),
        torch.addcmul(hidden_states, gate, feature[:, text:]),
    )


register_family(
    Family(
        blocks=("FluxTransformerBlock",), reuse_block=reuse_dual, ff_input=lambda block: "norm2", text="first"
    )
)
register_family(
    Family(
        blocks=("FluxSingleTransformerBlock",),
        fused="proj_out",
        mutes=("attn", "proj_mlp", "act_mlp"),
        reuse_block=reuse_single,
        text="first",
        splits=True,
    )
)
