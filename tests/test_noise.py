"""Noise levels against what diffusers' schedulers really do, and conversions between what networks predict."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import types

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from hypothesis import given
from hypothesis import strategies as st

from dittocache import noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # numpy, diffusers

STEPS = 10  # divides the 1000 trained steps: see BESIDE
KINDS = tuple(noise.TERMS)
CONFIGS = {  # those with a setting that a scheduler's constructor does not know are no case
    "plain": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine-leading": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"},
    "cosine-v": {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "leading",
        "prediction_type": "v_prediction",
    },
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
SDE = "DPMSolverSDEScheduler"
KARRAS = {e.name for e in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
STOCHASTIC = {  # sampling draws fresh noise: no path to follow, but a variance
    "CogVideoXDPMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    SDE,
}
DETERMINISTIC = (KARRAS - STOCHASTIC) | {
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DPMSolverMultistepInverseScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
}

# What diffusers does otherwise. Tests below expect each of these to fail, so that none of them outlives its reason.
BETWEEN = {"KDPM2DiscreteScheduler", SDE}  # add_noise knows no points between two sigmas
LOOKED_UP = {("SASolverScheduler", c) for c in ("karras", "exponential", "flow")}  # add_noise at t's trained level
BESIDE = {  # steps go to t - 1000 // STEPS, which with linspace spacing is not the next timestep
    (n, "linspace")
    for n in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler")
} | {("PNDMScheduler", "linspace")}
NOT_A_NUMBER = ("KDPM2AncestralDiscreteScheduler", "cosine")  # a root of a difference that float32 makes negative
SIGMAS_TO_20000 = DETERMINISTIC - {"CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "PNDMScheduler"}
AVERAGED = {("PNDMScheduler", "v"), ("PNDMScheduler", "cosine-v")}  # averages v of different levels as if it were noise
NOT_BUILT = {  # the config is taken, but `step` raises
    *((n, "sample") for n in ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler")),
    *((n, "sample") for n in ("KDPM2DiscreteScheduler", SDE)),
    ("UnCLIPScheduler", "v"),
}


def scheduler_class(name):
    """The class; that of SDE also without torchsde, which draws the noise only."""
    if name != SDE:
        return getattr(diffusers, name)
    if importlib.util.find_spec("torchsde") is not None:
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    return sde_without_torchsde()


def sde_without_torchsde(found=[]):  # noqa: B006 (imported once)
    if not found:
        path = "diffusers.schedulers.scheduling_dpmsolver_sde"
        sys.modules["torchsde"] = types.ModuleType("torchsde")
        try:
            found.append(importlib.import_module(path).DPMSolverSDEScheduler)
        finally:
            del sys.modules["torchsde"]
            sys.modules.pop(path, None)
    return found[0]


def settings_of(name, config):
    """Constructor arguments of a case, or None where the class does not know one of the settings."""
    known = inspect.signature(scheduler_class(name).__init__).parameters
    if not set(CONFIGS[config]) <= set(known):
        return None
    return {**({"clip_sample": False} if "clip_sample" in known else {}), **CONFIGS[config]}


def cases(names, without=()):
    found = sorted(n for n in names if n == SDE or hasattr(diffusers, n))  # some are younger than others
    known = [(n, c) for n in found for c in CONFIGS if settings_of(n, c) is not None]
    return [pytest.param(n, c, id=f"{n}-{c}") for n, c in known if (n, c) not in without]


def make(name, config="plain"):
    return copy.deepcopy(made(name, config))


@functools.cache
def made(name, config):  # some take half a second
    scheduler = scheduler_class(name)(**settings_of(name, config))
    scheduler.set_timesteps(STEPS)
    return scheduler


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noisy(scheduler, x0, eps, k):
    """The scheduler's own sample at step k."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(k)
    t = scheduler.timesteps[k : k + 1]
    return scheduler.scale_noise(x0, t, eps) if hasattr(scheduler, "scale_noise") else scheduler.add_noise(x0, eps, t)


