"""DiT and PixArt: diffusers' BasicTransformerBlock with adaLN-zero or adaLN-single."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..describe import Family, register_family


def _modulation(block: Any, x: Tensor, timestep: Any, class_labels: Any, rows: tuple[int, ...]) -> list[Tensor] | None:
    """Those of the block's six modulations [batch, 1, channels]; None for a block without them.

    Of adaLN-zero's projection, the largest weight that a reused block reads, only the wanted rows are computed.
    """
    if block.norm_type == "ada_norm_zero":
        norm, linear = block.norm1, block.norm1.linear
        embedding = norm.silu(norm.emb(timestep, class_labels, hidden_dtype=x.dtype))
        if _is_plain(linear):
            w, b = linear.weight.unflatten(0, (6, -1)), linear.bias.unflatten(0, (6, -1))
            return [F.linear(embedding, w[i], b[i]).unsqueeze(1) for i in rows]
        modulation = linear(embedding).unflatten(1, (6, -1))
    elif block.norm_type == "ada_norm_single":
        modulation = block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
    else:
        return None
    return [modulation[:, i : i + 1] for i in rows]


def _is_plain(linear: nn.Module) -> bool:
    """Its weight can be read directly: no LoRA or quantised class, no hooks, no offloading."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    own = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return own and linear.bias is not None and not hooked


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
    gates = _modulation(block, hidden_states, timestep, class_labels, (2, 5))
    if gates is None:
        return NotImplemented
    hidden_states = torch.addcmul(hidden_states, gates[0], features["attn1"][0])
    if "attn2" in features:
        hidden_states = hidden_states + features["attn2"][0]
    return torch.addcmul(hidden_states, gates[1], features["ff"][0])


register_family(
    Family(
        blocks=("BasicTransformerBlock",),
        reuse_block=reuse_block,
        ff_input=lambda block: "norm2" if block.norm_type == "ada_norm_single" else "norm3",
    )
)
