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
            "StableAudioDiTBlock",
            "StableAudio3DiTBlock",
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
register_family(
    Family(blocks=("LTX2VideoTransformerBlock",), whole=("audio_to_video_attn", "video_to_audio_attn"))  # here too
)
# tokens come first, then the batch; packed without a batch; padded; one token of many; text within
register_layout(
    Layout(
        models=(
            "ErnieImageTransformer2DModel",
            "Cosmos3OmniTransformer",
            "Ideogram4Transformer2DModel",
            "MiniMaxH3Transformer3DModel",
            "PriorTransformer",
        ),
        whole=True,
    )
)
register_family(
    Family(
        blocks=("Cosmos3VLTextMoTDecoderLayer",), parts=(("mlp", "context-feed-forward", ()),)
    )  # `mlp_moe_gen`: image
)
register_layout(Layout(models=("Lumina2Transformer2DModel",), order=("context_refiner", "noise_refiner", "layers")))