def network_input(scheduler, sample, k):
    scale = getattr(scheduler, "scale_model_input", None)
    return scale(sample, scheduler.timesteps[k]) if scale else sample


def exact(x0, eps, alpha, sigma, kind):
    """What a perfect network predicts: the definitions written out."""
    v = alpha * eps - sigma * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": v, "flow_prediction": eps - x0}[kind]


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


# ---- levels ---------------------------------------------------------------------------------------------------------
def test_the_cases_are_many():
    """Every scheduler of diffusers' list that is not preconditioned, each in several configs."""
    listed = [p.values[0] for p in cases(KARRAS)]
    assert set(listed) == KARRAS and len(KARRAS) >= 14
    assert all(listed.count(name) >= 6 for name in KARRAS)
    assert KARRAS <= DETERMINISTIC | STOCHASTIC
    for config in CONFIGS:
        assert any(p.values[1] == config for p in cases(DETERMINISTIC)), config


@pytest.mark.parametrize("name, config", cases(DETERMINISTIC | STOCHASTIC, without=LOOKED_UP))
def test_levels_are_those_of_added_noise(name, config):
    """At every step, add_noise and then scale_model_input give alpha * x0 + sigma * noise."""
    scheduler = make(name, config)
    alpha, sigma = noise.levels(scheduler)
    assert alpha.shape == sigma.shape == (len(scheduler.timesteps),) and len(alpha) >= STEPS
    assert alpha.dtype == sigma.dtype == torch.float64
    x0, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for k in range(len(alpha)):
        fresh = make(name, config)
        got = network_input(fresh, noisy(fresh, x0, eps, k), k)
        near = torch.allclose(got, alpha[k] * x0 + sigma[k] * eps, atol=2e-6)
        assert near != (name in BETWEEN and k % 2 == 1), k


@pytest.mark.parametrize("name, config", sorted(LOOKED_UP))
def test_one_add_noise_does_not_know_its_sigmas(name, config):
    """Its steps do: see the deviation of what it samples, below."""
    scheduler, x0, eps = make(name, config), randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    far = [noisy(scheduler, x0, eps, k) - a * x0 - s * eps for k, (a, s) in enumerate(zip(*noise.levels(scheduler)))]
    assert torch.stack(far).abs().max() > 1e-3


@pytest.mark.parametrize("name, config", cases(DETERMINISTIC, without={(n, "cosine") for n in SIGMAS_TO_20000}))
def test_sampling_with_an_exact_network_stays_on_the_levels(name, config):
    """x0 and noise do not change along the path, whatever the order of the sampler."""
    scheduler, (x0, eps) = make(name, config), (randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1))
    (alpha, sigma), kind = noise.levels(scheduler), noise.prediction_type(scheduler)
    atol = 3e-4  # float32 sigmas in the scheduler, of which x0 by the noise is a small difference
    sample, far = noisy(scheduler, x0, eps, 0), 0.0
    for k, t in enumerate(scheduler.timesteps):
        x = network_input(scheduler, sample, k)
        far = max(far, (x - alpha[k] * x0 - sigma[k] * eps).abs().max().item())
        prediction = exact(x0, eps, alpha[k], sigma[k], kind)
        if (name, config) in NOT_BUILT:
            with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
                scheduler.step(prediction, t, sample)
            return
        sample = scheduler.step(prediction, t, sample).prev_sample
    if (name, config) in BESIDE | AVERAGED:
        assert far > 0.1
    else:
        assert far < atol


