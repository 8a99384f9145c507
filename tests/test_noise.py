"""Noise levels against what diffusers' schedulers really do, and conversions between what networks predict."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from hypothesis import given
from hypothesis import strategies as st

from dittocache import noise

STEPS = 10  # divides the 1000 trained steps: DDIM and its kin step by 1000 // STEPS, wherever the next timestep is
KINDS = tuple(noise.TERMS)
CONFIGS = {  # name -> settings; those that a scheduler's constructor does not know are no case
    "plain": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "sigma-min": {"final_sigmas_type": "sigma_min"},
    "no-prk": {"skip_prk_steps": True},
    "shift": {"shift": 3.0},
    "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
}
REFUSED = {"EDMEulerScheduler"}
KARRAS = {e.name for e in KarrasDiffusionSchedulers} - REFUSED
OTHERS = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DPMSolverMultistepInverseScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
}
# sampling draws fresh noise: no path to follow, but the variance of one
STOCHASTIC = {
    "CogVideoXDPMScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
}
BETWEEN = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}


def scheduler_class(name):
    """The class; DPMSolverSDEScheduler also without torchsde, of which sampling needs the noise only."""
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    path = "diffusers.schedulers.scheduling_dpmsolver_sde"
    if importlib.util.find_spec("torchsde") is not None or path in sys.modules:
        return importlib.import_module(path).DPMSolverSDEScheduler
    sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return importlib.import_module(path).DPMSolverSDEScheduler
    finally:
        del sys.modules["torchsde"], sys.modules[path]


def settings_of(name, config):
    """Constructor arguments of a case, or None where the class does not know one of the settings."""
    known = inspect.signature(scheduler_class(name).__init__).parameters
    if not set(CONFIGS[config]) <= set(known):
        return None
    plain = {"clip_sample": False} if "clip_sample" in known else {}  # x0 is not a picture here
    return {**plain, **CONFIGS[config]}


def make(name, config="plain", steps=STEPS):
    scheduler = scheduler_class(name)(**settings_of(name, config))
    scheduler.set_timesteps(steps)
    return scheduler


def cases(names):
    known = sorted(n for n in names if n == "DPMSolverSDEScheduler" or hasattr(diffusers, n))
    return [pytest.param(n, c, id=f"{n}-{c}") for n in known for c in CONFIGS if settings_of(n, c) is not None]


def pair():
    """x0 and noise, float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def begin_at(scheduler, k):
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(k)


def noisy(scheduler, x0, eps, k):
    """The scheduler's own sample at step k."""
    t = scheduler.timesteps[k : k + 1]
    begin_at(scheduler, k)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, t, eps)
    return scheduler.add_noise(x0, eps, t)


def network_input(scheduler, sample, k):
    return (
        scheduler.scale_model_input(sample, scheduler.timesteps[k])
        if hasattr(scheduler, "scale_model_input")
        else sample
    )


def exact(x0, eps, alpha, sigma, kind):
    """What a perfect network predicts: the definitions, written out."""
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[kind]
