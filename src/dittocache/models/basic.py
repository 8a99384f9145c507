"""DiT and PixArt: diffusers' BasicTransformerBlock with adaLN-zero or adaLN-single."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..describe import Family, register_family


def reuse_block(
    block: Any,
    features: dict[str, tuple[Tensor, ...]],
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    timestep: Any = None,
    cross_attention_kwargs: Any = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Any:
    """The block from kept outputs: fresh gates, additions, nothing else. hidden_states is [batch, tokens, channels]."""
    if cross_attention_kwargs or hidden_states.ndim != 3:
        return NotImplemented
    if block.norm_type == "ada_norm_zero":
        norm = block.norm1
        embedding = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        modulation = norm.linear(norm.silu(embedding)).unflatten(1, (6, -1))
    elif block.norm_type == "ada_norm_single":
        modulation = block.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
    else:
        return NotImplemented
    hidden_states = torch.addcmul(hidden_states, modulation[:, 2:3], features["attn1"][0])
    if "attn2" in features:
        hidden_states = hidden_states + features["attn2"][0]
    return torch.addcmul(hidden_states, modulation[:, 5:6], features["ff"][0])


register_family(
    Family(
        blocks=("BasicTransformerBlock",),
        reuse_block=reuse_block,
        ff_input=lambda block: "norm2" if block.norm_type == "ada_norm_single" else "norm3",
    )
)