class Orthogonal:
    """Noise of which each draw is orthogonal to all before: norms add up like deviations."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, *args, **kwargs):
        self.drawn += 1
        return torch.eye(64, dtype=torch.float64)[self.drawn].reshape(1, 1, 1, 64)


@pytest.mark.parametrize("name, config", cases(STOCHASTIC))
def test_stochastic_sampling_of_nothing_has_the_deviation_sigma(name, config, monkeypatch):
    """With x0 = 0 the input is noise alone: its deviation at every step is sigma."""
    scheduler, draw = make(name, config), Orthogonal()
    (alpha, sigma), kind = noise.levels(scheduler), noise.prediction_type(scheduler)
    if name == SDE:
        scheduler.noise_sampler = draw
    else:
        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw)
    first = torch.eye(64, dtype=torch.float64)[0].reshape(1, 1, 1, 64)
    sample = sigma[0] * first if (name, config) in LOOKED_UP else noisy(scheduler, torch.zeros_like(first), first, 0)
    deviations, old, nexts = [], None, [*scheduler.timesteps[1:], None]
    for k, t in enumerate(scheduler.timesteps):
        x = network_input(scheduler, sample, k)
        deviations.append(x.norm())
        prediction = exact(torch.zeros_like(x), x / sigma[k], alpha[k], sigma[k], kind)
        if (name, config) in NOT_BUILT:
            with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
                scheduler.step(prediction, t, sample)
            return
        if name == "CogVideoXDPMScheduler":
            sample, old = scheduler.step(prediction, old, t, scheduler.timesteps[k - 1] if k else None, sample)[:2]
        elif name == "UnCLIPScheduler":
            sample = scheduler.step(prediction, t, sample, prev_timestep=nexts[k]).prev_sample
        else:
            sample = scheduler.step(prediction, t, sample).prev_sample
    assert draw.drawn >= STEPS - 1
    far = (torch.stack(deviations) - sigma).abs().max().item()
    if (name, config) in BESIDE:
        assert far > 0.1
    elif (name, config) == NOT_A_NUMBER:
        assert math.isnan(far)
    else:
        assert far < (1e-3 if config == "cosine" else 2e-6)


def test_whatever_else_diffusers_has_is_right_or_refused():
    """Also schedulers that are not named here: levels agree with add_noise, or one line says why there are none."""
    right, refused = set(), set()
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
            continue
        try:
            make_one = lambda cls=cls: cls(*(9 for _ in required(cls)))  # noqa: E731
            scheduler = make_one()
            scheduler.set_timesteps(2)
        except Exception:  # wants other arguments; there are levels or not, but not before this
            continue
        x0, eps = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
        try:
            alpha, sigma = noise.levels(scheduler)
        except ValueError as error:
            assert "\n" not in str(error) and cls.__name__ in str(error)
            refused.add(name)
            continue
        got = network_input(scheduler, noisy(scheduler, x0, eps, 0), 0)
        assert torch.allclose(got, alpha[0] * x0 + sigma[0] * eps, atol=2e-6), name
        right.add(name)
    assert {"DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "TCDScheduler"} <= right
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "SCMScheduler", "IPNDMScheduler"} <= refused
    assert {"CMStochasticIterativeScheduler", "VQDiffusionScheduler", "DDPMWuerstchenScheduler"} <= refused
    assert {"DDIMInverseScheduler", "ScoreSdeVeScheduler", "RePaintScheduler"} <= refused


def required(cls):
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("EDMEulerScheduler", {}, "EDMEulerScheduler is not supported: sigma_data is 0.5"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "not supported: invert_sigmas is True"),
        ("IPNDMScheduler", {}, "the prediction_type of IPNDMScheduler must be one of .*; got None"),
        ("DDIMScheduler", {"prediction_type": "velocity"}, "epsilon, v_prediction, sample, flow_prediction; got 'velo"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "DDIMScheduler do not fit .* flow_prediction"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "UniPC.* do not fit .* flow_prediction"),
        ("MiniMaxH3Scheduler", {}, "the prediction_type of MiniMaxH3Scheduler must be one of"),  # velocity towards x0
        ("DDIMInverseScheduler", {}, "DDIMInverseScheduler is not supported: it has neither scale_noise nor"),
    ],
)
def test_schedulers_that_are_not_understood(name, settings, message):
    if not hasattr(diffusers, name):
        pytest.skip(f"{name} is younger than this diffusers")
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=message):
        noise.levels(scheduler)


def test_no_timesteps_and_no_scheduler():
    with pytest.raises(ValueError, match="PNDMScheduler has no timesteps yet: call its set_timesteps first"):
        noise.levels(diffusers.PNDMScheduler())
    with pytest.raises(ValueError, match="prediction_type of object must be one of"):
        noise.levels(object())
    scheduler = make("EulerDiscreteScheduler")
    scheduler.sigmas = scheduler.sigmas[:4]
    with pytest.raises(ValueError, match="the sigmas of EulerDiscreteScheduler do not fit its timesteps"):
        noise.levels(scheduler)


def test_levels_leave_the_scheduler_alone():
    for name in (
        "EulerDiscreteScheduler",
        SDE,
        "DDIMScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ):
        scheduler, plain = make(name), make(name)
        if hasattr(scheduler, "sigmas"):  # some keep them in float64, where nothing has to be converted
            scheduler.sigmas, plain.sigmas = scheduler.sigmas.double(), plain.sigmas.double()
        noise.levels(scheduler)[0].zero_()
        noise.levels(scheduler)[1].zero_()
        for key, value in vars(plain).items():
            same = getattr(scheduler, key)
            assert torch.equal(same, value) if isinstance(value, torch.Tensor) else type(same) is type(value), key


@pytest.mark.parametrize("kind", KINDS[:3])
def test_prediction_type_is_that_of_the_config(kind):
    assert noise.prediction_type(diffusers.DDIMScheduler(prediction_type=kind)) == kind


def test_prediction_type_of_flows_and_of_an_older_name():
    assert noise.prediction_type(diffusers.FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    assert noise.prediction_type(diffusers.FlowMatchHeunDiscreteScheduler()) == "flow_prediction"
    assert noise.prediction_type(make("UniPCMultistepScheduler", "flow")) == "flow_prediction"
    assert noise.prediction_type(diffusers.EulerDiscreteScheduler(prediction_type="original_sample")) == "sample"


# ---- steps ----------------------------------------------------------------------------------------------------------
FIRST_ORDER = [  # scheduler, settings, steps that are of first order
    *(("DDIMScheduler", {"prediction_type": k}, STEPS) for k in KINDS[:3]),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}, STEPS),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, STEPS),
    *(("DPMSolverMultistepScheduler", {"solver_order": 1, "prediction_type": k}, STEPS) for k in KINDS[:3]),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "use_karras_sigmas": True}, STEPS),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 1, "algorithm_type": "dpmsolver", **CONFIGS["sigma-min"]},
        STEPS - 1,
    ),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, **CONFIGS["flow"]}, STEPS),
    ("DPMSolverMultistepScheduler", {}, 1),
    ("UniPCMultistepScheduler", {}, 1),
    ("UniPCMultistepScheduler", CONFIGS["flow"], 1),
    ("DEISMultistepScheduler", {}, 1),
    *(("EulerDiscreteScheduler", {"prediction_type": k}, STEPS) for k in KINDS[:3]),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}, STEPS),
    ("LMSDiscreteScheduler", CONFIGS["scaled"], 1),
    ("FlowMatchEulerDiscreteScheduler", {}, STEPS),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, STEPS),
]


@pytest.mark.parametrize("name, settings, steps", FIRST_ORDER)
def test_ddim_step_is_the_step_of_first_order_schedulers(name, settings, steps):
    """In float32, with predictions that agree with nothing, to 1e-5 between network inputs."""
    clip = {"clip_sample": False} if name == "DDIMScheduler" else {}
    make_one = lambda: getattr(diffusers, name)(**clip, **settings)  # noqa: E731
    scheduler = make_one()
    scheduler.set_timesteps(STEPS)
    kind, ends = noise.prediction_type(scheduler), [*zip(*noise.levels(scheduler)), (1.0, 0.0)]
    x, ones = randn(2, 4, 8, 8, dtype=torch.float32), torch.ones(1, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps[:steps]):
        prediction = randn(2, 4, 8, 8, seed=k + 1, dtype=torch.float32)
        scale = network_input(scheduler, ones, k)
        theirs = scheduler.step(prediction, t, (x / scale).float()).prev_sample
        if k + 1 < len(scheduler.timesteps):
            theirs = network_input(scheduler, theirs, k + 1)
        mine = noise.ddim_step(prediction, x, ends[k], ends[k + 1], kind)
        assert mine.dtype == torch.float32 and relative(mine, theirs) < 1e-5, k
        assert relative(mine, x) > 5e-4  # it went somewhere
        x = mine / mine.std()


def test_ddim_step_by_hand():
    x, eps = randn(2, 3), randn(2, 3, seed=1)
    got = noise.ddim_step(eps, x, (0.6, 0.8), (0.8, 0.6), "epsilon")
    assert torch.allclose(got, 0.8 * (x - 0.8 * eps) / 0.6 + 0.6 * eps, rtol=1e-14)
    velocity = noise.ddim_step(eps, x, (0.25, 0.75), (0.5, 0.5), "flow_prediction")
    assert torch.allclose(velocity, x - 0.25 * eps, rtol=1e-14)
    assert torch.equal(noise.ddim_step(x, eps, (0.6, 0.8), (1.0, 0.0), "sample"), x)


# ---- conversions ----------------------------------------------------------------------------------------------------
ANGLES = st.floats(0.02, math.pi / 2 - 0.02)


@pytest.mark.parametrize("kind", KINDS)
@given(angle=ANGLES, flow=st.booleans(), form=st.sampled_from(["float", "0-d", "batch"]))
def test_round_trips(kind, angle, flow, form):
    """From a known x0 and noise, through every kind, and back."""
    alpha, sigma = math.cos(angle), math.sin(angle)
    if flow:
        alpha, sigma = 1 - sigma, sigma
    if form != "float":
        alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (alpha, sigma))
    if form == "batch":
        alpha, sigma = (v.expand(2).reshape(2, 1, 1, 1) for v in (alpha, sigma))
    x0, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    x = noise.add_noise(x0, eps, alpha, sigma)
    assert torch.allclose(x, alpha * x0 + sigma * eps, atol=1e-14)
    prediction = noise.from_noise(eps, x, alpha, sigma, kind)
    assert torch.allclose(prediction, exact(x0, eps, alpha, sigma, kind), atol=1e-9)
    assert torch.allclose(noise.to_noise(prediction, x, alpha, sigma, kind), eps, atol=1e-9)
    assert torch.allclose(noise.to_sample(prediction, x, alpha, sigma, kind), x0, atol=1e-9)
    step = noise.ddim_step(prediction, x, (alpha, sigma), (0.3, 0.9), kind)
    assert torch.allclose(step, 0.3 * x0 + 0.9 * eps, atol=1e-9)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_velocities_tell_both_at_both_ends(kind):
    x0, eps = randn(2, 3), randn(2, 3, seed=1)
    for alpha, sigma in ((1.0, 0.0), (0.0, 1.0)):
        x, prediction = alpha * x0 + sigma * eps, exact(x0, eps, alpha, sigma, kind)
        assert torch.allclose(noise.to_noise(prediction, x, alpha, sigma, kind), eps)
        assert torch.allclose(noise.to_sample(prediction, x, alpha, sigma, kind), x0)


def test_levels_may_differ_within_a_batch():
    x, eps = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).reshape(3, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    for kind in KINDS:
        got = noise.ddim_step(eps, x, (alpha, sigma), (0.8, 0.6), kind)
        for i in range(3):
            level = (alpha[i].item(), sigma[i].item())
            one = noise.ddim_step(eps[i : i + 1], x[i : i + 1], level, (0.8, 0.6), kind)
            assert torch.allclose(got[i : i + 1], one, rtol=1e-12)


def test_coefficients_are_rounded_once():
    """Numbers are taken in float64, whatever torch's default; float32 results are as good as float32 can be."""
    x0, eps = randn(2, 3), randn(2, 3, seed=1)
    assert torch.equal(noise.add_noise(x0, eps, 0.1, 0.3), 0.1 * x0 + 0.3 * eps)
    level = (torch.tensor(0.01, dtype=torch.float64), math.sqrt(1 - 1e-4))
    for kind in KINDS:
        x, y = x0.float(), eps.float()
        best = noise.ddim_step(y.double(), x.double(), level, (0.02, math.sqrt(1 - 4e-4)), kind)
        got = noise.ddim_step(y, x, level, (0.02, math.sqrt(1 - 4e-4)), kind)
        assert got.dtype == torch.float32 and relative(got, best) < 2e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [False, True])
