"""Steps of a scheduler that are taken on a copy."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

import dittocache
from dittocache import Recipe, clock
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.fix import NoiseScale
from dittocache.tune.trajectory import record, stepped
from dittocache.when import ReuseSteps

STEPS = 6
SETUP = Setup(num_steps=STEPS, guidance_scale=1.5, seed=3, conditions=(1, 2))
SCHEDULERS = {"ddim": lambda: DDIMScheduler(clip_sample=False), "dpm2m": DPMSolverMultistepScheduler}
CORRECTED = Recipe(ReuseSteps((2, 4)), fix=NoiseScale(0.5))  # every prediction is doubled


class Ahead(clock.Silent):
    """Takes every step on a copy beforehand, and hands on what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Any, Tensor, Tensor]] = []
        self.heard: list[int] = []  # who listens to the scheduler, after the copy

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        after = stepped(scheduler, prediction, timestep, sample)
        self.seen.append((prediction.clone(), timestep, sample.clone(), after))
        self.heard.append(len(clock.listeners(scheduler)))
        return prediction


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_steps_like_the_scheduler_itself_beside_a_cache(name):
    """A recipe that corrects predictions corrects those of the pipeline's scheduler, once: no copy is corrected."""
    pipe = tiny.pipeline(scheduler=SCHEDULERS[name]())
    plain = SCHEDULERS[name]()
    plain.set_timesteps(STEPS)
    with dittocache.enable(pipe, CORRECTED) as cache:
        expected = draw(pipe, SETUP, [0, 1])
        with clock.observed(pipe.scheduler, Ahead()) as ahead:
            pictures = draw(pipe, SETUP, [0, 1])
        assert cache.trace.table.mean(1).tolist() == [1, 1, 0, 1, 0, 1]
    assert torch.equal(pictures, expected), "nothing is left behind"
    assert len(ahead.seen) == STEPS and ahead.heard == [2] * STEPS
    for prediction, timestep, sample, after in ahead.seen:
        wanted = plain.step(prediction, timestep, sample, return_dict=False)[0]
        assert torch.allclose(after, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_recorded_run_of_a_corrected_one_is_what_its_scheduler_made():
    pipe = tiny.pipeline(scheduler=SCHEDULERS["ddim"]())
    with dittocache.enable(pipe, CORRECTED):
        runs = record(pipe, SETUP, [0, 1])
    again = SCHEDULERS["ddim"]()
    again.set_timesteps(STEPS)
    for k, timestep in enumerate(again.timesteps):
        after = again.step(runs.predictions[k], timestep, runs.latents[k], return_dict=False)[0]
        assert torch.allclose(after, runs.latents[k + 1], atol=1e-5 * float(after.abs().max()))


def test_a_copy_is_nobody_elses_scheduler():
    """Whoever is told of the copies that a pipeline makes in a call is not told of these."""
    scheduler, told = DDIMScheduler(), []
    scheduler.set_timesteps(STEPS)
    sample, timestep = torch.randn(1, 4, 8, 8), scheduler.timesteps[0]
    with clock.observed(scheduler, clock.Silent()):
        token = clock.copies.set(told.append)
        try:
            after = stepped(scheduler, sample, timestep, sample.half())
            assert not told and clock.copies.get() is not None
        finally:
            clock.copies.reset(token)
    assert after.dtype == torch.float32
    assert torch.equal(after, scheduler.step(sample, timestep, sample.half().float(), return_dict=False)[0])
