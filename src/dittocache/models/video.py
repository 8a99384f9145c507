"""Videos: blocks of several lists in turn, and blocks that serve others."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor

from ..describe import Layout, register_layout


def along_frames(stream: Tensor, shape: Size) -> Tensor:
    """[batch * frames, places, channels] as [batch * places, frames, channels]."""
    frames = shape[1]
    return stream.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)


register_layout(
    Layout(
        models=("LatteTransformer3DModel",),
        interleaved=(("transformer_blocks", "temporal_transformer_blocks"),),
        carry=along_frames,
    )
)
# what follows on some blocks: attentions to faces, whose output the model adds
register_layout(Layout(models=("WanAnimateTransformer3DModel",), interleaved=(("blocks", "face_adapter"),)))
register_layout(
    Layout(models=("ConsisIDTransformer3DModel",), interleaved=(("transformer_blocks", "perceiver_cross_attention"),))
)


def vace_lead(model: Any) -> tuple[tuple[str, str], ...]:
    """The hints for the blocks are all made before; none of them may be added where the last block has left off."""
    return () if len(model.blocks) - 1 in model.config.vace_layers else (("vace_blocks", "blocks"),)


register_layout(Layout(models=("WanVACETransformer3DModel",), lead=vace_lead, order=("vace_blocks", "blocks")))
