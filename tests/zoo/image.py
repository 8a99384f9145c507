"""Classes that draw pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from .base import TEXT, Draw, Entry, entry, grid, rotary

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS = {"in_channels": 4, "out_channels": 4}
FLUX = {**HEADS, "in_channels": 4, "num_layers": 3, "num_single_layers": 3, "joint_attention_dim": 12}
FLUX_STACKS = ("transformer_blocks", "single_transformer_blocks")


# ---- tokens with position ids, dual and single streams --------------------------------------------------------------
def _flux(d: Draw, axes: int = 3, time: float = 1) -> dict[str, Any]:
    return {
        "hidden_states": d.latents(d.tokens, 4),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time(time),
        "img_ids": grid(d.size, d.size, axes=axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


STREAMS = [
    entry(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)},
        lambda model, d: _flux(d) | {"pooled_projections": d.noise("pooled", 10)},
        *FLUX_STACKS,
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
    entry(
        "BriaTransformer2DModel",
        {**FLUX, "axes_dims_rope": [4, 4, 8]},
        lambda model, d: _flux(d, time=1000),
        *FLUX_STACKS,
    ),
    entry(
        "BriaFiboTransformer2DModel",
        {**FLUX, "axes_dims_rope": [4, 4, 8], "text_encoder_dim": 10},
        lambda model, d: (
            _flux(d, time=1000) | {"text_encoder_layers": [d.text(10, name=f"layer {n}") for n in range(6)]}
        ),
        *FLUX_STACKS,
        conditions=("encoder_hidden_states", "text_encoder_layers"),
    ),
    entry(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        lambda model, d: _flux(d),
        *FLUX_STACKS,
    ),
    entry(
        "Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        lambda model, d: _flux(d, axes=4) | {"guidance": torch.full((d.batch,), 4.0)},
        *FLUX_STACKS,
    ),
    entry(
        "Flux3Transformer2DModel",
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 5, "timestep_channels": 16},
        lambda model, d: (
            _flux(d, axes=4)
            | {
                "image_cond_hidden_states": d.noise("picture", 5, 5),
                "image_cond_ids": torch.nn.functional.pad(grid(5), (0, 1)) + 1,
            }
        ),
        "txt_mode_blocks",
        "mode_blocks.image",
        "mode_blocks.image_cond",
        "single_transformer_blocks",
        conditions=("encoder_hidden_states", "image_cond_hidden_states"),
    ),
    entry(
        "LongCatImageTransformer2DModel",
        {**FLUX, "axes_dims_rope": [4, 4, 8], "pooled_projection_dim": 12},
        lambda model, d: _flux(d),
        *FLUX_STACKS,
    ),
    entry(
        "OvisImageTransformer2DModel",
        {**FLUX, "out_channels": 4, "axes_dims_rope": (4, 4, 8)},
        lambda model, d: _flux(d),
        *FLUX_STACKS,
    ),
    entry(
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "sample_size": 8,
            "num_mmdit_layers": 3,
            "num_single_dit_layers": 3,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "encoder_hidden_states": d.text(12),
            "timestep": d.time(1),
        },
        "joint_transformer_blocks",
        "single_transformer_blocks",
    ),
    entry(
        "HiDreamImageTransformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "patch_size": 2,
            "num_layers": 3,
            "num_single_layers": 3,
            "caption_channels": [10, 12],
            "text_emb_dim": 9,
            "axes_dims_rope": (4, 4, 8),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1, 2, 3, 4, 5],
        },
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "timesteps": d.time(),
            "encoder_hidden_states_t5": d.text(10, 5),
            "encoder_hidden_states_llama3": [d.text(12, name=f"layer {n}") for n in range(6)],
            "pooled_embeds": d.noise("pooled", 9),
        },
        "double_stream_blocks",
        "single_stream_blocks",
        time=("timesteps",),
        conditions=("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
    ),
    entry(
        "HunyuanImageTransformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "num_single_layers": 3,
            "num_refiner_layers": 2,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "rope_axes_dim": (8, 8),
        },
        lambda model, d: {
            "hidden_states": d.image(4),
            "timestep": d.time(),
            "encoder_hidden_states": d.text(12),
            "encoder_attention_mask": d.mask(),
            "encoder_hidden_states_2": d.text(10, 5, "glyphs"),
            "encoder_attention_mask_2": d.mask(5),
        },
        *FLUX_STACKS,
        conditions=("encoder_hidden_states", "encoder_hidden_states_2"),
    ),
]


# ---- streams side by side in every block ----------------------------------------------------------------------------
def _cogview(d: Draw, *given: str) -> dict[str, Any]:
    return {
        "hidden_states": d.image(4, 2),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time(),
    } | {name: d.constant(64.0, 32.0) for name in given}


def _qwen(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.latents(d.tokens, 4),
        "encoder_hidden_states": d.text(12),
        "encoder_hidden_states_mask": d.mask().bool(),
        "timestep": d.time(1),
        "img_shapes": [[(1, d.size, d.size)]] * d.batch,
    }


def _joyimage_patches(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.latents(d.tokens, 4, 1, 2, 2),
        "timestep": d.time(),
        "encoder_hidden_states": d.text(12),
        "encoder_hidden_states_mask": d.mask(),
        "shape_list": [[(1, d.size, d.size)]] * d.batch,
    }


JOYIMAGE = {
    **LATENTS,
    "patch_size": [1, 2, 2],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 12,
    "num_layers": 3,
    "rope_dim_list": [4, 4, 8],
}
JOINT = [
    entry(
        "SD3Transformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "sample_size": 8,
            "num_layers": 4,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "encoder_hidden_states": d.text(12),
            "pooled_projections": d.noise("pooled", 10),
            "timestep": d.time(),
        },
        "transformer_blocks",
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
    entry(
        "CogView3PlusTransformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        lambda model, d: _cogview(d, "original_size", "target_size", "crop_coords"),
        "transformer_blocks",
    ),
    entry(
        "CogView4Transformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 8,
            "rope_axes_dim": (16, 16),
        },
        lambda model, d: _cogview(d, "original_size", "target_size", "crop_coords"),
        "transformer_blocks",
    ),
    entry(
        "GlmImageTransformer2DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 20,
        },
        lambda model, d: (
            _cogview(d, "target_size", "crop_coords")
            | {
                "prior_token_id": d.numbers("prior", 20, d.tokens),
                "prior_token_drop": torch.zeros(d.batch, d.tokens, dtype=torch.bool),
            }
        ),
        "transformer_blocks",
        conditions=("encoder_hidden_states", "prior_token_id"),
    ),
    entry(
        "QwenImageTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 1, "num_layers": 3, "joint_attention_dim": 12}
        | {"axes_dims_rope": (4, 4, 8)},
        lambda model, d: _qwen(d),
        "transformer_blocks",
    ),
    entry(
        "JoyImageEditTransformer3DModel",
        JOYIMAGE,
        lambda model, d: {
            "hidden_states": d.video(4, 2, frames=1),
            "timestep": d.time(),
            "encoder_hidden_states": d.text(12),
        },
        "double_blocks",
    ),
    entry("JoyImageEditPlusTransformer3DModel", JOYIMAGE, lambda model, d: _joyimage_patches(d), "double_blocks"),
]


# ---- one sequence of text and picture -------------------------------------------------------------------------------
def _ideogram(d: Draw) -> dict[str, Any]:
    pad, text = torch.nn.functional.pad, torch.cat([grid(TEXT), grid(d.size, d.size) + TEXT])
    kinds = torch.tensor([3] * TEXT + [2] * d.tokens)  # the class's codes of text and picture
    return {
        "hidden_states": pad(d.latents(d.tokens, 4), (0, 0, TEXT, 0)),
        "timestep": d.time(1),
        "encoder_hidden_states": pad(d.text(12), (0, 0, 0, d.tokens)),
        "position_ids": text.long().repeat(d.batch, 1, 1),
        "segment_ids": torch.zeros(d.batch, TEXT + d.tokens, dtype=torch.long),
        "indicator": kinds.repeat(d.batch, 1),
    }


def _omnigen(d: Draw) -> dict[str, Any]:
    length = TEXT + 1 + d.tokens
    return {
        "hidden_states": d.image(4, 2),
        "timestep": d.time(1),
        "input_ids": d.numbers("text", 20, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(d.batch, length, length),
        "position_ids": torch.arange(length).repeat(d.batch, 1),
    }


def _qwen21(d: Draw) -> dict[str, Any]:
    slots = torch.tensor([False] * TEXT + [True] * (d.tokens // 4))  # 4 tokens of the picture each
    return {
        "hidden_states": d.latents(d.tokens, 4),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time(1),
        "img_shapes": [[(1, d.size, d.size)]] * d.batch,
        "img_mask": slots.repeat(d.batch, 1),
    }


def _lumina(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.image(4, 2),
        "timestep": d.time(1),
        "encoder_hidden_states": d.text(12),
        "encoder_mask": d.mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 8, 8),
        "cross_attention_kwargs": {},
    }


SINGLE = [
    entry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_refiner_layers": 3,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (1, 2),
            "perceiver_num_layers": 2,
            "min_num_gist_tokens": 5,
            "max_num_gist_tokens": 10,
            "gist_step": 5,
            "gist_min_text_len": 8,
            "gist_max_text_len": 16,
            "axes_dims": (4, 4, 8),
            "axes_lens": (64, 16, 16),
        },
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "timestep": d.time(1),
            "encoder_hidden_states": d.noise("text", 3, TEXT, 12),  # for the resampler and for two blocks
        },
        "noise_refiner",
        "layers",
    ),
    entry(
        "ErnieImageTransformer2DModel",
        {
            **LATENTS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 48,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 4, 8),
        },
        lambda model, d: {
            "hidden_states": d.image(4),
            "timestep": d.time(),
            "text_bth": d.text(12),
            "text_lens": torch.full((d.batch,), TEXT),
        },
        "layers",
        conditions=("text_bth",),
    ),
    entry(
        "Ideogram4Transformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": 12,
            "mrope_section": (4, 2, 2),
        },
        lambda model, d: _ideogram(d),
        "layers",
    ),
    entry(
        "Krea2Transformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 24,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda model, d: {
            "hidden_states": d.latents(d.tokens, 4),
            "encoder_hidden_states": d.noise("text", TEXT, 3, 16),  # of three layers of the text encoder
            "timestep": d.time(1),
            "position_ids": torch.cat([grid(TEXT), grid(d.size, d.size) + TEXT]),
        },
        "transformer_blocks",
    ),
    entry(
        "LuminaNextDiT2DModel",
        {
            "in_channels": 4,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 12,
        },
        lambda model, d: _lumina(d),
        "layers",
    ),
    entry(
        "Lumina2Transformer2DModel",
        {
            "in_channels": 4,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 12,
        },
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "timestep": d.time(1),
            "encoder_hidden_states": d.text(12),
            "encoder_attention_mask": d.mask().bool(),
        },
        "noise_refiner",
        "context_refiner",
        "layers",
    ),
    entry(
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 4,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "mlp_ratio": 6,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        lambda model, d: _qwen(d),
        "transformer_blocks",
    ),
    entry(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 20,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
        },
        lambda model, d: _omnigen(d),
        "layers",
        conditions=("input_ids",),
    ),
    entry(
        "QwenImage21Transformer2DModel",
        {**HEADS, **LATENTS, "num_layers": 3, "context_in_dim": 12, "axes_dims_rope": (4, 4, 8)},
        lambda model, d: _qwen21(d),
        "transformer_blocks",
    ),
    entry(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 3,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 4, 8],
            "axes_lens": [128, 16, 16],
        },
        lambda model, d: {
            "x": list(d.latents(4, 1, 2 * d.size, 2 * d.size)),
            "t": d.time(1),
            "cap_feats": list(d.text(12)),
        },
        "noise_refiner",
        "context_refiner",
        "layers",
        latents=("x",),
        time=("t",),
        conditions=("cap_feats",),
    ),
]

# ---- a picture, and text by cross-attention or by class -------------------------------------------------------------
BASIC = {**HEADS, "in_channels": 4, "num_layers": 3}
SANA = {**HEADS, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}


def _pixart(d: Draw, channels: int = 12) -> dict[str, Any]:
    return {"hidden_states": d.image(4, 2), "encoder_hidden_states": d.text(channels), "timestep": d.time().long()}


def _hunyuan(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.image(4, 2),
        "timestep": d.time(),
        "encoder_hidden_states": d.text(12),
        "text_embedding_mask": d.mask(),
        "encoder_hidden_states_t5": d.text(16, 5, "t5"),
        "text_embedding_mask_t5": d.mask(5),
        "image_rotary_emb": rotary(d.tokens, 16),
    }


def _uvit(d: Draw) -> dict[str, Any]:
    codes = d.numbers("codes", 20, 4 * d.tokens)
    masked = d.noise("order", 4 * d.tokens).argsort(dim=1).argsort(dim=1) >= 4 * d.tokens * (d.k + 1) // d.steps
    return {
        "input_ids": codes.masked_fill(masked, 20).reshape(d.batch, 2 * d.size, 2 * d.size),
        "encoder_hidden_states": d.text(12),
        "pooled_text_emb": d.noise("pooled", 10),
        "micro_conds": d.constant(64.0, 64.0, 0.0, 0.0, 6.0),
    }


CROSS = [
    entry(
        "DiTTransformer2DModel",
        {**BASIC, "out_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 10},
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "timestep": d.time().long(),
            "class_labels": d.numbers("label", 10),
        },
        "transformer_blocks",
        conditions=("class_labels",),
    ),
    entry(
        "Transformer2DModel",
        {**BASIC, "patch_size": 2, "sample_size": 8, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_single"}
        | {"cross_attention_dim": 32, "caption_channels": 12, "attention_bias": True}
        | {"norm_elementwise_affine": False},
        lambda model, d: _pixart(d) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        "transformer_blocks",
    ),
    entry(
        "PixArtTransformer2DModel",
        {**BASIC, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 12},
        lambda model, d: _pixart(d) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        "transformer_blocks",
    ),
    entry(
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 6,  # the last two take what the first two gave
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": TEXT,
            "text_len_t5": 5,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda model, d: _hunyuan(d),
        "blocks",
        conditions=("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    entry(
        "SanaTransformer2DModel",
        {**SANA, **LATENTS, "num_layers": 3, "caption_channels": 12, "sample_size": 4},
        lambda model, d: {
            "hidden_states": d.image(4),
            "encoder_hidden_states": d.text(12),
            "timestep": d.time(),
        },
        "transformer_blocks",
    ),
    entry(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 12, "hidden_size": 32, "num_heads": 2, "depth": 3, "axes_dim": [8, 8]},
        lambda model, d: {
            "hidden_states": d.image(4, 2),
            "timestep": d.time(1),
            "encoder_hidden_states": d.text(12),
        },
        "blocks",
    ),
    entry(
        "DreamLiteTransformer2DModel",
        {**BASIC, "norm_num_groups": 2, "cross_attention_dim": 12, "qk_norm": "rms_norm"},
        lambda model, d: {"hidden_states": d.image(4), "encoder_hidden_states": d.text(12)},
        "transformer_blocks",
        time=(),  # a part of a U-Net, which adds the time before it
    ),
    entry(
        "UVit2DModel",
        {
            "hidden_size": 32,
            "cond_embed_dim": 10,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 12,
            "vocab_size": 21,
            "codebook_size": 20,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 3,
            "downsample": True,
            "upsample": True,
            "block_num_heads": 2,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "sample_size": 8,
        },
        lambda model, d: _uvit(d),
        "transformer_layers",
        latents=("input_ids",),
        time=(),  # fills in masked tokens: how many are masked is all the time it has
        conditions=("encoder_hidden_states", "pooled_text_emb"),
    ),
]

IMAGE: list[Entry] = [*STREAMS, *JOINT, *SINGLE, *CROSS]
