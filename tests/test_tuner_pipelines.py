"""The tuner on pipelines of diffusers: flow matching with shifts of its own (FLUX), prompts, latents and a decoder."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
from pipelines.images import POOLED, TEXT, WIDTH, _dit, _flux_flow, _pixart
from pipelines.stubs import assemble, embed, mask, pooled, vae

import dittocache
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw, made_for, timesteps
from dittocache.tune import Effort, Goal, Predictors, save, tune

SETUP = Setup(num_steps=8, guidance_scale=3.5, seed=3, conditions=("a cat", "a dog", "a bird", "a red fish"))
EFFORT = Effort(samples=2, trial=2, judged=2, held_out=2, batch=2, tries=2, methods=0)


class PromptedFlux(diffusers.FluxPipeline):
    """Without its text encoders: prompts are made numbers by their letters."""

    def encode_prompt(self, prompt, *args, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return embed(prompts, TEXT, WIDTH), pooled(prompts, POOLED), torch.zeros(TEXT, 3)


class PromptedPixArt(diffusers.PixArtAlphaPipeline):
    def encode_prompt(self, prompt, *args, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        empty = [""] * len(prompts)
        return embed(prompts, TEXT, WIDTH), mask(prompts, TEXT), embed(empty, TEXT, WIDTH), mask(empty, TEXT)

    def __call__(self, prompt=None, guidance_scale=4.5, **kwargs):
        return super().__call__(prompt, guidance_scale=guidance_scale, use_resolution_binning=False, **kwargs)


def flux(scheduler):
    config = {"patch_size": 1, "in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2}
    config |= {"joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED, "axes_dims_rope": (4, 4, 8)}
    network = diffusers.FluxTransformer2DModel(**config, num_layers=1, num_single_layers=1, guidance_embeds=True)
    pipe = assemble("PromptedFlux", transformer=tiny.randomize(network), scheduler=scheduler, vae=vae(1))
    pipe.default_sample_size = 8
    return pipe


def build(name: str):
    if name == "pixart":
        return assemble("PromptedPixArt", **_pixart(0), vae=vae(1))
    return flux(_flux_flow() if name == "flux" else diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.fixture(autouse=True)
def classes(monkeypatch):
    for cls in (PromptedFlux, PromptedPixArt):
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)


@pytest.mark.parametrize("name", ["flux", "flux-static", "pixart"])
def test_a_plan_for_a_diffusers_pipeline(name, tmp_path):
    pipe = build(name)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, SETUP, [0])
    goal = Goal("psnr", 8.0)
    found = tune(pipe, goal, SETUP, effort=EFFORT, out=tmp_path)
    save(found, goal, tmp_path)
    assert {"solver", "fewer steps"} == {one["method"] for one in found.tried}
    assert torch.equal(draw(pipe, SETUP, [0]), plain), "nothing is left behind"
    plan = next(one for one in found.comparison.results if one.method in ("solver", "fewer steps"))
    if found.row.recipe is not None:
        assert plan.plan is not None
        with dittocache.enable(pipe, tmp_path) as cache:
            draw(pipe, SETUP, [0])
            assert cache.trace.compute_fraction < 1


def test_a_plan_where_both_halves_of_guidance_are_stepped():
    """DiTPipeline hands its scheduler twice as many latents as there are pictures."""
    pipe = assemble("DiTPipeline", **_dit(0))
    setup = replace(SETUP, conditions=(1, 2, 5), guidance_scale=3.0)
    planner = Predictors(pipe, setup, [0, 1], [2, 3])
    assert planner.inputs and len(planner.runs.latents[0]) == 8
    recipe, error = planner.made((0, 2, 5))
    better = planner.refined(recipe)[1]
    assert any(recipe.fill.inputs) and better <= error * (1 + 1e-4)
    assert error < planner.made((0,))[1]
    found = tune(pipe, Goal("psnr", 8.0), setup, effort=EFFORT)
    assert {"solver", "fewer steps"} == {one["method"] for one in found.tried}


@pytest.mark.parametrize("name", ["flux", "flux-static"])
def test_timesteps_are_those_that_the_pipeline_sets(name):
    """Not those of `set_timesteps(T)`: the pipeline passes sigmas, and a shift that depends on the size."""
    pipe = build(name)
    pipe.set_progress_bar_config(disable=True)
    found = timesteps(pipe, SETUP)
    draw(pipe, SETUP, [0])
    assert torch.equal(found, pipe.scheduler.timesteps) and len(found) == 8
    assert made_for(pipe, SETUP)["timesteps"] == pytest.approx(found.tolist(), abs=1e-3)
    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.set_timesteps(8)
    assert not torch.allclose(found, other.timesteps)
