"""Uncached runs, step by step: what the scheduler is handed, and what it makes of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import clock
from ..calibrate.setup import Setup, denoiser, draw
from ..fill.linear import fits
from ..forward import noisy_sample
from ..hooks import captured
from ..noise import levels
from ..parts import check_int
from .errors import mixing


def stepped(scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """The latents that the scheduler would go on with, in float32; it is left as it is.

    A step may be less than what half precision tells apart.
    """
    token = clock.copies.set(None)  # the copy is no scheduler of the pipeline's
    try:
        return copy.deepcopy(scheduler).step(prediction.float(), timestep, sample.float(), return_dict=False)[0]
    finally:
        clock.copies.reset(token)


def scaled(scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
    """What the network is fed with for these latents, in float32; the scheduler is left as it is."""
    if not hasattr(scheduler, "scale_model_input"):  # flow matching
        return sample.detach().float()
    token = clock.copies.set(None)
    try:
        return copy.deepcopy(scheduler).scale_model_input(sample.detach().float(), timestep)
    finally:
        clock.copies.reset(token)


@dataclass(frozen=True)
class Trajectories:
    """Runs of some samples, on the CPU.

    Attributes:
        latents: [T + 1, n, ...] what the scheduler is handed at every step, and what it ends with, in float32.
        predictions: [T, n, ...] what it is handed with it: the network's output after guidance.
        gains: [T] the change of the next latents by a change of the prediction, a factor.
        pictures: [n, ...] what the pipeline makes of the last latents.
    """

    latents: Tensor
    predictions: Tensor
    gains: Tensor
    pictures: Tensor

    def __len__(self) -> int:
        """Steps."""
        return len(self.predictions)


@dataclass
class _Recorder(clock.Silent):
    """Keeps every step."""

    latents: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    last: Any = None

    def on_begin(self, scheduler: Any) -> None:
        self.latents, self.predictions, self.gains = [], [], []

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        after, gain = linear(scheduler, prediction, timestep, sample)
        self.latents.append(sample.detach().float().cpu().clone())
        self.predictions.append(prediction.detach().float().cpu().clone())
        self.gains.append(gain)
        self.last = after.cpu()
        return prediction


def linear(scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, float]:
    """The next latents in float32, and the factor by which a change of the prediction changes them.

    Raises:
        ValueError: the scheduler draws noise, or does more to a prediction than to add a multiple of it.
    """
    prediction = prediction.float()
    after = stepped(scheduler, prediction, timestep, sample)
    change = stepped(scheduler, 2 * prediction, timestep, sample) - after
    gain = float((change * prediction).sum() / prediction.square().sum())
    rest = (change - gain * prediction).norm() / max(float(change.norm()), 1e-12)
    if not rest < 1e-2:
        raise ValueError(
            f"{type(scheduler).__name__} draws noise, clips or thresholds: its steps are not linear in the prediction, "
            "so that predictors cannot be fitted"
        )
    return after, gain


def record(pipe: Any, setup: Setup, samples: Sequence[int]) -> Trajectories:
    """Runs of some samples, all at once; the pipeline has no cache.

    Raises:
        ValueError: the steps of the scheduler are not linear in the prediction.
    """
    return _recorded(pipe, setup, samples, _Recorder())


def _recorded(pipe: Any, setup: Setup, samples: Sequence[int], seen: _Recorder) -> Trajectories:
    with clock.observed(pipe.scheduler, seen):
        pictures = draw(pipe, setup, samples)
    if len(seen.predictions) != setup.num_steps:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} asks for {len(seen.predictions)} predictions in {setup.num_steps} steps: "
            "plans need one in each"
        )
    latents = torch.stack([*seen.latents, seen.last])
    return Trajectories(latents, torch.stack(seen.predictions), torch.tensor(seen.gains).double(), pictures)


class _Levels(_Recorder):
    """Also sees the noise levels of the steps."""

    angles: Tensor

    def on_begin(self, scheduler: Any) -> None:
        super().on_begin(scheduler)
        self.angles = angles(scheduler)


@dataclass
class _Sampler(_Recorder):
    """Keeps a finer run at the noise levels of a coarser one, linear in the angle between two steps."""

    wanted: Tensor = field(default_factory=lambda: torch.empty(0))  # [T] angles
    shares: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, fine steps] of every step in each of them
    step: int = 0

    def on_begin(self, scheduler: Any) -> None:
        fine = angles(scheduler)
        after = torch.searchsorted(-fine, -self.wanted).clamp(1, len(fine) - 1)
        share = ((fine[after - 1] - self.wanted) / (fine[after - 1] - fine[after])).clamp(0, 1)
        self.shares = torch.zeros(len(self.wanted), len(fine), dtype=torch.float64)
        rows = torch.arange(len(self.wanted))
        self.shares[rows, after - 1], self.shares[rows, after] = 1 - share, share
        self.latents, self.predictions, self.step = [], [], 0

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        if not self.latents:
            self.latents = [torch.zeros(sample.shape) for _ in self.wanted]
            self.predictions = [torch.zeros(prediction.shape) for _ in self.wanted]
        for k, share in enumerate(self.shares[:, self.step].tolist()):
            if share:
                self.latents[k] += share * sample.float().cpu()
                self.predictions[k] += share * prediction.float().cpu()
        self.step += 1
        return prediction

    def on_step(self, scheduler: Any, latents: Any) -> None:
        self.last = latents.float().cpu()


def angles(scheduler: Any) -> Tensor:
    """[T] arctan(sigma / alpha) at every step, falling."""
    alpha, sigma = levels(scheduler)
    return torch.atan2(sigma, alpha)


def solution(pipe: Any, setup: Setup, samples: Sequence[int], many: int) -> Trajectories:
    """Like `record`, but of a run of so many steps, at the noise levels of the setup's steps: nearly the solution of
    the sampler's differential equation, which shorter runs only approximate.

    Raises:
        ValueError: as in `record`; or not more steps than the setup has, or a number that the scheduler cannot divide.
    """
    check_int("the steps of a reference solution", many, setup.num_steps + 1)
    check_divides(pipe.scheduler, many)
    coarse = _Levels()
    gains = _recorded(pipe, setup, samples[:1], coarse).gains
    with clock.observed(pipe.scheduler, _Sampler(wanted=coarse.angles)) as seen:
        pictures = draw(pipe, replace(setup, num_steps=many), samples)
    return Trajectories(torch.stack([*seen.latents, seen.last]), torch.stack(seen.predictions), gains, pictures)


def check_divides(scheduler: Any, many: int) -> None:
    """Raises a ValueError where so many steps are no solution.

    DDIM and its like go from a timestep to the one N // steps lower, whatever the next one is: with 300 of 1,000 steps
    a tenth of the way is missing.
    """
    trained = int(scheduler.config.get("num_train_timesteps", many))
    if getattr(scheduler, "sigmas", None) is None and trained % many:
        fitting = ", ".join(str(n) for n in range(1, trained + 1) if trained % n == 0 and n >= many / 4)
        raise ValueError(
            f"{type(scheduler).__name__} cannot divide its {trained} timesteps into {many}: "
            f"a solution may have {fitting}"
        )


def finest(scheduler: Any, steps: int) -> int:
    """Steps of a solution: ten times as many, or what the scheduler can divide its timesteps into from there on."""
    trained = int(scheduler.config.get("num_train_timesteps", 10 * steps))
    if getattr(scheduler, "sigmas", None) is not None:
        return 10 * steps
    return next((n for n in range(10 * steps, trained) if trained % n == 0), trained)


@dataclass
class _First(clock.Silent):
    """Sees the first step, and ends the run."""

    latents: Tensor | None = None  # as the network is fed with them
    prediction: Tensor | None = None

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        # some pipelines step both halves of guidance
        self.latents, self.prediction = scaled(scheduler, sample[:1], timestep), prediction[:1]
        raise clock.Enough


def fed_latents(pipe: Any, setup: Setup, sample: int) -> bool:
    """Whether predictors can use the network's input: it begins with the latents, and what is added to the network's
    outputs comes out of guidance as it is (some pipelines turn the sign, or rescale)."""
    watched = clock.observed(pipe.scheduler, _First())
    with captured(denoiser(pipe)) as calls, watched as seen, contextlib.suppress(clock.Enough):
        draw(pipe, setup, [sample])
    outputs = [call.output if isinstance(call.output, Tensor) else call.output[0] for call in calls]
    inputs = noisy_sample(calls[0].args, calls[0].kwargs)
    if inputs is None or seen.latents is None or seen.prediction is None or not fits(inputs, outputs[0]):
        return False
    found = inputs[:1].float()
    if found.ndim != seen.latents.ndim or seen.prediction.shape != seen.latents.shape:
        return False
    found = found[:, : seen.latents.shape[1]]
    try:
        share = float(mixing(outputs, seen.prediction).sum())
    except ValueError:
        return False
    alike = found.shape == seen.latents.shape and torch.allclose(found, seen.latents, rtol=1e-2, atol=1e-2)
    return alike and abs(share - 1) < 0.05