def test_half_precision_is_summed_in_float32(dtype, batch):
    x, y = randn(2, 3, 4, 4).to(dtype), randn(2, 3, 4, 4, seed=1).to(dtype)
    alpha, sigma = (torch.full((2, 1, 1, 1), v) if batch else v for v in (0.3, 0.7))
    got = noise.to_sample(y, x, alpha, sigma, "flow_prediction")
    assert got.dtype == dtype
    assert torch.equal(got, noise.to_sample(y.float(), x.float(), alpha, sigma, "flow_prediction").to(dtype))
    assert noise.to_sample(y, x.float(), alpha, sigma, "flow_prediction").dtype == torch.float32


def test_gradients_pass():
    y, x = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    noise.ddim_step(y, x, (0.6, 0.8), (0.8, 0.6), "epsilon").sum().backward()
    assert torch.allclose(y.grad, torch.full_like(y, 0.6 - 0.8 * 0.8 / 0.6))
    assert torch.allclose(x.grad, torch.full_like(x, 0.8 / 0.6))


# ---- errors ---------------------------------------------------------------------------------------------------------
CONVERSIONS = [noise.to_noise, noise.to_sample, noise.from_noise]


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("kind", ["eps", "", None, 3, "v"])
def test_unknown_kinds(convert, kind):
    x = randn(2, 3)
    with pytest.raises(ValueError, match="kind must be one of epsilon, v_prediction, sample, flow_prediction; got"):
        convert(x, x, 0.6, 0.8, kind)
    with pytest.raises(ValueError, match="kind must be one of"):
        noise.ddim_step(x, x, (0.6, 0.8), (1.0, 0.0), kind)


