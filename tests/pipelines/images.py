"""Image pipelines: tiny, random, and real but for their text encoders.

Latents are 8 x 8 with patches of 2, so 16 picture tokens, and there are 7 text tokens. Without a VAE a latent is 8 x 8
pixels; where a VAE is needed (img2img, inpainting, control pictures, class-conditional DiT), it is 2 x 2 pixels.
Schedulers are of the class, and where it matters of the settings, that the pipeline was published with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import tiny
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance
from torch import Tensor

from . import Case
from .stubs import assemble, embed, generators, label, mask, masks, pictures, pooled, texts, vae

TEXT, WIDTH, POOLED = 7, 12, 10  # text tokens, their width, the width of pooled embeddings

CASES: dict[str, Case] = {}
Arguments = dict[str, Any]
_REDRAWN: Arguments = {"strength": 0.7}


def _case(
    name: str,
    pipeline: str,
    parts: Callable[[int], Arguments],
    text: Callable[[list[str]], Arguments],
    guidance: str = "none",
    size: int = 64,
    sized: bool = True,
    inputs: dict[str, Callable[[int, int, int], Any]] | None = None,
    more: Arguments | None = None,
    **fields: Any,
) -> None:
    """Register a case: `parts(seed)` are the components, `text(prompts)` and `inputs[name](seed, batch, size)`
    arguments of a call, `more` its constant ones. `sized`: the pipeline takes height and width."""

    def call(
        pipe: Any,
        steps: int = 6,
        batch: int = 1,
        seed: int = 0,
        size: int | None = None,
        prompt: str | list[str] | None = None,
        **own: Any,
    ) -> Arguments:
        if size not in (None, default, fields.get("other_size")):
            raise ValueError(f"{name} draws no pictures of {size} pixels")
        side = size or default
        given = {"num_inference_steps": steps, "generator": generators(seed, batch), "output_type": "latent"}
        if sized:
            given |= {"height": side, "width": side}
        given |= {key: make(seed, batch, side) for key, make in (inputs or {}).items()}
        return given | text(texts(prompt, batch)) | (more or {}) | own

    default = size
    fields = {"branches": 1 if guidance == "none" else 2} | fields
    CASES[name] = Case(name, lambda seed: assemble(pipeline, **parts(seed)), call, guidance, **fields)


# ---- text -----------------------------------------------------------------------------------------------------------
def _text(
    negative: bool = True,
    masked: str = "",
    pooling: bool = False,
    width: int = WIDTH,
    dtype: torch.dtype = torch.int64,
) -> Callable[[list[str]], Arguments]:
    """Prompt embeddings, of the empty prompt too if `negative`, with masks of names
    `masked.format(prefix)` and of `dtype`."""

    def text(prompts: list[str]) -> Arguments:
        given = {}
        for prefix, words in (("", prompts), ("negative_", [""] * len(prompts)))[: 1 + negative]:
            given[f"{prefix}prompt_embeds"] = embed(words, TEXT, width)
            if masked:
                given[masked.format(prefix)] = mask(words, TEXT).to(dtype)
            if pooling:
                given[f"{prefix}pooled_prompt_embeds"] = pooled(words, POOLED)
        return given

    return text


_MASKED = "{}prompt_attention_mask"
_QWEN = "{}prompt_embeds_mask"


# ---- schedulers -----------------------------------------------------------------------------------------------------
def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _flux_flow() -> Any:
    return _flow(shift=3.0, use_dynamic_shifting=True)


def _dpm(**config: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler(**config)


def _stable(cls: str, **config: Any) -> Any:
    """With the noise levels of Stable Diffusion."""
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return getattr(diffusers, cls)(**levels | config)


# ---- class-conditional ----------------------------------------------------------------------------------------------
def _dit(seed: int) -> Arguments:
    transformer = tiny.dit(seed, out_channels=8, num_embeds_ada_norm=1000)  # the pipeline's null class is 1000
    return {"transformer": transformer, "vae": vae(seed + 1), "scheduler": diffusers.DDIMScheduler(clip_sample=False)}


_case(
    "dit",
    "DiTPipeline",
    _dit,
    lambda prompts: {"class_labels": [label(text) for text in prompts]},
    guidance="batched",
    size=16,
    sized=False,
    more={"output_type": "pt", "guidance_scale": 3.0},
)


# ---- PixArt and Sana: cross-attention -------------------------------------------------------------------------------
def _pixart(seed: int) -> Arguments:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _dpm()}


_BINLESS: Arguments = {"guidance_scale": 3.0, "use_resolution_binning": False, "negative_prompt": None}
for _name, _class in (("pixart-alpha", "PixArtAlphaPipeline"), ("pixart-sigma", "PixArtSigmaPipeline")):
    _case(_name, _class, _pixart, _text(masked=_MASKED), "batched", other_size=96, more=_BINLESS)
_case(
    "pixart-pag",
    "PixArtSigmaPAGPipeline",
    lambda seed: {**_pixart(seed), "pag_applied_layers": "blocks.1"},
    _text(masked=_MASKED),
    "batched",
    branches=3,
    other_size=96,
    more=_BINLESS,
)


def _sana(seed: int, **config: Any) -> Arguments:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=4,
        **config,
    )
    scheduler = _dpm(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": scheduler}


def _sprint(seed: int) -> Arguments:
    return {**_sana(seed, guidance_embeds=True, qk_norm="rms_norm_across_heads"), "scheduler": diffusers.SCMScheduler()}


_case("sana", "SanaPipeline", _sana, _text(masked=_MASKED), "batched", size=128, other_size=192, more=_BINLESS)
_case(
    "sana-sprint",
    "SanaSprintPipeline",
    _sprint,
    _text(negative=False, masked=_MASKED),
    size=128,
    other_size=192,
    more={"use_resolution_binning": False, "intermediate_timesteps": None},
)


def _compressing_vae(seed: int) -> Any:
    """A tiny `AutoencoderDC` that makes one latent of 2 x 2 pixels."""
    shape = {"block_types": "ResBlock", "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in shape.items()},
    )
    return tiny.randomize(autoencoder, seed)


_case(
    "sana-sprint-img2img",
    "SanaSprintImg2ImgPipeline",
    lambda seed: {**_sprint(seed), "vae": _compressing_vae(seed + 1)},
    _text(negative=False, masked=_MASKED),
    size=32,
    other_size=64,
    inputs={"image": pictures},
    more={"use_resolution_binning": False, "intermediate_timesteps": None} | _REDRAWN,
)


def _hunyuan(seed: int) -> Arguments:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,  # the second half has skips from the first
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=16,
        pooled_projection_dim=POOLED,
        text_len=TEXT,
        text_len_t5=TEXT,
    )
    levels = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = diffusers.DDPMScheduler(**levels, clip_sample=False, prediction_type="v_prediction")
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": scheduler, "requires_safety_checker": False}


def _two_texts(prompts: list[str]) -> Arguments:
    first, second = _text(masked=_MASKED)(prompts), _text(masked=_MASKED, width=16)(prompts)
    return first | {f"{name}_2": value for name, value in second.items()}


_case(
    "hunyuandit",
    "HunyuanDiTPipeline",
    _hunyuan,
    _two_texts,
    "batched",
    other_size=96,
    more={"guidance_scale": 3.0, "use_resolution_binning": False},
)


# ---- Stable Diffusion 3 ---------------------------------------------------------------------------------------------
_SD3: Arguments = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": POOLED,
    "out_channels": 4,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def _sd3(seed: int, **config: Any) -> Arguments:
    transformer = tiny.randomize(diffusers.SD3Transformer2DModel(**_SD3 | config), seed)
    return {"transformer": transformer, "scheduler": _flow(shift=3.0)}


def _with_vae(parts: Callable[[int], Arguments], channels: int = 4) -> Callable[[int], Arguments]:
    return lambda seed: {**parts(seed), "vae": vae(seed + 1, channels)}


_sd3_text = _text(pooling=True)
_GUIDED: Arguments = {"guidance_scale": 3.0}

_case("sd3", "StableDiffusion3Pipeline", _sd3, _sd3_text, "batched", other_size=96, more=_GUIDED)
_case(
    "sd3-img2img",
    "StableDiffusion3Img2ImgPipeline",
    _with_vae(_sd3),
    _sd3_text,
    "batched",
    size=16,
    other_size=24,
    inputs={"image": pictures},
    more=_GUIDED | _REDRAWN,
)
_case(
    "sd3-inpaint",
    "StableDiffusion3InpaintPipeline",
    _with_vae(lambda seed: _sd3(seed, in_channels=16, out_channels=16), 16),  # it takes 16 or 33 channels
    _sd3_text,
    "batched",
    size=16,
    other_size=24,
    inputs={"image": pictures, "mask_image": masks},
    more=_GUIDED | _REDRAWN,
)
_case(
    "sd3-pag",
    "StableDiffusion3PAGPipeline",
    lambda seed: {**_sd3(seed), "pag_applied_layers": "blocks.1"},
    _sd3_text,
    "batched",
    branches=3,
    other_size=96,
    more=_GUIDED,
)


_case(
    "sd3-skip-layers",
    "StableDiffusion3Pipeline",
    _sd3,
    _sd3_text,
    "batched",
    other_size=96,
    steady=False,  # some steps call once more, without layer 1 and for the conditional half alone
    more=_GUIDED | {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6},
)


def _sd3_controlnet(seed: int) -> Arguments:
    config = _SD3 | {"num_layers": 2, "dual_attention_layers": ()}
    controlnet = tiny.randomize(diffusers.SD3ControlNetModel(**config), seed + 2)
    return {**_with_vae(_sd3)(seed), "controlnet": controlnet}


_case(
    "sd3-controlnet",
    "StableDiffusion3ControlNetPipeline",
    _sd3_controlnet,
    _sd3_text,
    "batched",
    size=16,
    other_size=24,
    inputs={"control_image": pictures},
    more=_GUIDED,
)


# ---- FLUX -----------------------------------------------------------------------------------------------------------
def _flux(seed: int, **config: Any) -> Arguments:
    return {"transformer": tiny.flux(seed, **config), "scheduler": _flux_flow()}


def _distilled(seed: int) -> Arguments:
    return _flux(seed, guidance_embeds=True)


_flux_text, _flux_both = _text(negative=False, pooling=True), _text(pooling=True)
_TRUE: Arguments = {"true_cfg_scale": 3.0}

_case("flux", "FluxPipeline", _distilled, _flux_text, other_size=96)
_case("flux-cfg", "FluxPipeline", _flux, _flux_both, "separate", scale="true_cfg_scale", other_size=96, more=_TRUE)
_case(
    "flux-img2img",
    "FluxImg2ImgPipeline",
    _with_vae(_distilled, 1),
    _flux_text,
    size=16,
    other_size=24,
    inputs={"image": pictures},
    more=_REDRAWN,
)
_case(
    "flux-inpaint",
    "FluxInpaintPipeline",
    _with_vae(_distilled, 1),
    _flux_text,
    size=16,
    other_size=24,
    inputs={"image": pictures, "mask_image": masks},
    more=_REDRAWN,
)
_case(
    "flux-controlnet",
    "FluxControlNetPipeline",
    lambda seed: {**_with_vae(_distilled, 1)(seed), "controlnet": _flux_controlnet(seed + 2)},
    _flux_text,
    size=16,
    other_size=24,
    inputs={"control_image": pictures},
)


def _flux_controlnet(seed: int) -> Any:
    full: Any = tiny.flux()
    config = {key: value for key, value in full.config.items() if not key.startswith("_") and key != "out_channels"}
    return tiny.randomize(diffusers.FluxControlNetModel(**config | {"num_layers": 1, "num_single_layers": 1}), seed)


_case(
    "flux-kontext",
    "FluxKontextPipeline",
    _with_vae(_distilled, 1),
    _flux_text,
    size=16,
    other_size=24,
    inputs={"image": pictures, "max_area": lambda seed, batch, size: size**2},
    more={"_auto_resize": False},
)


def _flux_wide(seed: int, channels: int) -> Arguments:
    """With more channels going in than the 4 of the noise."""
    narrow = _distilled(seed)["transformer"].config
    config = {key: value for key, value in narrow.items() if not key.startswith("_")}
    transformer = diffusers.FluxTransformer2DModel(**config | {"in_channels": channels, "out_channels": 4})
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flux_flow()}


_case(
    "flux-fill",  # the picture without the part to be drawn, and the mask, are channels of the input
    "FluxFillPipeline",
    _with_vae(lambda seed: _flux_wide(seed, 4 + 4 + 16), 1),
    _flux_text,
    size=16,
    other_size=24,
    inputs={"image": pictures, "mask_image": masks},
)
_case(
    "flux-control",  # the control picture is channels of the input
    "FluxControlPipeline",
    _with_vae(lambda seed: _flux_wide(seed, 4 + 4), 1),
    _flux_text,
    size=16,
    other_size=24,
    inputs={"control_image": pictures},
)


def _flux_adapted(seed: int) -> Arguments:
    """With an image-prompt adapter of 4 image tokens in the double-stream blocks."""
    parts = _flux(seed)
    transformer = parts["transformer"]
    generator = torch.Generator().manual_seed(seed + 3)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    layers: dict[str, Tensor] = {}
    for k in range(len(transformer.transformer_blocks)):
        for of in ("k", "v"):
            layers |= {f"{k}.to_{of}_ip.weight": weight(32, WIDTH), f"{k}.to_{of}_ip.bias": weight(32)}
    projection = {
        "proj.weight": weight(4 * WIDTH, 6),
        "proj.bias": weight(4 * WIDTH),
        "norm.weight": 1 + weight(WIDTH),
        "norm.bias": weight(WIDTH),
    }
    transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False)
    return parts


_case(
    "flux-ip-adapter",
    "FluxPipeline",
    _flux_adapted,
    _flux_both,
    "separate",
    scale="true_cfg_scale",
    other_size=96,
    more=_TRUE
    | {  # one picture for the whole batch: of several ones, the pipeline shows each sample all
        "ip_adapter_image_embeds": [embed(["a picture"], 1, 6)],
        "negative_ip_adapter_image_embeds": [embed([""], 1, 6)],
    },
)


def _flux2(seed: int, **config: Any) -> Arguments:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        **config,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flux_flow()}


def _klein(seed: int) -> Arguments:
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
    )
    parts = {**_flux2(seed, guidance_embeds=False), "vae": tiny.randomize(autoencoder, seed + 1)}
    return {**parts, "is_distilled": False}


_case("flux2", "Flux2Pipeline", _flux2, _text(negative=False), other_size=96)
_case("flux2-klein", "Flux2KleinPipeline", _klein, _text(), "separate", size=16, other_size=24, more=_GUIDED)
_case(
    "flux2-klein-inpaint",
    "Flux2KleinInpaintPipeline",
    _klein,
    _text(),
    "separate",
    size=16,
    other_size=24,
    inputs={"image": pictures, "mask_image": masks},
    more=_GUIDED | _REDRAWN,
)


def _chroma(seed: int) -> Arguments:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow()}


_case(
    "chroma",
    "ChromaPipeline",
    _chroma,
    _text(masked=_MASKED, dtype=torch.bool),
    "separate",
    other_size=96,
    more=_GUIDED,
)
_case(
    "chroma-img2img",
    "ChromaImg2ImgPipeline",
    _with_vae(_chroma, 1),
    _text(masked=_MASKED, dtype=torch.bool),
    "separate",
    size=16,
    other_size=24,
    inputs={"image": pictures},
    more=_GUIDED | _REDRAWN,
)


# ---- Qwen-Image -----------------------------------------------------------------------------------------------------
def _qwen(seed: int) -> Arguments:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    shift = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(use_dynamic_shifting=True, **shift)}


def _qwen_with_vae(seed: int) -> Arguments:
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=1,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1],
        latents_std=[1.5],
    )
    return {**_qwen(seed), "vae": tiny.randomize(autoencoder, seed + 1)}


_qwen_text = _text(masked=_QWEN)
_case(
    "qwen-image",
    "QwenImagePipeline",
    _qwen,
    _qwen_text,
    "separate",
    scale="true_cfg_scale",
    other_size=96,
    more=_TRUE,
)
_case(
    "qwen-image-img2img",
    "QwenImageImg2ImgPipeline",
    _qwen_with_vae,
    _qwen_text,
    "separate",
    scale="true_cfg_scale",
    size=16,
    other_size=24,
    inputs={"image": pictures},
    more=_TRUE | _REDRAWN,
)
_case(
    "qwen-image-inpaint",
    "QwenImageInpaintPipeline",
    _qwen_with_vae,
    _qwen_text,
    "separate",
    scale="true_cfg_scale",
    size=16,
    other_size=24,
    inputs={"image": pictures, "mask_image": masks},
    more=_TRUE | _REDRAWN,
)


# ---- other single-stream and joint transformers ---------------------------------------------------------------------
def _lumina2(seed: int) -> Arguments:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=WIDTH,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(shift=6.0)}


_case("lumina2", "Lumina2Pipeline", _lumina2, _text(masked=_MASKED), "separate", other_size=96, more=_GUIDED)


def _auraflow(seed: int) -> Arguments:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(shift=1.73)}


_case("auraflow", "AuraFlowPipeline", _auraflow, _text(masked=_MASKED), "batched", other_size=96, more=_GUIDED)


def _cogview4(seed: int) -> Arguments:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    shift = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(use_dynamic_shifting=True, **shift)}


def _cogview3(seed: int) -> Arguments:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
    )
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.CogVideoXDDIMScheduler(**settings, snr_shift_scale=4.0)
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": scheduler}


_case("cogview3", "CogView3PlusPipeline", _cogview3, _text(), "batched", other_size=96, more=_GUIDED)
_case("cogview4", "CogView4Pipeline", _cogview4, _text(), "separate", other_size=96, more=_GUIDED)


def _hunyuan_image(seed: int) -> Arguments:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=2)
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(shift=5.0), "guider": guider}


def _glyphs(prompts: list[str]) -> Arguments:
    """The second text is what is to be written in the picture."""
    first, second = _text(masked=_QWEN)(prompts), _text(masked=_QWEN, width=8)(prompts)
    return first | {f"{name}_2": value for name, value in second.items()}


_case(
    "hunyuan-image",
    "HunyuanImagePipeline",
    _hunyuan_image,
    _glyphs,
    "separate",
    scale=None,  # the guider has it
    size=128,
    other_size=192,
)


def _zimage(seed: int) -> Arguments:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )
    return {"transformer": tiny.randomize(transformer, seed), "scheduler": _flow(shift=3.0)}


def _lists(prompts: list[str]) -> Arguments:
    """A list of embeddings, each without padding."""
    given, keep = _text()(prompts), mask(prompts, TEXT).sum(1).tolist()
    return {
        "prompt_embeds": [rows[:n] for rows, n in zip(given["prompt_embeds"], keep)],
        "negative_prompt_embeds": list(given["negative_prompt_embeds"]),
    }


_case("z-image", "ZImagePipeline", _zimage, _lists, "batched", other_size=96, more=_GUIDED)
for _name, _class, _inputs in (
    ("z-image-img2img", "ZImageImg2ImgPipeline", {"image": pictures}),
    ("z-image-inpaint", "ZImageInpaintPipeline", {"image": pictures, "mask_image": masks}),
):
    _case(
        _name,
        _class,
        _with_vae(_zimage),
        _lists,
        "batched",
        size=16,
        other_size=24,
        inputs=_inputs,
        more=_GUIDED | _REDRAWN,
    )


# ---- UNets ----------------------------------------------------------------------------------------------------------
def _unet(seed: int, **config: Any) -> Any:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    } | config
    return tiny.randomize(diffusers.UNet2DConditionModel(**config), seed)


def _sd(seed: int) -> Arguments:
    scheduler = _stable("PNDMScheduler", skip_prk_steps=True)
    return {"unet": _unet(seed), "scheduler": scheduler, "requires_safety_checker": False}


def _sdxl(seed: int) -> Arguments:
    conditions: Arguments = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
    }
    return {"unet": _unet(seed, **conditions), "scheduler": _stable("EulerDiscreteScheduler"), "add_watermarker": False}


def _pix2pix(seed: int) -> Arguments:
    parts = {"unet": _unet(seed, in_channels=8), "scheduler": _stable("EulerAncestralDiscreteScheduler")}
    return {**parts, "vae": vae(seed + 1), "requires_safety_checker": False}


_case("sd", "StableDiffusionPipeline", _sd, _text(), "batched", denoiser="unet", other_size=96, more=_GUIDED)
_case("sdxl", "StableDiffusionXLPipeline", _sdxl, _sd3_text, "batched", denoiser="unet", other_size=96, more=_GUIDED)
_case(
    "sdxl-inpaint",
    "StableDiffusionXLInpaintPipeline",
    _with_vae(_sdxl),
    _sd3_text,
    "batched",
    denoiser="unet",
    size=16,
    other_size=24,
    inputs={"image": pictures, "mask_image": masks},
    more=_GUIDED | _REDRAWN,
)
_case(
    "sd-img2img",
    "StableDiffusionImg2ImgPipeline",
    _with_vae(_sd),
    _text(),
    "batched",
    denoiser="unet",
    size=16,
    sized=False,
    other_size=24,
    inputs={"image": pictures},
    more=_GUIDED | _REDRAWN,
)
_case(
    "instruct-pix2pix",
    "StableDiffusionInstructPix2PixPipeline",
    _pix2pix,
    _text(),
    "batched",
    branches=3,
    denoiser="unet",
    size=16,
    sized=False,
    other_size=24,
    inputs={"image": pictures},
    more=_GUIDED,
)


# ---- other solvers --------------------------------------------------------------------------------------------------
SOLVERS: dict[str, Case] = {}  # "case/solver"


def _solver(case: str, name: str, cls: str, **config: Any) -> None:
    """Register a case with another scheduler."""

    def build(seed: int) -> Any:
        pipe = CASES[case].build(seed)
        pipe.scheduler = getattr(diffusers, cls)(**config)
        return pipe

    SOLVERS[f"{case}/{name}"] = replace(CASES[case], name=f"{case}/{name}", build=build)


_SHIFTED: dict[str, Arguments] = {"sd3": {"flow_shift": 3.0}, "flux": {"use_dynamic_shifting": True}}
for _name, _class, _config in (
    ("dpm++", "DPMSolverMultistepScheduler", {}),
    ("dpm++-single", "DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    ("unipc", "UniPCMultistepScheduler", {}),
    ("deis", "DEISMultistepScheduler", {}),
):
    for _base in ("dit", "pixart-alpha")[: 1 if _name == "dpm++" else 2]:  # PixArt has that anyway
        _solver(_base, _name, _class, **_config)
    for _base in ("sd3", "flux"):
        _flowing = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} | _SHIFTED[_base]
        _solver(_base, _name, _class, **_config | _flowing)
for _name, _class, _config in (
    ("ddim", "DDIMScheduler", {"clip_sample": False}),
    ("ddpm", "DDPMScheduler", {"clip_sample": False}),
    ("euler", "EulerDiscreteScheduler", {}),
    ("euler-ancestral", "EulerAncestralDiscreteScheduler", {}),
    ("heun", "HeunDiscreteScheduler", {}),
    ("kdpm2", "KDPM2DiscreteScheduler", {}),
    ("kdpm2-ancestral", "KDPM2AncestralDiscreteScheduler", {}),
    ("pndm", "PNDMScheduler", {}),
    ("sa", "SASolverScheduler", {}),
):
    _solver("pixart-alpha", _name, _class, **_config)
_solver("sd3", "flow-heun", "FlowMatchHeunDiscreteScheduler", shift=3.0)
