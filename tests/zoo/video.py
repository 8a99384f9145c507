"""Classes that draw videos."""

from __future__ import annotations

from typing import Any

import torch

from .base import FRAMES, TEXT, Draw, Entry, entry, grid, rotary

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS = {"in_channels": 4, "out_channels": 4}
SIZES: dict[str, Any] = {"sizes": (2, 3), "frames": True}


def _plain(d: Draw, patch: int = 2, **given: Any) -> dict[str, Any]:
    """Latents, text and time under their usual names."""
    return {
        "hidden_states": d.video(4, patch),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time(),
        **given,
    }


# ---- Wan and its kin: self-attention, cross-attention, feed-forward --------------------------------------------------
WAN = {**HEADS, **LATENTS, "text_dim": 12, "freq_dim": 16, "ffn_dim": 48, "num_layers": 3}


def _far(d: Draw) -> dict[str, Any]:
    times = d.time()[:, None].repeat(1, FRAMES)
    return {
        "hidden_states": d.video(4, 2).transpose(1, 2),
        "timestep": times,
        "r_timestep": times * 0.9,
        "encoder_hidden_states": d.text(12),
    }


def _helios(d: Draw) -> dict[str, Any]:
    def indices(*frames: int) -> torch.Tensor:
        return torch.tensor(frames).repeat(d.batch, 1)

    return _plain(
        d,
        indices_hidden_states=indices(3, 4, 5),
        indices_latents_history_short=indices(2),
        indices_latents_history_mid=indices(0, 1),
        latents_history_short=d.noise("before", 4, 1, 2 * d.size, 2 * d.size),
        latents_history_mid=d.noise("long before", 4, 2, 2 * d.size, 2 * d.size),
    )


def _animate(d: Draw) -> dict[str, Any]:
    side = 2 * d.size
    return _plain(
        d,
        hidden_states=torch.cat([d.video(4, 2), d.noise("picture", 8, FRAMES, side, side)], dim=1),
        pose_hidden_states=d.noise("pose", 4, FRAMES - 1, side, side),
        face_pixel_values=d.noise("face", 3, 4 * (FRAMES - 1), 16, 16),
    )


def _open_motion_encoder(model: Any) -> None:
    """Its layers scale their weights themselves, and expect them to be standard normal."""
    with torch.no_grad():
        for p in model.motion_encoder.parameters():
            if p.ndim > 1:
                p.mul_(p[0].numel() ** 0.5)


def _make_masks(model: Any) -> None:
    """Of the sizes below, without the compiler that the class would call for them."""
    with torch.compiler.set_stance("force_eager"):
        for side in SIZES["sizes"]:
            model.block_masks[FRAMES, side**2] = model.create_mask(FRAMES, side**2, torch.device("cpu"))


