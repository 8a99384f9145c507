"""Video and audio pipelines: tiny, random, and real but for their text encoders.

Videos are 3 latent frames of 16 tokens, and there are 7 text tokens. VAEs are there only where a pipeline asks for
one. Schedulers are of the class, and where it matters of the settings, that the pipeline was published with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import PIL.Image
import tiny
import torch
import transformers

from . import Case
from .stubs import assemble, embed, generators, mask, pictures, pooled, texts

TEXT, WIDTH, POOLED = 7, 12, 10  # text tokens, their width, the width of pooled embeddings

CASES: dict[str, Case] = {}
Arguments = dict[str, Any]


def _case(
    name: str,
    pipeline: str,
    parts: Callable[[int], Arguments],
    text: Callable[[list[str]], Arguments],
    guidance: str = "none",
    size: int | None = 64,
    single: bool = False,
    inputs: dict[str, Callable[[int, int, int], Any]] | None = None,
    more: Arguments | None = None,
    settings: Arguments | None = None,
    **fields: Any,
) -> None:
    """Register a case: `parts(seed)` are the components, `text(prompts)` and `inputs[name](seed, batch, size)`
    arguments of a call, `more` its constant ones. `size=None`: there is no height and width. `single`: the pipeline
    takes one generator, not a list. `settings` are attributes of the pipeline."""

    def build(seed: int) -> Any:
        pipe = assemble(pipeline, **parts(seed))
        for key, value in (settings or {}).items():
            setattr(pipe, key, value)
        return pipe

    def call(
        pipe: Any,
        steps: int = 6,
        batch: int = 1,
        seed: int = 0,
        size: int | None = None,
        prompt: Any = None,
        **own: Any,
    ) -> Arguments:
        if size not in (None, default, *([fields["other_size"]] if "other_size" in fields else [])):
            raise ValueError(f"{name} draws no videos of {size} pixels")
        side = size or default
        chance = generators(seed, batch)
        given = {"num_inference_steps": steps, "generator": chance[0] if single else chance, "output_type": "latent"}
        if side is not None:
            given |= {"height": side, "width": side}
            given |= {key: make(seed, batch, side) for key, make in (inputs or {}).items()}
        return given | text(texts(prompt, batch)) | (more or {}) | own

    default = size
    fields = {"branches": 1 if guidance == "none" else 2} | fields
    CASES[name] = Case(name, build, call, guidance, **fields)


# ---- what calls are made of -----------------------------------------------------------------------------------------
def _text(
    masked: bool = False, kind: torch.dtype = torch.long, pooling: bool = False, width: int = WIDTH
) -> Callable[[list[str]], Arguments]:
    """Embeddings of the prompts and of the empty prompt, with attention masks of the given kind of number."""

    def text(prompts: list[str]) -> Arguments:
        given = {}
        for prefix, words in (("", prompts), ("negative_", [""] * len(prompts))):
            given[f"{prefix}prompt_embeds"] = embed(words, TEXT, width)
            if masked:
                given[f"{prefix}prompt_attention_mask"] = mask(words, TEXT).to(kind)
            if pooling:
                given[f"{prefix}pooled_prompt_embeds"] = pooled(words, POOLED)
        return given

    return text


def _one_picture(seed: int, batch: int, size: int) -> Any:
    """The same first picture for every video, as pipelines want it that take one for the whole batch."""
    pixels = pictures(0, 1, size)[0].mul(255).byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(pixels)


def _videos(seed: int, batch: int, size: int) -> torch.Tensor:
    """Videos `[batch, 9, 3, size, size]` within 0 .. 1; video j depends on seed + j alone."""
    return torch.stack([pictures(100 * (seed + j), 9, size) for j in range(batch)])


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _unipc(shift: float) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


# ---- HunyuanVideo: dual and single streams --------------------------------------------------------------------------
def _hunyuan(seed: int) -> Arguments:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(2, 2, 4),
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(shift=7.0)}


_HUNYUAN_TEXT = _text(masked=True, pooling=True)
_case(
    "hunyuan-video",  # the strength of guidance is an input of the transformer
    "HunyuanVideoPipeline",
    _hunyuan,
    _HUNYUAN_TEXT,
    other_size=96,
    more={"num_frames": 9, "guidance_scale": 3.0},
)
_case(
    "hunyuan-video-cfg",
    "HunyuanVideoPipeline",
    _hunyuan,
    _HUNYUAN_TEXT,
    "separate",
    other_size=96,
    scale="true_cfg_scale",
    more={"num_frames": 9, "true_cfg_scale": 3.0},
)


def _hunyuan15(seed: int) -> Arguments:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,  # noise, condition and its mask
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=POOLED,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "vae": tiny.randomize(vae, seed + 1),
        "scheduler": _flow(shift=5.0),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    }


def _hunyuan15_text(prompts: list[str]) -> Arguments:
    given = {}
    for prefix, words in (("", prompts), ("negative_", [""] * len(prompts))):
        for number, width in (("", WIDTH), ("_2", POOLED)):
            given[f"{prefix}prompt_embeds{number}"] = embed(words, TEXT, width, number)
            given[f"{prefix}prompt_embeds_mask{number}"] = mask(words, TEXT)
    return given


_case(
    "hunyuan-video-1.5",
    "HunyuanVideo15Pipeline",
    _hunyuan15,
    _hunyuan15_text,
    "separate",
    size=32,
    other_size=48,
    scale=None,  # the guider has it
    more={"num_frames": 9},
    settings={"vision_num_semantic_tokens": 3},
)


# ---- CogVideoX: text and video in one stream ------------------------------------------------------------------------
def _cogvideo(seed: int, **config: Any) -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": WIDTH,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
        }
        | config
    )
    return tiny.randomize(transformer, seed)


def _cogvideo_scheduler(kind: str) -> Any:
    return getattr(diffusers, f"CogVideoX{kind}Scheduler")(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0 if kind == "DDIM" else 1.0,
    )


def _cogvideo_vae(seed: int) -> Any:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return tiny.randomize(vae, seed)


_case(
    "cogvideox",
    "CogVideoXPipeline",
    lambda seed: {"transformer": _cogvideo(seed), "scheduler": _cogvideo_scheduler("DDIM")},
    _text(),
    "batched",
    other_size=96,
    more={"num_frames": 9, "guidance_scale": 3.0},
)
_case(
    "cogvideox-dpm",  # a stochastic scheduler that is handed the last prediction
    "CogVideoXPipeline",
    lambda seed: {
        "transformer": _cogvideo(seed, use_rotary_positional_embeddings=True),
        "scheduler": _cogvideo_scheduler("DPM"),
    },
    _text(),
    "batched",
    other_size=96,
    more={"num_frames": 9, "guidance_scale": 3.0},
)
_case(
    "cogvideox-i2v",  # as of version 1.5: patches of 2 frames
    "CogVideoXImageToVideoPipeline",
    lambda seed: {
        "transformer": _cogvideo(
            seed,
            in_channels=8,
            sample_width=12,
            sample_height=12,
            patch_size_t=2,
            ofs_embed_dim=8,
            use_rotary_positional_embeddings=True,
            patch_bias=False,
        ),
        "vae": _cogvideo_vae(seed + 1),
        "scheduler": _cogvideo_scheduler("DPM"),
    },
    _text(),
    "batched",
    other_size=96,
    inputs={"image": pictures},
    more={"num_frames": 9, "guidance_scale": 3.0},
)
_case(
    "cogvideox-v2v",
    "CogVideoXVideoToVideoPipeline",
    lambda seed: {
        "transformer": _cogvideo(seed),
        "vae": _cogvideo_vae(seed + 1),
        "scheduler": _cogvideo_scheduler("DDIM"),
    },
    _text(),
    "batched",
    other_size=96,
    inputs={"video": _videos},
    more={"guidance_scale": 3.0, "strength": 0.7},
)


# ---- LTX: packed tokens ---------------------------------------------------------------------------------------------
def _ltx(seed: int) -> Arguments:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=WIDTH,
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "scheduler": _flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    }


def _ltx_vae(seed: int) -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=1,
    )
    return tiny.randomize(vae, seed)


_case(
    "ltx",
    "LTXPipeline",
    _ltx,
    _text(masked=True),
    "batched",
    size=128,
    other_size=192,
    more={"num_frames": 17, "guidance_scale": 3.0},
)
_case(
    "ltx-i2v",  # the first frame is given: a timestep for every token
    "LTXImageToVideoPipeline",
    lambda seed: {**_ltx(seed), "vae": _ltx_vae(seed + 1)},
    _text(masked=True),
    "batched",
    size=32,
    other_size=64,
    inputs={"image": pictures},
    more={"num_frames": 17, "guidance_scale": 3.0},
)


# ---- LTX-2: video and audio together, and four kinds of guidance ----------------------------------------------------
def _ltx2(seed: int) -> Arguments:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=8,  # 2 channels of 4 bands
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=3,
        caption_channels=16,
        rope_type="split",
        perturbed_attn=True,
    )
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,  # layers of the text encoder
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=TEXT,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=TEXT,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        patch_size=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=16, latent_channels=2, mel_bins=16
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "connectors": tiny.randomize(connectors, seed + 1),
        "vae": tiny.randomize(vae, seed + 2),
        "audio_vae": tiny.randomize(audio_vae, seed + 3),
        "scheduler": _flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    }


for _name, _guidance, _branches, _scale, _strengths in (
    # both halves of classifier-free guidance in one forward
    ("ltx2", "batched", 2, "guidance_scale", (3.0, 0.0, 1.0)),
    # a forward each for: the prompt, perturbed blocks (STG), video and audio apart
    ("ltx2-stg", "separate", 3, "stg_scale", (1.0, 1.0, 3.0)),
    # as published: the two halves in one forward, then one forward each for the other two
    ("ltx2-all", "mixed", 4, "guidance_scale", (3.0, 1.0, 3.0)),
):
    _video = dict(zip(("guidance_scale", "stg_scale", "modality_scale"), _strengths))
    _case(
        _name,
        "LTX2Pipeline",
        _ltx2,
        _text(masked=True, width=48),
        _guidance,
        size=32,
        other_size=64,
        branches=_branches,
        scale=_scale,
        more={
            "num_frames": 17,
            **_video,
            **{f"audio_{key}": value for key, value in _video.items()},
            "guidance_rescale": 0.7,
            "spatio_temporal_guidance_blocks": [1],
        },
    )


# ---- Wan: one or two transformers -----------------------------------------------------------------------------------
def _wan(seed: int, cls: str = "WanTransformer3DModel", **config: Any) -> Any:
    transformer = getattr(diffusers, cls)(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDTH,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        }
        | config
    )
    return tiny.randomize(transformer, seed)


def _wan_vae(seed: int) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 1.0],
    )
    return tiny.randomize(vae, seed)


def _wan_clip(seed: int) -> Arguments:
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return {
        "image_encoder": tiny.randomize(transformers.CLIPVisionModel(config), seed),
        "image_processor": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    }


_WAN: Arguments = {"num_frames": 9, "guidance_scale": 3.0}
_WAN_IMAGE_CHANNELS = 12  # noise, picture, and a mask of 4 frames
_case(
    "wan",
    "WanPipeline",
    lambda seed: {"transformer": _wan(seed), "scheduler": _unipc(3.0)},
    _text(),
    "separate",
    other_size=96,
    more=_WAN,
)
_case(
    "wan-2.2",  # another transformer for the noisier steps
    "WanPipeline",
    lambda seed: {
        "transformer": _wan(seed),
        "transformer_2": _wan(seed + 1),
        "boundary_ratio": 0.875,
        "scheduler": _unipc(3.0),
    },
    _text(),
    "separate",
    steady=False,
    other_size=96,
    more={**_WAN, "guidance_scale_2": 2.0},
)
_case(
    "wan-i2v",  # cross-attention to a picture, too
    "WanImageToVideoPipeline",
    lambda seed: {
        "transformer": _wan(seed, in_channels=_WAN_IMAGE_CHANNELS, image_dim=16, added_kv_proj_dim=24),
        "vae": _wan_vae(seed + 1),
        "scheduler": _unipc(3.0),
        **_wan_clip(seed + 2),
    },
    _text(),
    "separate",
    other_size=96,
    inputs={"image": _one_picture},
    more=_WAN,
)
_case(
    "wan-2.2-i2v",
    "WanImageToVideoPipeline",
    lambda seed: {
        "transformer": _wan(seed, in_channels=_WAN_IMAGE_CHANNELS),
        "transformer_2": _wan(seed + 1, in_channels=_WAN_IMAGE_CHANNELS),
        "boundary_ratio": 0.9,
        "vae": _wan_vae(seed + 2),
        "scheduler": _unipc(3.0),
    },
    _text(),
    "separate",
    steady=False,
    other_size=96,
    inputs={"image": _one_picture},
    more=_WAN,
)
_case(
    "wan-2.2-ti2v",  # a timestep for every token
    "WanImageToVideoPipeline",
    lambda seed: {
        "transformer": _wan(seed),
        "vae": _wan_vae(seed + 1),
        "expand_timesteps": True,
        "scheduler": _unipc(5.0),
    },
    _text(),
    "separate",
    other_size=96,
    inputs={"image": _one_picture},
    more=_WAN,
)
_case(
    "wan-v2v",
    "WanVideoToVideoPipeline",
    lambda seed: {"transformer": _wan(seed), "vae": _wan_vae(seed + 1), "scheduler": _unipc(3.0)},
    _text(),
    "separate",
    other_size=96,
    inputs={"video": _videos},
    more={"guidance_scale": 3.0, "strength": 0.7},
)
_case(
    "wan-vace",  # a second stack of blocks for the conditions
    "WanVACEPipeline",
    lambda seed: {
        "transformer": _wan(seed, "WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=2 * 4 + 8 * 8),
        "vae": _wan_vae(seed + 1),
        "scheduler": _unipc(3.0),
    },
    _text(),
    "separate",
    other_size=96,
    single=True,
    inputs={"reference_images": _one_picture},
    more=_WAN,
)


# ---- SkyReels: Wan, and frames that are noisy to different degrees --------------------------------------------------
def _skyreels(seed: int, **config: Any) -> Arguments:
    return {"transformer": _wan(seed, "SkyReelsV2Transformer3DModel", **config), "scheduler": _unipc(8.0)}


_case("skyreels-v2", "SkyReelsV2Pipeline", _skyreels, _text(), "separate", other_size=96, more=_WAN)
for _name, _config, _how in (
    # all frames at once
    ("skyreels-v2-df", {"inject_sample_info": True}, {}),
    # each frame 2 steps behind the one before
    ("skyreels-v2-df-async", {}, {"ar_step": 2, "causal_block_size": 1}),
    # 5 frames as 3 and 3, of which 1 is known
    ("skyreels-v2-df-long", {}, {"num_frames": 17, "base_num_frames": 9, "overlap_history": 1}),
):
    _case(
        _name,
        "SkyReelsV2DiffusionForcingPipeline",
        partial(_skyreels, **_config),
        lambda prompts: {"prompt": None, **_text()(prompts)},
        "separate",
        other_size=96,
        more=_WAN | _how,
    )


# ---- Latte, Allegro, Mochi, EasyAnimate, Cosmos, Sana, Kandinsky ----------------------------------------------------
def _latte(seed: int) -> Arguments:
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=WIDTH,
        video_length=3,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": diffusers.DDIMScheduler(clip_sample=False)}


_case(
    "latte",  # spatial and temporal blocks in turn
    "LattePipeline",
    _latte,
    _text(),
    "batched",
    other_size=96,
    more={"video_length": 3, "guidance_scale": 3.0, "negative_prompt": None},
)


def _allegro(seed: int) -> Arguments:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=3,
        caption_channels=WIDTH,
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "scheduler": diffusers.EulerAncestralDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
    }


_case(
    "allegro",
    "AllegroPipeline",
    _allegro,
    _text(masked=True),
    "batched",
    other_size=96,
    more={"num_frames": 9, "guidance_scale": 3.0, "negative_prompt": None},
)


def _mochi(seed: int) -> Arguments:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=POOLED,
        in_channels=4,
        text_embed_dim=16,  # of 8 heads, always
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(invert_sigmas=True)}


_case(
    "mochi",
    "MochiPipeline",
    _mochi,
    _text(masked=True, kind=torch.bool, width=16),
    "batched",
    other_size=96,
    more={"num_frames": 13, "guidance_scale": 3.0},
)


def _easyanimate(seed: int) -> Arguments:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=8,
        add_norm_text_encoder=True,
        text_embed_dim=WIDTH,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "vae": tiny.randomize(vae, seed + 1),
        "scheduler": _flow(shift=5.0),
    }


_case(
    "easyanimate",
    "EasyAnimatePipeline",
    _easyanimate,
    _text(masked=True),
    "batched",
    other_size=96,
    more={"num_frames": 9, "guidance_scale": 3.0},
)


class _Unasked(torch.nn.Module):
    """In the place of a safety checker, which is handed texts and pixels only; there are neither."""

    device = torch.device("cpu")


def _cosmos(seed: int) -> Arguments:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # resizing the mask would need torchvision
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "scheduler": diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
        "safety_checker": _Unasked(),
    }


_case(
    "cosmos",  # two steps of the scheduler for each of the denoising
    "CosmosTextToWorldPipeline",
    _cosmos,
    _text(),
    "separate",
    other_size=96,
    more={"num_frames": 17, "guidance_scale": 3.0},
)


def _sana_video(seed: int) -> Arguments:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": scheduler}


_case(
    "sana-video",
    "SanaVideoPipeline",
    _sana_video,
    _text(masked=True),
    "batched",
    other_size=96,
    more={"frames": 9, "guidance_scale": 3.0, "use_resolution_binning": False, "negative_prompt": None},
)


def _kandinsky(seed: int) -> Arguments:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=POOLED,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 2, 2),
        visual_cond=True,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(shift=5.0)}


def _kandinsky_text(prompts: list[str]) -> Arguments:
    given = {}
    for prefix, words in (("", prompts), ("negative_", [""] * len(prompts))):
        given[f"{prefix}prompt_embeds_qwen"] = embed(words, TEXT, WIDTH)
        given[f"{prefix}prompt_embeds_clip"] = pooled(words, POOLED)
        given[f"{prefix}prompt_cu_seqlens"] = TEXT * torch.arange(len(words) + 1, dtype=torch.int32)
    return given


_case(
    "kandinsky5",  # channels last; blocks of text before those of video
    "Kandinsky5T2VPipeline",
    _kandinsky,
    _kandinsky_text,
    "separate",
    other_size=96,
    more={"num_frames": 9, "guidance_scale": 3.0},
)


# ---- audio ----------------------------------------------------------------------------------------------------------
def _stable_audio(seed: int) -> Arguments:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=24,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    projection = diffusers.StableAudioProjectionModel(WIDTH, WIDTH, min_value=0, max_value=32)
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    return {
        "transformer": tiny.randomize(transformer, seed),
        "projection_model": tiny.randomize(projection, seed + 1),
        "vae": tiny.randomize(vae, seed + 2),
        "scheduler": scheduler,
    }


_case(
    "stable-audio",
    "StableAudioPipeline",
    _stable_audio,
    _text(),
    "batched",
    size=None,
    more={"guidance_scale": 3.0},
)


# ---- UNet with motion modules ---------------------------------------------------------------------------------------
def _animatediff(seed: int) -> Arguments:
    unet = diffusers.UNetMotionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        use_motion_mid_block=False,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    )
    return {"unet": tiny.randomize(unet, seed), "scheduler": scheduler}


_case(
    "animatediff",
    "AnimateDiffPipeline",
    _animatediff,
    _text(),
    "batched",
    denoiser="unet",
    other_size=96,
    more={"num_frames": 3, "guidance_scale": 3.0},
)