@pytest.mark.parametrize(
    "convert, kind, alpha, sigma",
    [
        (noise.to_noise, "sample", 1.0, 0.0),
        (noise.to_sample, "epsilon", 0.0, 1.0),
        (noise.from_noise, "sample", 0.0, 1.0),
        (noise.from_noise, "v_prediction", 0.0, 1.0),
        (noise.from_noise, "flow_prediction", 0, 1),
        (noise.to_sample, "epsilon", torch.tensor([[0.5], [0.0]]), torch.tensor([[0.5], [1.0]])),
    ],
)
def test_levels_that_do_not_tell(convert, kind, alpha, sigma):
    x = randn(2, 3)
    with pytest.raises(ValueError, match=f"{kind} divides by zero at this level: alpha = .*, sigma = .*") as error:
        convert(x, x, alpha, sigma, kind)
    assert "\n" not in str(error.value)
    assert convert(x, x, 0.6, 0.8, kind).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 1), (1, 3, 4, 4), (2, 6, 4, 4), (2, 3, 4)])
def test_shapes_that_do_not_fit(shape):
    x = randn(2, 3, 4, 4)
    for convert in CONVERSIONS:
        with pytest.raises(ValueError, match=r"shapes .*\(2, 3, 4, 4\).* do not fit"):
            convert(randn(*shape), x, 0.6, 0.8, "v_prediction")


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1, 1, 1), (2, 1, 1), (2, 1, 1, 1, 1)])
def test_levels_that_do_not_fit(shape):
    """Not even [batch], which would be taken for columns."""
    x = randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="do not fit each other"):
        noise.add_noise(x, x, torch.full(shape, 0.6), 0.8)
    with pytest.raises(ValueError, match="do not fit each other"):
        noise.ddim_step(x, x, (0.6, 0.8), (torch.full(shape, 0.6), 0.8), "epsilon")