def _animate2(model: Any, d: Draw) -> dict[str, Any]:
    """The forwards of a run; what the reference pass kept of keys and values is made up."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache  # older ones lack it

    kept = WanAnimate2KVCache(len(model.blocks))
    for n in range(len(model.blocks)):
        kept.get(n).store(*(d.noise(f"{name} {n}", 2 * d.tokens, 2, 16) for name in ("key", "value")))
    return {
        "hidden_states": list(d.video(4, 2)),
        "timestep": d.time(),
        "encoder_hidden_states": list(d.text(12)),
        "condition_latents": list(d.noise("picture", 5, FRAMES, 2 * d.size, 2 * d.size)),
        "kv_cache": kept,
        "kv_cache_mode": "cached",
        "seq_len": FRAMES * d.tokens,
        "encoder_hidden_states_image": d.text(1280, 5, "picture embedding"),
        "reference_grid_sizes": torch.tensor([[2, d.size, d.size]] * d.batch),
        "origin_len": 8,
        "origin_area": [16 * d.size, 16 * d.size],
    }


WANS = [
    entry("WanTransformer3DModel", WAN, lambda model, d: _plain(d), "blocks", **SIZES),
    entry("ChronoEditTransformer3DModel", WAN, lambda model, d: _plain(d), "blocks", **SIZES),
    entry("SkyReelsV2Transformer3DModel", WAN, lambda model, d: _plain(d), "blocks", **SIZES),
    entry(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda model, d: _far(d),
        "blocks",
        time=("timestep", "r_timestep"),
        **SIZES,
    ),
    entry(
        "AnyFlowFARTransformer3DModel",
        WAN,
        lambda model, d: _far(d) | {"chunk_partition": [1, 2]},
        "blocks",
        time=("timestep", "r_timestep"),
        **SIZES,
    ),
    entry(
        "WanVACETransformer3DModel",
        {**WAN, "num_layers": 5, "vace_layers": [0, 2, 4], "vace_in_channels": 6},
        lambda model, d: _plain(d, control_hidden_states=d.noise("control", 6, FRAMES, 2 * d.size, 2 * d.size)),
        "blocks",
        "vace_blocks",
        conditions=("encoder_hidden_states", "control_hidden_states"),
        **SIZES,
    ),
    entry(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "num_layers": 6,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda model, d: _animate(d),
        "blocks",
        "face_adapter",
        prepare=_open_motion_encoder,
        conditions=("encoder_hidden_states", "pose_hidden_states", "face_pixel_values"),
        **SIZES,
    ),
    entry(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": TEXT,
            "in_dim": 9,
            "dim": 32,
            "ffn_dim": 48,
            "freq_dim": 16,
            "text_dim": 12,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 3,
        },
        _animate2,
        "blocks",
        prepare=_make_masks,
        conditions=("encoder_hidden_states", "condition_latents", "encoder_hidden_states_image", "kv_cache"),
        **SIZES,
    ),
    entry(
        "HeliosTransformer3DModel",
        {**WAN, "rope_dim": (4, 4, 8)},
        lambda model, d: _helios(d),
        "blocks",
        conditions=("encoder_hidden_states", "latents_history_short", "latents_history_mid"),
        **SIZES,
    ),
]

# ---- text by cross-attention, other layouts --------------------------------------------------------------------------
SANA = {**HEADS, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}


def _ltx(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.latents(FRAMES * d.tokens, 4),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time(),
        "encoder_attention_mask": d.mask(),
        "num_frames": FRAMES,
        "height": d.size,
        "width": d.size,
    }


def _refiner(model: Any, d: Draw) -> dict[str, Any]:
    where = model.build_rotary_emb_for_absolute_positions(
        d.batch, list(range(FRAMES)), d.size, d.size, torch.device("cpu"), 24.0
    )
    kwargs = _ltx(d) | {"video_rotary_emb": where}
    return {name: value for name, value in kwargs.items() if name not in ("num_frames", "height", "width")}


def _world(d: Draw) -> dict[str, Any]:
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([2.0, 2.0, 1.0, 1.0])]).repeat(d.batch, FRAMES, 1)
    camera[..., 3] += 0.1 * d.noise("path", FRAMES)
    return {
        "hidden_states": d.video(4),
        "timestep": d.time()[:, None, None].repeat(1, 1, FRAMES),
        "encoder_hidden_states": d.text(12)[:, None],
        "encoder_attention_mask": d.mask(),
        "camera_conditions": camera,
        "chunk_plucker": d.noise("rays", 6, FRAMES, d.size, d.size),
    }


def _temporal(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4).transpose(1, 2).flatten(0, 1), "num_frames": FRAMES}


LTX2 = {
    **HEADS,
    **LATENTS,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": 12,
}
CROSS = [
    entry(
        "AllegroTransformer3DModel",
        {
            **LATENTS,
            "num_attention_heads": 2,
            "attention_head_dim": 24,  # 8 for every axis
            "num_layers": 3,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": FRAMES,
            "caption_channels": 12,
        },
        lambda model, d: _plain(d, image_rotary_emb=_allegro(d)),
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "CosmosTransformer3DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "text_embed_dim": 12,
            "adaln_lora_dim": 8,
            "max_size": (8, 16, 16),
            "concat_padding_mask": False,  # torchvision would have to resize it
        },
        lambda model, d: _plain(d, timestep=d.time(1)),
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "LatteTransformer3DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 12,
            "video_length": FRAMES,
        },
        lambda model, d: _plain(d),
        "transformer_blocks",
        "temporal_transformer_blocks",
        **SIZES,
    ),
    entry(
        "LTXVideoTransformer3DModel",
        {**HEADS, **LATENTS, "cross_attention_dim": 32, "num_layers": 3, "caption_channels": 12},
        lambda model, d: _ltx(d),
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "LTX2VideoTransformer3DModel",
        LTX2,
        lambda model, d: (
            _ltx(d)
            | {
                "audio_hidden_states": d.latents(5, 4, name="sound"),
                "audio_encoder_hidden_states": d.text(12, name="text of the sound"),
                "audio_encoder_attention_mask": d.mask(),
                "audio_num_frames": 5,
            }
        ),
        "transformer_blocks",
        latents=("hidden_states", "audio_hidden_states"),
        conditions=("encoder_hidden_states", "audio_encoder_hidden_states"),
        **SIZES,
    ),
    entry("SanaWMLTX2RefinerTransformer3DModel", LTX2, _refiner, "transformer_blocks", **SIZES),
    entry(
        "SanaVideoTransformer3DModel",
        {**SANA, **LATENTS, "num_layers": 3, "caption_channels": 12, "sample_size": 4},
        lambda model, d: _plain(d),
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,  # every fourth with the common attention
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "caption_channels": 12,
        },
        lambda model, d: _world(d),
        "blocks",
        conditions=("encoder_hidden_states", "camera_conditions", "chunk_plucker"),
        tolerance=1e-3,  # the common attention is bfloat16
        **SIZES,
    ),
    entry(
        "TransformerTemporalModel",
        {**HEADS, "in_channels": 4, "num_layers": 3, "norm_num_groups": 2},
        lambda model, d: _temporal(d),
        "transformer_blocks",
        time=(),  # a part of a U-Net, which adds time and text around it
        conditions=(),
        **SIZES,
    ),
]


def _allegro(d: Draw) -> tuple[Any, Any]:
    """Rotary embeddings of time, height and width, and the positions they are taken at."""
    places = grid(FRAMES, d.size, d.size).long().T[:, None]  # [3, 1, tokens]
    tables = tuple(rotary(8, 8) for _ in range(3))
    return tables, tuple(places)


# ---- text and video in one attention ---------------------------------------------------------------------------------
HUNYUAN = {
    **HEADS,
    **LATENTS,
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "text_embed_dim": 12,
    "pooled_projection_dim": 10,
    "rope_axes_dim": (4, 4, 8),
}


def _hunyuan(d: Draw, **given: Any) -> dict[str, Any]:
    return _plain(
        d,
        encoder_attention_mask=d.mask(),
        pooled_projections=d.noise("pooled", 10),
        guidance=torch.full((d.batch,), 6000.0),
        **given,
    )


def _framepack(d: Draw) -> dict[str, Any]:
    side = 2 * d.size
    return _hunyuan(
        d,
        image_embeds=d.text(10, 3, "picture"),
        indices_latents=torch.arange(4, 4 + FRAMES),
        latents_clean=d.noise("clean", 4, 2, side, side),
        indices_latents_clean=torch.tensor([0, 8]),
        latents_history_2x=d.noise("before", 4, 2, side, side),
        indices_latents_history_2x=torch.arange(2, 4),
        latents_history_4x=d.noise("long before", 4, 1, side, side),
        indices_latents_history_4x=torch.arange(1, 2),
    )


def _cosmos3(d: Draw) -> dict[str, Any]:
    """One sequence: the texts of all rows, then their videos."""
    text, tokens = TEXT * d.batch, FRAMES * d.tokens * d.batch
    vision = torch.arange(text, text + tokens)
    places = [grid(text)] + [grid(FRAMES, d.size, d.size) + text] * d.batch
    return {
        "input_ids": d.numbers("text", 20, TEXT).flatten(),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat(places).T,
        "und_len": text,
        "sequence_length": text + tokens,
        "vision_tokens": list(d.video(4, 2)[:, None]),
        "vision_token_shapes": [(FRAMES, d.size, d.size)] * d.batch,
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": d.time().repeat_interleave(FRAMES * d.tokens),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)] * d.batch,
    }


def _kandinsky(d: Draw, channels: int = 4, **given: Any) -> dict[str, Any]:
    return {
        "hidden_states": d.latents(FRAMES, 2 * d.size, 2 * d.size, channels),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time(),
        "pooled_projections": d.noise("pooled", 10),
        **given,
    }


def _minimax(d: Draw) -> dict[str, Any]:
    video, sound = FRAMES * d.tokens, 5
    kinds = [0] * TEXT + [1] * video + [2] * sound
    order = torch.arange(len(kinds))
    text, pictures, sounds = order.split([TEXT, video, sound])
    return {
        "hidden_states": d.latents(video, 16),
        "audio_hidden_states": d.latents(sound, 4, name="sound"),
        "encoder_hidden_states": d.text(12),
        "timestep": d.time()[:1],
        "timestep_indices": torch.zeros_like(order),
        "token_tags": torch.tensor(kinds),
        "position_ids": torch.cat([grid(TEXT), grid(FRAMES, d.size, d.size) + TEXT, grid(sound) + TEXT]),
        "video_indices": pictures,
        "audio_indices": sounds,
        "text_indices": text,
    }


COG = {
    **HEADS,
    **LATENTS,
    "time_embed_dim": 16,
    "text_embed_dim": 12,
    "num_layers": 3,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}


def _cog(d: Draw, **given: Any) -> dict[str, Any]:
    return _plain(d, hidden_states=d.video(4, 2).transpose(1, 2), **given)


JOINT = [
    entry("CogVideoXTransformer3DModel", COG, lambda model, d: _cog(d), "transformer_blocks", **SIZES),
    entry(
        "ConsisIDTransformer3DModel",
        {
            **COG,
            "attention_head_dim": 24,
            "num_layers": 6,
            "is_train_face": True,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 10,
            "LFE_vit_dim": 12,
            "LFE_depth": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 3,
            "LFE_num_querie": 5,
            "LFE_output_dim": 32,
            "LFE_num_scale": 2,
        },
        lambda model, d: _cog(
            d, id_cond=d.noise("face", 10), id_vit_hidden=[d.text(12, 5, f"face {n}") for n in range(2)]
        ),
        "transformer_blocks",
        "perceiver_cross_attention",
        conditions=("encoder_hidden_states", "id_cond", "id_vit_hidden"),
        **SIZES,
    ),
    entry(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 48,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 20,
            "rope_axes_dim": (4, 2, 2),
        },
        lambda model, d: _cosmos3(d),
        "layers",
        latents=("vision_tokens",),
        time=("vision_timesteps",),
        conditions=("input_ids",),
        joined="all rows are one sequence, and attend to each other",
        **SIZES,
    ),
    entry(
        "EasyAnimateTransformer3DModel",
        {
            **HEADS,
            **LATENTS,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 4,
            "mmdit_layers": 3,
            "time_embed_dim": 16,
            "text_embed_dim": 12,
        },
        lambda model, d: _plain(d),
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        lambda model, d: _hunyuan(d),
        "transformer_blocks",
        "single_transformer_blocks",
        conditions=("encoder_hidden_states", "pooled_projections"),
        **SIZES,
    ),
    entry(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True},
        lambda model, d: _framepack(d),
        "transformer_blocks",
        "single_transformer_blocks",
        conditions=("encoder_hidden_states", "pooled_projections", "image_embeds", "latents_clean"),
        **SIZES,
    ),
    entry(
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "image_embed_dim": 9,
            "rope_axes_dim": (4, 4, 8),
        },
        lambda model, d: _plain(
            d,
            patch=1,
            encoder_attention_mask=d.mask(),
            encoder_hidden_states_2=d.text(10, 5, "glyphs"),
            encoder_attention_mask_2=d.mask(5),
            image_embeds=d.text(9, 3, "picture"),
        ),
        "transformer_blocks",
        conditions=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
        **SIZES,
    ),
    entry(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 3,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 8),
        },
        lambda model, d: _kandinsky(
            d,
            visual_rope_pos=[torch.arange(FRAMES), torch.arange(d.size), torch.arange(d.size)],
            text_rope_pos=torch.arange(TEXT),
        ),
        "text_transformer_blocks",
        "visual_transformer_blocks",
        conditions=("encoder_hidden_states", "pooled_projections"),
        tolerance=1e-3,  # queries and keys are bfloat16
        **SIZES,
    ),
    entry(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 3,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 8),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        lambda model, d: _kandinsky(d, channels=9, audio_hidden_states=d.latents(5, 4, name="sound")),
        "video_text_transformer_blocks",
        "audio_text_transformer_blocks",
        "visual_transformer_blocks",
        latents=("hidden_states", "audio_hidden_states"),
        conditions=("encoder_hidden_states", "pooled_projections"),
        **SIZES,
    ),
    entry(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 8),
        },
        lambda model, d: {"hidden_states": d.latents(2, d.size, d.size, 9), "timestep": d.time()},
        "visual_transformer_blocks",
        conditions=(),  # the small video, among the latents
        sizes=(8, 16),  # blocks of 8 x 8 are what attention leaves out
        frames=True,
    ),
    entry(
        "MiniMaxH3Transformer3DModel",
        {
            **HEADS,
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 3,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        lambda model, d: _minimax(d),
        "transformer_blocks",
        latents=("hidden_states", "audio_hidden_states"),
        **SIZES,
    ),
    entry(
        "MochiTransformer3DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "max_sequence_length": TEXT,
        },
        lambda model, d: _plain(d, encoder_hidden_states=d.text(16), encoder_attention_mask=d.mask().bool()),
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "MotifVideoTransformer3DModel",
        {
            **HEADS,
            **LATENTS,
            "num_layers": 3,
            "num_single_layers": 5,
            "num_decoder_layers": 2,  # the last of the single ones, which begin anew with the latents
            "text_embed_dim": 12,
            "rope_axes_dim": (4, 4, 8),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda model, d: _plain(d, encoder_attention_mask=d.mask()),
        "transformer_blocks",
        "single_transformer_blocks",
        **SIZES,
    ),
]

VIDEO: list[Entry] = [*WANS, *CROSS, *JOINT]
