"""Videos are measured like pictures: real pipelines of diffusers, tiny and random, but for their text encoders."""

from __future__ import annotations

import json
import math
from typing import ClassVar

import diffusers
import numpy as np
import pytest
import tiny
import torch
from pipelines.stubs import assemble, embed, mask
from pipelines.videos import TEXT, WIDTH, _ltx, _ltx_vae, _unipc, _wan, _wan_vae
from typer.testing import CliRunner

from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.cli import app
from dittocache.evaluate import Comparison, metrics, write_page
from dittocache.evaluate.compare import compare
from dittocache.evaluate.measure import Instruments, measure, middle, uint8
from dittocache.evaluate.rows import Run, cached, fewer, own_guidance, run_row, uncached
from dittocache.tune import Effort, Goal, Predictors, tune

PROMPTS = ["a cat", "two dogs"]


class PromptedWan(diffusers.WanPipeline):
    """Without its text encoder: prompts are made numbers by their letters. 5 frames of 32 pixels."""

    _optional_components: ClassVar = [*diffusers.WanPipeline._optional_components, "text_encoder", "tokenizer"]

    def encode_prompt(self, prompt, *args, **kwargs):
        return embed(prompt, TEXT, WIDTH), embed([""] * len(prompt), TEXT, WIDTH)

    def __call__(self, prompt=None, guidance_scale=3.0, **kwargs):
        return super().__call__(prompt, height=32, width=32, num_frames=5, guidance_scale=guidance_scale, **kwargs)


class PromptedLtx(diffusers.LTXPipeline):
    """17 frames of 64 pixels."""

    def encode_prompt(self, prompt, *args, **kwargs):
        empty = [""] * len(prompt)
        return embed(prompt, TEXT, WIDTH), mask(prompt, TEXT), embed(empty, TEXT, WIDTH), mask(empty, TEXT)

    def __call__(self, prompt=None, guidance_scale=3.0, **kwargs):
        return super().__call__(prompt, height=64, width=64, num_frames=17, guidance_scale=guidance_scale, **kwargs)


class Unguided(PromptedWan):
    """Like HunyuanVideo 1.5, it takes no strength of guidance."""

    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt, **kwargs)


@pytest.fixture(autouse=True)
def classes(monkeypatch):
    for cls in (PromptedWan, PromptedLtx, Unguided):
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)


def wan(cls="PromptedWan", **more):
    return assemble(cls, transformer=_wan(0), vae=_wan_vae(1), scheduler=_unipc(3.0), **more)


@pytest.fixture(scope="module", params=["wan", "wan-2.2", "ltx"])
def video_pipe(request):
    with pytest.MonkeyPatch.context() as patch:
        for cls in (PromptedWan, PromptedLtx):
            patch.setattr(diffusers, cls.__name__, cls, raising=False)
        if request.param == "ltx":
            return assemble("PromptedLtx", **_ltx(0), vae=_ltx_vae(1))
        return wan() if request.param == "wan" else wan(transformer_2=_wan(2), boundary_ratio=0.875)


def test_videos_are_drawn_and_measured(video_pipe):
    rows = (uncached(8), cached("fora", 8, interval=2), cached("none", 8))
    plain, found, same = (run_row(video_pipe, row, PROMPTS, [0, 1], every_step=True) for row in rows)
    assert plain.pictures.ndim == 5 and plain.pictures.shape[0] == 2 and plain.pictures.shape[1] in (5, 17)
    assert len(plain.path) == 8 and len(plain.latents) == 2
    assert np.array_equal(same.pictures, plain.pictures) and found.compute_fraction < 1
    alone = run_row(video_pipe, rows[0], PROMPTS[1:], [1])
    assert np.allclose(alone.pictures[0], plain.pictures[1], atol=1e-4), "a video does not depend on its neighbours"

    batch = measure(rows, [plain, found, same], [0, 1], PROMPTS, Instruments())
    apart = np.square(found.pictures.astype(float) - plain.pictures).mean((1, 2, 3, 4))
    assert batch.table["squared error"][2:4] == pytest.approx(apart) and min(apart) > 0
    assert batch.table["ssim"][:2] == batch.table["ssim"][4:] == [1, 1]
    frames = [torch.from_numpy(run.pictures[1]).permute(0, 3, 1, 2) for run in (found, plain)]
    assert batch.table["ssim"][3] == pytest.approx(metrics.ssims(*frames).mean().item(), rel=1e-5)
    middle_frame = plain.pictures.shape[1] // 2
    assert np.array_equal(batch.arrays["pictures/0"], uint8(plain.pictures[:, middle_frame]))
    assert batch.facts["frames"] == plain.pictures.shape[1]


