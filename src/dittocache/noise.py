"""Noise levels of a diffusers scheduler, and conversions between the quantities that networks predict.

All is told at the network's input, x = alpha * x0 + sigma * noise. A network predicts one of four kinds: `epsilon` the
noise, `sample` x0, `v_prediction` alpha * noise - sigma * x0 (arXiv 2202.00512), `flow_prediction` noise - x0 (arXiv
2210.02747). What some schedulers do to x0 on top (clipping, thresholding) is not done here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parts import check_choice, show

Scalar = float | Tensor  # a number, a 0-d tensor, or one entry for each sample: [batch, 1, ...]
Level = tuple[Scalar, Scalar]  # alpha, sigma
# noise and sample as (p * prediction + q * x) / d, and the prediction as (p * noise + q * x) / d: (p, q, d) of each
TERMS: dict[str, Any] = {
    "epsilon": lambda a, s: ((1, 0, 1), (-s, 1, a), (1, 0, 1)),
    "v_prediction": lambda a, s: ((a, s, a * a + s * s), (-s, a, a * a + s * s), (a * a + s * s, -s, a)),
    "sample": lambda a, s: ((-a, 1, s), (1, 0, 1), (-s, 1, a)),
    "flow_prediction": lambda a, s: ((a, 1, a + s), (-s, 1, a + s), (a + s, -1, a)),
}


def prediction_type(scheduler: Any) -> str:
    """The kind that a scheduler expects. Flow matching says nothing in its config, and is known by `scale_noise`.

    ValueError: any other kind, a preconditioned network (`sigma_data`), a velocity towards x0 (`invert_sigmas`).
    """
    config = getattr(scheduler, "config", {})
    for key in ("sigma_data", "invert_sigmas"):
        if config.get(key):
            raise ValueError(f"{type(scheduler).__name__} is not supported: {key} is {show(config[key])}")
    flow = hasattr(scheduler, "scale_noise") and "num_train_timesteps" in config
    kind = config.get("prediction_type", "flow_prediction" if flow else None)
    kind = "sample" if kind == "original_sample" else kind  # an older name, which Euler still takes
    check_choice(f"the prediction_type of {type(scheduler).__name__}", kind, TERMS)
    return str(kind)


def levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of the network's input, after `scale_model_input`, at each entry of `scheduler.timesteps`.

    Both are float64 on the CPU, [timesteps]. ValueError: no `set_timesteps` yet, or a scheduler that is not understood.
    By structure: what has `_sigma_to_alpha_sigma_t` (DPM-Solver, UniPC, DEIS) is asked; `sigmas` and a trained schedule
    (Euler, Heun, LMS) mean (x0 + s * noise) / sqrt(1 + s^2); `sigmas` and `scale_noise` a flow, 1 - s and s; a trained
    schedule alone (DDIM, DDPM, PNDM) is looked up, even where steps end beside the next timestep (DDIM, linspace).
    """
    name, kind, flow = type(scheduler).__name__, prediction_type(scheduler), hasattr(scheduler, "scale_noise")
    if getattr(scheduler, "timesteps", None) is None:
        raise ValueError(f"{name} has no timesteps yet: call its set_timesteps first")
    steps = len(scheduler.timesteps)
    # without add_noise a schedule may mean anything: DDIM inverted is a step behind
    trained = getattr(scheduler, "alphas_cumprod", None) if hasattr(scheduler, "add_noise") else None
    if getattr(scheduler, "sigmas", None) is not None and (flow or trained is not None):
        sigmas = _double(scheduler.sigmas)[:steps].clone()
        # KDPM2 and DPM-Solver SDE: every second forward is between two sigmas (KDPM2 ancestral: there it is the next)
        between = hasattr(scheduler, "sigmas_interpol") and not hasattr(scheduler, "sigmas_down")
        if between or hasattr(scheduler, "mid_point_sigma"):
            sigmas[1::2] = (sigmas[: steps - 1 : 2] * sigmas[1::2]).sqrt()
        alpha, sigma = (1 - sigmas, sigmas) if flow else (1 / (1 + sigmas**2).sqrt(), sigmas / (1 + sigmas**2).sqrt())
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas)
    elif trained is not None:
        kept = _double(trained)[_double(scheduler.timesteps).long()]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    else:
        raise ValueError(f"{name} is not supported: it has neither scale_noise nor alphas_cumprod and add_noise")
    if len(sigma) != steps or (kind == "flow_prediction" and not torch.allclose(alpha + sigma, torch.ones_like(alpha))):
        raise ValueError(f"the sigmas of {name} do not fit its timesteps, or its prediction_type {kind}")
    return alpha, sigma


def to_noise(prediction: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: str) -> Tensor:
    """The noise in x by what a network predicts: prediction, x [batch, ...]; alpha, sigma 0-d or [batch, 1, ...].

    ValueError: an unknown kind, shapes that do not fit (split off a learned variance), a level that divides by zero.
    """
    return _mix(*_factors(0, alpha, sigma, kind), prediction, x)


def to_sample(prediction: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: str) -> Tensor:
    """The x0 in x by what a network predicts; arguments and errors as in `to_noise`."""
    return _mix(*_factors(1, alpha, sigma, kind), prediction, x)


def from_noise(noise: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: str) -> Tensor:
    """What a network predicts that sees this noise in x: inverse of `to_noise`, arguments and errors alike."""
    return _mix(*_factors(2, alpha, sigma, kind), noise, x)


def add_noise(x0: Tensor, noise: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
    """alpha * x0 + sigma * noise; arguments and errors as in `to_noise`."""
    return _mix(_double(alpha), _double(sigma), x0, noise)


def ddim_step(prediction: Tensor, x: Tensor, start: Level, end: Level, kind: str) -> Tensor:
    """The network input at `end` = (alpha', sigma') from x at `start`: alpha' * x0 + sigma' * noise, as predicted.

    DDIM at eta = 0 (arXiv 2010.02502, eq. 12), Euler's step for a flow; most schedulers end at (1, 0). Arguments and
    errors as in `to_noise`.
    """
    (p, q), (r, s) = _factors(1, *start, kind), _factors(0, *start, kind)
    return _mix(_double(end[0]) * p + _double(end[1]) * r, _double(end[0]) * q + _double(end[1]) * s, prediction, x)


def _double(value: Any) -> Tensor:
    value = value.detach().cpu() if isinstance(value, Tensor) else value  # not every device has float64
    return torch.as_tensor(value, dtype=torch.float64)


def _factors(wanted: int, alpha: Scalar, sigma: Scalar, kind: str) -> tuple[Tensor, Tensor]:
    check_choice("kind", kind, TERMS)
    p, q, d = map(_double, TERMS[kind](_double(alpha), _double(sigma))[wanted])
    if (d == 0).any():
        raise ValueError(f"{kind} divides by zero at this level: alpha = {show(alpha)}, sigma = {show(sigma)}")
    return p / d, q / d


def _mix(p: Tensor, q: Tensor, y: Tensor, x: Tensor) -> Tensor:
    fit = [not f.ndim or (f.ndim == x.ndim and all(n in (1, m) for n, m in zip(f.shape, x.shape))) for f in (p, q)]
    if y.shape != x.shape or not all(fit):
        raise ValueError(f"shapes {', '.join(str(tuple(t.shape)) for t in (y, x, p, q))} do not fit each other")
    work = torch.promote_types(torch.result_type(y, x), torch.float32)  # sums are in float32 or better
    a, b = (f.item() if f.ndim == 0 else f.to(work).to(x.device) for f in (p, q))
    return (a * y.to(work) + b * x.to(work)).to(torch.result_type(y, x))
