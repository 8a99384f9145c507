"""HunyuanVideo, FramePack, HunyuanImage and Motif-Video: as FLUX, but text comes after the image; and HunyuanDiT."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..describe import Family, register_family
from .flux import MUTES, fused_gate, gated


def reuse_single(
    block: Any,
    features: dict[str, tuple[Tensor, ...]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    *rest: Any,
    **extras: Any,
) -> tuple[Tensor, Tensor]:
    """A single-stream block from the kept output of its last projection; streams are [batch, tokens, channels]."""
    return gated(fused_gate(block, temb), features["proj_out"][0], hidden_states, encoder_hidden_states)


register_family(
    Family(
        blocks=(
            "HunyuanVideoTransformerBlock",
            "HunyuanVideoTokenReplaceTransformerBlock",
            "HunyuanVideo15TransformerBlock",
            "HunyuanImageTransformerBlock",
        ),
        text="last",
    )
)
register_family(
    Family(
        blocks=("HunyuanVideoSingleTransformerBlock", "HunyuanImageSingleTransformerBlock"),
        fused="proj_out",
        mutes=MUTES,
        reuse_block=reuse_single,
        text="last",
        splits=True,
    )
)
register_family(  # the first frame has a gate of its own
    Family(
        blocks=("HunyuanVideoTokenReplaceSingleTransformerBlock",),
        fused="proj_out",
        mutes=MUTES,
        text="last",
        splits=True,
    )
)
# Motif: its cross-attentions rotate their queries
register_family(Family(blocks=("MotifVideoTransformerBlock",), text="last", whole=("cross_attn",)))
register_family(
    Family(
        blocks=("MotifVideoSingleTransformerBlock",),
        fused="proj_out",
        mutes=("attn", "cross_attn", "proj_mlp", "act_mlp"),
        reuse_block=reuse_single,
        text="last",
        splits=True,
    )
)
register_family(Family(blocks=("HunyuanDiTBlock",), whole=("attn2",)))  # it rotates its queries
