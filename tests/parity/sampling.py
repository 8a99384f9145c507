"""The samplers and guidance formulas of a pack, as its `samplers` and `guidance` entries define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dittocache.models import dpm_solver

Inputs = dict[str, Tensor]


class Sampled(NamedTuple):
    """What a run yields."""

    latents: Tensor
    predictions: Tensor  # handed to the sampler at every step [steps, ...]
    outputs: Tensor  # raw ones of the network at every step, the channels that are predictions [steps, ...]


def f32(values: Any) -> Any:
    """float64 scalars rounded to float32, as the samplers' coefficients are."""
    return torch.tensor(np.asarray(values, dtype=np.float64), dtype=torch.float32)


def ddim(x: Tensor, k: int, out: Tensor, spec: dict[str, Any], memory: dict[str, Any]) -> Tensor:
    eps = out[:, : x.shape[1]]
    a, p = spec["alphas_cumprod"][k], spec["alphas_cumprod_prev"][k]
    if "implementation" in spec:
        a, p = f32(a), f32(p)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return p.sqrt() * x0 + (1 - p).sqrt() * eps
    inverse, noise = f32(np.sqrt(1 / a)), f32(np.sqrt(1 / a - 1))
    x0 = inverse * x - noise * eps
    again = (inverse * x - x0) / noise
    p = f32(p)
    return x0 * p.sqrt() + (1 - p).sqrt() * again


def ancestral(x: Tensor, k: int, out: Tensor, spec: dict[str, Any], memory: dict[str, Any]) -> Tensor:
    eps, u = out[:, : x.shape[1]], out[:, x.shape[1] :]
    a, p = np.float64(spec["alphas_cumprod"][k]), np.float64(spec["alphas_cumprod_prev"][k])
    last = k == spec["num_steps"] - 1
    b = 1 - a / p
    variance = b * (1 - p) / (1 - a)
    if last:
        a1, p1 = spec["alphas_cumprod"][k - 1], spec["alphas_cumprod_prev"][k - 1]
        floor = (1 - a1 / p1) * (1 - p1) / (1 - a1)
    low, high = f32(np.log(floor if last else variance)), f32(np.log(b))
    x0 = f32(np.sqrt(1 / a)) * x - f32(np.sqrt(1 / a - 1)) * eps
    mean = f32(b * np.sqrt(p) / (1 - a)) * x0 + f32((1 - p) * np.sqrt(1 - b) / (1 - a)) * x
    share = (u + 1) / 2
    log_variance = share * high + (1 - share) * low
    return mean if last else mean + torch.exp(0.5 * log_variance) * memory["noise"][k]


def flow(x: Tensor, k: int, out: Tensor, spec: dict[str, Any], memory: dict[str, Any]) -> Tensor:
    return x + (spec["sigmas"][k + 1] - spec["sigmas"][k]) * out


def dpmpp(x: Tensor, k: int, out: Tensor, spec: dict[str, Any], memory: dict[str, Any]) -> Tensor:
    alpha, sigma, lam = (f32(spec[name]) for name in ("alpha", "sigma", "lambda"))
    x0 = (x - sigma[k] * out[:, : x.shape[1]]) / alpha[k]
    h = lam[k + 1] - lam[k]
    factor = torch.expm1(-h)
    new = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * factor * x0
    if k:
        slope = (x0 - memory["x0"]) / ((lam[k] - lam[k - 1]) / h)
        new = new - 0.5 * alpha[k + 1] * factor * slope
    memory["x0"] = x0
    return new


def rectified_flow(x: Tensor, k: int, out: Tensor, spec: dict[str, Any], memory: dict[str, Any]) -> Tensor:
    times = [*spec["timesteps"], 0.0]
    return x + (times[k] - times[k + 1]) / 1000 * out[:, : x.shape[1]]


UVIT = "dpm-solver-2-singlestep"  # a loop of its own, see sample_uvit
UPDATES = {
    "ddim": ddim,
    "ddpm-ancestral": ancestral,
    "flow-match-euler": flow,
    "rectified-flow-euler": rectified_flow,
    "dpm-solver++ multistep, order 2": dpmpp,
}


def scheduler_times(spec: dict[str, Any]) -> list[float] | None:
    """The timestep of every step as a scheduler of diffusers has it, 0 to 1000; None if the sampler has no list."""
    times = spec.get("timesteps", ())
    if len(times) != spec["num_steps"]:
        return None
    return [1000 * t for t in times] if max(times) <= 1 else list(times)


# ---- networks: one call each, on rows x [batch, ...] that hold both guidance halves, time [batch] -------------------
def call_dit(model: torch.nn.Module, x: Tensor, time: Tensor, inputs: Inputs, guidance: dict[str, Any]) -> Tensor:
    labels = halves(inputs["y"], torch.full_like(inputs["y"], guidance["null_label"]), guidance)
    return model(x, timestep=time, class_labels=labels).sample