def test_networks_look_at_the_middle_frame():
    videos = np.random.default_rng(0).random((2, 5, 16, 16, 3), dtype=np.float32)
    seen = []

    def look(pictures):
        seen.append(pictures)
        return {"features": pictures.flatten(1), "probabilities": pictures.flatten(1)}

    run = Run(videos, (torch.zeros(2, 4),), 1.0)
    measure([uncached(4)], [run], [0, 1], PROMPTS, Instruments(look=look))
    assert np.array_equal(seen[0].permute(0, 2, 3, 1).numpy(), videos[:, 2])
    assert np.array_equal(middle(videos[:, 0]), videos[:, 0]), "a picture is its own"


def test_samples_to_calibrate_from(video_pipe):
    setup = Setup(num_steps=3, guidance_scale=3.0, seed=0, conditions=tuple(PROMPTS))
    drawn = draw(video_pipe, setup, [0, 1])
    wanted = run_row(video_pipe, uncached(3), PROMPTS, [0, 1], 3.0)
    assert np.array_equal(drawn.permute(0, 1, 3, 4, 2).numpy(), wanted.pictures)


def test_the_page_of_a_comparison(tmp_path):
    rows = [uncached(4), fewer(3), cached("fora", 4, interval=2)]
    found = compare(wan(), rows, PROMPTS, [0, 1], chunk=2)
    page = write_page(Comparison.load(found.save(tmp_path)), tmp_path / "index.html").read_text()
    assert found.provenance["frames"] == 5 and found.provenance["guidance_scale"] == 3.0
    assert found.pictures["uncached"].shape == (2, 32, 32, 3)
    row = found.results[2]
    assert math.isfinite(row.psnr) and row.ssim < 1
    assert len(row.step_errors) == 4 and row.step_errors[0] == 0 < row.step_errors[-1]
    assert "relative error" in page and row.label in page


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wan().save_pretrained("wan")
    arguments = ["eval", "wan", "--condition", "a cat", "--condition", "two dogs", "--recipe", "fora:interval=2"]
    sizes = ["--steps", "4", "--samples", "2", "--batch", "2", "--out", "found", "--json"]
    result = CliRunner().invoke(app, arguments + sizes)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["results"][1]
    assert 0 < row["psnr"] < 100 and row["compute_fraction"] < 1 and len(row["step_errors"]) == 4
    assert (tmp_path / "found" / "index.html").stat().st_size > 10_000


def test_a_pipeline_that_takes_no_strength_of_guidance():
    pipe = wan("Unguided")
    assert own_guidance(pipe) == 1
    plain = run_row(pipe, uncached(2), PROMPTS, [0, 1])
    assert np.array_equal(run_row(pipe, uncached(2), PROMPTS, [0, 1], 1).pictures, plain.pictures)
    before = tiny.fingerprint(pipe)
    with pytest.raises(ValueError, match=r"Unguided takes no guidance_scale: it must be 1 there; got 4\.5"):
        run_row(pipe, uncached(2), PROMPTS, [0, 1], 4.5)
    assert tiny.fingerprint(pipe) == before
    setup = Setup(num_steps=2, guidance_scale=1, seed=0, conditions=tuple(PROMPTS))
    assert np.array_equal(draw(pipe, setup, [0, 1]).permute(0, 1, 3, 4, 2).numpy(), plain.pictures)


# ---- tuning ---------------------------------------------------------------------------------------------------------
def test_a_plan_for_videos(tmp_path):
    pipe = wan()
    setup = Setup(num_steps=8, guidance_scale=3.0, seed=3, conditions=tuple(PROMPTS))
    effort = Effort(samples=2, trial=2, judged=2, held_out=2, batch=2, tries=2, methods=0)
    found = tune(pipe, Goal("psnr", 8.0), setup, effort=effort, out=tmp_path)
    assert {"solver", "fewer steps"} == {one["method"] for one in found.tried} and found.met
    planner = Predictors(pipe, setup, [0], [1])
    assert planner.inputs, "latents of videos are what the network sees"
    recipe, error = planner.made((0, 2, 5))
    assert error < planner.made((0,))[1] and any(recipe.fill.inputs)


def test_two_transformers_are_not_planned_for():
    pipe = wan(transformer_2=_wan(2), boundary_ratio=0.875)
    setup = Setup(num_steps=8, guidance_scale=3.0, conditions=tuple(PROMPTS))
    for work in (lambda: tune(pipe, Goal("psnr", 8.0), setup), lambda: Predictors(pipe, setup, [0], [1])):
        with pytest.raises(ValueError, match="PromptedWan has two transformers that take turns"):
            work()
