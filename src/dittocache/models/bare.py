"""Blocks that hold the layers of their feed-forward themselves, or parts under names of their own."""

from __future__ import annotations

from torch import Size, Tensor

from ..describe import Family, Layout, register_family, register_layout

register_family(
    Family(
        blocks=("PRXBlock",),
        text="first",
        parts=(("down_proj", "feed-forward", ("gate_proj", "up_proj", "mlp_act")),),
    )
)
register_family(Family(blocks=("MiniMaxMusic3TransformerBlock",), parts=(("ff_out", "feed-forward", ("ff_in",)),)))

# its mask has rows of queries
register_family(Family(blocks=("DecoderLayer",), whole=("layer.1.attention",)))

# ---- UVit2D (aMUSEd) ------------------------------------------------------------------------------------------------
# convolutions as feed-forwards: [batch, channels, height, width] in, normed over all places
register_family(
    Family(
        blocks=("ConvNextBlock",),
        parts=(
            (
                "channelwise_linear_2",
                "feed-forward",
                ("depthwise", "norm", "channelwise_linear_1", "channelwise_act", "channelwise_norm"),
            ),
        ),
        whole=("*",),
    )
)


def from_places(stream: Tensor, shape: Size) -> Tensor:
    """[batch, channels, height, width] as the tokens of the attentions that follow, [batch, tokens, channels]."""
    return stream.flatten(2).transpose(1, 2)


ARMS = ("down_block", "up_block")
register_layout(
    Layout(
        models=("UVit2DModel",),
        interleaved=tuple((f"{arm}.res_blocks", f"{arm}.attention_blocks") for arm in ARMS),
        carry=from_places,
        main=tuple(f"{arm}.res_blocks" for arm in ARMS),
        order=("down_block", "transformer_layers", "up_block"),
    )
)

# ---- RFdiffusion4 (RFD4) --------------------------------------------------------------------------------------------
# pairs of residues [batch, tokens, tokens, channels], which later layers read
register_family(
    Family(
        blocks=("RFD4ProteinaPairUpdate",),
        parts=tuple((path, "feed-forward", ()) for path in ("tri_mult_out", "tri_mult_in", "transition_out")),
        whole=("*",),
    )
)
register_family(Family(blocks=("RFD4ProteinaTrunkLayer",), whole=("*",)))  # condition and mask come with the tokens
register_layout(
    Layout(models=("RFD4ProteinaTransformer",), interleaved=(("transformer_layers", "pair_update_layers"),))
)