def call_pixart(model: torch.nn.Module, x: Tensor, time: Tensor, inputs: Inputs, guidance: dict[str, Any]) -> Tensor:
    return model(
        x,
        encoder_hidden_states=halves(inputs["caption"], inputs["null"].expand_as(inputs["caption"]), guidance),
        encoder_attention_mask=halves(inputs["mask"], inputs["mask"], guidance),
        timestep=time,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


def call_flux(model: torch.nn.Module, x: Tensor, time: Tensor, inputs: Inputs, guidance: dict[str, Any]) -> Tensor:
    return model(
        hidden_states=x,
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["pooled"],
        timestep=time,
        img_ids=inputs["img_ids"],
        txt_ids=inputs["txt_ids"],
    ).sample


def call_ltx(model: torch.nn.Module, x: Tensor, time: Tensor, inputs: Inputs, guidance: dict[str, Any]) -> Tensor:
    """Text and mask hold both halves; the size of the video is in the words of the pack's input only."""
    return model(
        hidden_states=x,
        encoder_hidden_states=inputs["txt"],
        encoder_attention_mask=inputs["mask"],
        timestep=time,
        num_frames=2,
        height=4,
        width=4,
    ).sample


def call_unet(model: torch.nn.Module, x: Tensor, time: Tensor, inputs: Inputs, guidance: dict[str, Any]) -> Tensor:
    return model(x, time, encoder_hidden_states=halves(inputs["cond"], inputs["uncond"], guidance)).sample


def call_stdit3(model: Any, x: Tensor, time: Tensor, inputs: Inputs, guidance: dict[str, Any]) -> Tensor:
    null = model.y_embedder.y_embedding.expand_as(inputs["y"])
    text, mask = halves(inputs["y"], null, guidance), halves(inputs["mask"], inputs["mask"], guidance)
    both = {name: halves(inputs[name], inputs[name], guidance) for name in ("fps", "height", "width")}
    return model(x, time, text, mask, **both)


CALLS: dict[str, Callable[..., Tensor]] = {
    "DiTTransformer2DModel": call_dit,
    "FluxTransformer2DModel": call_flux,
    "LTXVideoTransformer3DModel": call_ltx,
    "PixArtTransformer2DModel": call_pixart,
    "STDiT3": call_stdit3,
    "UNet2DConditionModel": call_unet,
}


def halves(cond: Tensor, uncond: Tensor, guidance: dict[str, Any]) -> Tensor:
    """Both in the order of the batch."""
    return torch.cat([cond, uncond] if guidance["batch_order"][0] == "cond" else [uncond, cond])


def call(
    model: torch.nn.Module, x: Tensor, t: float, inputs: Inputs, guidance: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """One prediction for the rows of x, after guidance and before; a call of the network holds both guidance halves."""
    scale = guidance["scale"]
    rows = x if scale is None else torch.cat([x, x])
    time = torch.full((len(rows),), t, dtype=torch.int64 if isinstance(t, int) else torch.float32)
    raw = CALLS[type(model).__name__](model, rows, time, inputs, guidance)
    if scale is None:
        return raw, raw
    first, second = raw.chunk(2)
    cond, uncond = (first, second) if guidance["batch_order"][0] == "cond" else (second, first)
    guided = uncond + scale * (cond - uncond)
    channels = guidance["guided_channels"]
    if channels == "all":
        return guided, raw
    out = cond.clone()
    out[:, channels] = guided[:, channels]
    return out, raw


def start(inputs: Inputs) -> Tensor:
    """The noise that a run begins with."""
    return inputs["z"] if "z" in inputs else inputs["x"]


# ---- runs -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def run(
    model: torch.nn.Module,
    inputs: Inputs,
    spec: dict[str, Any],
    guidance: dict[str, Any],
    cache: Any,
    noise: Tensor | None = None,
) -> Sampled:
    """A whole run of a sampler, every step announced to the cache."""
    if spec["kind"] == UVIT:
        return sample_uvit(model, inputs, spec, guidance, cache)
    x = start(inputs)
    memory: dict[str, Any] = {"noise": noise}
    predictions, outputs = [], []
    for k, t in enumerate(spec["timesteps"]):
        cache.step(k)
        out, raw = call(model, x, t, inputs, guidance)
        out = torch.cat([cache.fix(out[:, : x.shape[1]]), out[:, x.shape[1] :]], dim=1)
        predictions.append(out[:, : x.shape[1]])
        outputs.append(raw[:, : x.shape[1]])
        x = UPDATES[spec["kind"]](x, k, out, spec, memory)
    return Sampled(x, torch.stack(predictions), torch.stack(outputs))


def sample_uvit(
    model: torch.nn.Module, inputs: Inputs, spec: dict[str, Any], guidance: dict[str, Any], cache: Any
) -> Sampled:
    """Steps are evaluations, of two calls each: outputs are [evaluations, cond / uncond, ...]."""
    outputs: list[Tensor] = []

    def record(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        outputs.append(model(x, t, y))
        return outputs[-1]

    scale, null = guidance["scale"], guidance["null_label"]
    x = dpm_solver.sample(
        record, inputs["z"], inputs["y"], spec["num_steps"], null_label=null, scale=scale, before_evaluation=cache.step
    )
    raw = torch.stack(outputs).unflatten(0, (-1, 2))
    return Sampled(x, raw[:, 0] + scale * (raw[:, 0] - raw[:, 1]), raw)


def sample(
    model: torch.nn.Module,
    x: Tensor,
    spec: dict[str, Any],
    guidance: dict[str, Any],
    inputs: Inputs,
    cache: Any,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Final latents, and the prediction handed to the sampler at every step [steps, ...]."""
    return run(model, inputs, spec, guidance, cache, noise)[:2]
