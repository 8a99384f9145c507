"""The samplers and guidance formulas of a pack, as its `samplers` and `guidance` entries define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dittocache.models import dpm_solver

Predict = Callable[[Tensor, float], Tensor]  # (x, timestep) -> network output, after guidance


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


UVIT = "dpm-solver-2-singlestep"  # a loop of its own, see sample_uvit
UPDATES = {
    "ddim": ddim,
    "ddpm-ancestral": ancestral,
    "flow-match-euler": flow,
    "dpm-solver++ multistep, order 2": dpmpp,
}


def call(model: torch.nn.Module, x: Tensor, t: float, inputs: dict[str, Tensor], guidance: dict[str, Any]) -> Tensor:
    """One guided prediction for the rows of x; a single call of the network holds both guidance halves."""
    scale = guidance["scale"]
    rows = x if scale is None else torch.cat([x, x])
    time = torch.full((len(rows),), t, dtype=torch.float32 if t != int(t) or scale is None else torch.int64)
    name = type(model).__name__
    if name == "DiTTransformer2DModel":
        null = torch.full_like(inputs["y"], guidance["null_label"])
        labels = [inputs["y"], null] if guidance["batch_order"][0] == "cond" else [null, inputs["y"]]
        out = model(rows, timestep=time, class_labels=torch.cat(labels)).sample
    elif name == "PixArtTransformer2DModel":
        null = inputs["null"].expand_as(inputs["caption"])
        text, mask = torch.cat([null, inputs["caption"]]), torch.cat([inputs["mask"]] * 2)
        out = model(
            rows,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=time.float(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    else:
        out = model(
            hidden_states=rows,
            encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["pooled"],
            timestep=time.float(),
            img_ids=inputs["img_ids"],
            txt_ids=inputs["txt_ids"],
        ).sample
    if scale is None:
        return out
    first, second = out.chunk(2)
    cond, uncond = (first, second) if guidance["batch_order"][0] == "cond" else (second, first)
    guided = uncond + scale * (cond - uncond)
    channels = guidance["guided_channels"]
    if channels == "all":
        return guided
    out = cond.clone()
    out[:, channels] = guided[:, channels]
    return out


def sample_uvit(
    model: torch.nn.Module, inputs: dict[str, Tensor], spec: dict[str, Any], guidance: dict[str, Any], cache: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Final latents, guided predictions [evaluations, ...], and raw outputs [evaluations, cond / uncond, ...]."""
    outputs: list[Tensor] = []

    def record(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        outputs.append(model(x, t, y))
        return outputs[-1]

    scale, null = guidance["scale"], guidance["null_label"]
    x = dpm_solver.sample(
        record, inputs["z"], inputs["y"], spec["num_steps"], null_label=null, scale=scale, before_evaluation=cache.step
    )
    raw = torch.stack(outputs).unflatten(0, (-1, 2))
    return x, raw[:, 0] + scale * (raw[:, 0] - raw[:, 1]), raw


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    x: Tensor,
    spec: dict[str, Any],
    guidance: dict[str, Any],
    inputs: dict[str, Tensor],
    cache: Any,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Final latents, and the prediction handed to the sampler at every step [steps, ...]."""
    memory: dict[str, Any] = {"noise": noise}
    outputs = []
    for k, t in enumerate(spec["timesteps"]):
        cache.step(k)
        out = call(model, x, t, inputs, guidance)
        out = torch.cat([cache.fix(out[:, : x.shape[1]]), out[:, x.shape[1] :]], dim=1)
        outputs.append(out[:, : x.shape[1]])
        x = UPDATES[spec["kind"]](x, k, out, spec, memory)
    return x, torch.stack(outputs)
