"""Where text stands in blocks that run text and image as one sequence, and what else is to be known of these."""

from __future__ import annotations

from ..describe import Family, Layout, register_family, register_layout

register_family(
    Family(
        blocks=(
            "AuraFlowJointTransformerBlock",
            "AuraFlowSingleTransformerBlock",
            "BriaFibo2TransformerBlock",
            "CogVideoXBlock",
            "CogView3PlusTransformerBlock",
            "ConsisIDBlock",
            "HeliosTransformerBlock",
            "Krea2TransformerBlock",
            "Lumina2TransformerBlock",
            "OmniGenBlock",
            "QwenImageTransformerBlock",
            "QwenImage21TransformerBlock",
        ),
        text="first",
    )
)
register_family(
    Family(
        blocks=(
            "HiDreamBlock",
            "JointTransformerBlock",
            "JoyImageTransformerBlock",
            "JoyImageEditPlusTransformerBlock",
            "MochiTransformerBlock",
            "ZImageTransformerBlock",
        ),
        text="last",
    )
)
# one feed-forward for both, the image first
register_family(
    Family(
        blocks=("CogView4TransformerBlock", "GlmImageTransformerBlock", "EasyAnimateTransformerBlock"),
        text="first",
        twice=("ff",),
    )
)
# experts choose their tokens
register_family(Family(blocks=("NucleusMoEImageTransformerBlock",), text="last", whole=("NucleusMoELayer",)))
register_family(Family(blocks=("LuminaNextDiTBlock", "AudioDiTBlock"), whole=("attn2", "cross_attn")))  # queries rotate
# the blocks of LTX-2, but without sound
SOUND = ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn", "audio_ff")
register_family(Family(blocks=("SanaWMLTX2RefinerTransformerBlock",), unused=SOUND))
register_family(
    Family(blocks=("LTX2VideoTransformerBlock",), whole=("audio_to_video_attn", "video_to_audio_attn"))  # here too
)
# [tokens, batch, channels]; a mask with more rows than there are; one token of many
register_layout(
    Layout(
        models=("ErnieImageTransformer2DModel", "PriorTransformer"),
        whole=True,
        together=True,
    )
)
# [tokens of all rows, channels], of text and of the sample
register_layout(Layout(models=("Cosmos3OmniTransformer",), whole=True, together=True, stream=1))
# modulations of all rows and one more; rows are places; lists of videos, and what was kept of a reference
register_layout(
    Layout(
        models=("QwenImage21Transformer2DModel", "TransformerTemporalModel", "WanAnimate2Transformer3DModel"),
        together=True,
    )
)
# padded for the text, or in between; text, video and sound in one
register_layout(
    Layout(
        models=("Ideogram4Transformer2DModel", "MiniMaxH3Transformer3DModel"),
        whole=True,
    )
)
register_family(
    Family(
        blocks=("Cosmos3VLTextMoTDecoderLayer",), parts=(("mlp", "context-feed-forward", ()),)
    )  # `mlp_moe_gen`: image
)
register_layout(Layout(models=("Lumina2Transformer2DModel",), order=("context_refiner", "noise_refiner", "layers")))
