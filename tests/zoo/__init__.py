"""One tiny model with random weights for every transformer class of diffusers, and the inputs of its forwards.

    entry = ZOO["FluxTransformer2DModel"]
    model = entry.build(0)
    latents = prediction(model, entry.inputs(model, batch=2, k=3, steps=8, seed=0))

See `Entry` for what else is known of a class. What is in no pipeline's loop is named in `EXCLUDED`, with the reason.
"""

import diffusers

from .base import FRAMES, TEXT, Entry, prediction
from .image import IMAGE
from .other import OTHER
from .video import VIDEO

__all__ = ["EXCLUDED", "FRAMES", "TEXT", "ZOO", "Entry", "prediction"]

# older versions of diffusers have fewer
ZOO: dict[str, Entry] = {found.name: found for found in [*IMAGE, *VIDEO, *OTHER] if hasattr(diffusers, found.name)}

EXCLUDED: dict[str, str] = {
    "DualTransformer2DModel": "two Transformer2DModel side by side in a U-Net, mixed; no list of blocks of its own",
    "HunyuanDiT2DControlNetModel": "a control net: what it gives is added to HunyuanDiT2DModel's blocks",
    "HunyuanDiT2DMultiControlNetModel": "several control nets in one",
    "MiniMaxMusic3RVQDepthDecoder": "writes the codes of one frame of sound one after another; nothing is denoised",
    "TransformerSpatioTemporalModel": "a part of the U-Net of Stable Video Diffusion, not a model that is loaded",
}
