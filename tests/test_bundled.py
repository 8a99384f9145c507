"""The bundled model: drawing, inputs, stored figures. Everything here runs in seconds on one core."""

from __future__ import annotations

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dittocache import bundled
from dittocache.bundled import build, data, judge, report, train
from dittocache.bundled.pipeline import GlyphsPipeline
from dittocache.evaluate.metrics import frechet_distance


@pytest.fixture(scope="module")
def pipe():
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def draw(pipe, labels="AB7", steps=3, **settings):
    settings.setdefault("generator", seeds(*range(len(labels))))
    return pipe(labels, num_inference_steps=steps, output_type="pt", **settings).images


# --- loading -----------------------------------------------------------------------------------------------------


def test_names_and_unknown_name():
    assert "glyphs" in bundled.names()
    with pytest.raises(ValueError, match=r"'glyph'.*known: .*glyphs"):
        bundled.load("glyph")


def test_loads_in_the_asked_precision(pipe):
    assert pipe.transformer.dtype == torch.float32 and not pipe.transformer.training
    half = bundled.load("glyphs", torch_dtype=torch.bfloat16, device="cpu")
    assert half.transformer.dtype == torch.bfloat16
    half.set_progress_bar_config(disable=True)
    images = draw(half)
    assert images.isfinite().all() and (images - draw(pipe)).abs().mean() < 0.05


def test_shipped_files_are_small_and_free_of_pickles():
    folder = bundled.folder("glyphs")
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    assert sum(p.stat().st_size for p in files) < 8e6
    assert {"model_index.json", "judge.safetensors", "ATTRIBUTION.md", "README.md"} <= {p.name for p in files}


def test_save_pretrained_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = GlyphsPipeline.from_pretrained(str(tmp_path), low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


# --- drawing -----------------------------------------------------------------------------------------------------


def test_output_types(pipe):
    arguments = {"num_inference_steps": 2, "class_labels": "AB"}
    as_pt, as_np, as_pil = (
        pipe(**arguments, generator=seeds(0, 1), output_type=kind).images for kind in ("pt", "np", "pil")
    )
    assert as_pt.shape == (2, 1, 32, 32) and as_pt.min() >= 0 and as_pt.max() <= 1
    assert as_np.shape == (2, 32, 32, 1)
    np.testing.assert_array_equal(as_np[..., 0], as_pt[:, 0].numpy())
    assert all(isinstance(p, Image.Image) and p.mode == "L" and p.size == (32, 32) for p in as_pil)
    assert isinstance(pipe(**arguments, return_dict=False), tuple)


def test_same_seed_same_picture_and_other_seed_another(pipe):
    one = draw(pipe, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, draw(pipe, generator=torch.Generator().manual_seed(5)))
    assert not torch.allclose(one, draw(pipe, generator=torch.Generator().manual_seed(6)), atol=1e-2)
    assert draw(pipe, generator=None).shape == one.shape


def test_with_a_generator_each_pictures_are_independent_of_their_batch(pipe):
    together = draw(pipe, "ABC", generator=seeds(3, 4, 5))
    alone = draw(pipe, "C", generator=seeds(5))
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=0)


def test_labels_as_numbers_characters_and_tensors(pipe):
    assert pipe.get_label_ids("A0") == [0, 26]
    assert pipe.get_label_ids(["B", 5, np.int64(35)]) == [1, 5, 35]
    assert pipe.get_label_ids(torch.tensor([1, 2])) == [1, 2]
    assert pipe.get_label_ids(7) == [7]
    assert pipe.null_label == 36


def test_guidance_is_one_call_with_the_conditional_half_first(pipe):
    calls = []

    def watch(module, args, kwargs):
        calls.append((args[0].shape[0], kwargs["class_labels"].tolist()))

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        draw(pipe, "AB", steps=2, guidance_scale=1.5)
        draw(pipe, "AB", steps=2, guidance_scale=1.0)
    finally:
        handle.remove()
    assert calls == [(4, [0, 1, 36, 36])] * 2 + [(2, [0, 1])] * 2


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"],
)
def test_other_schedulers(name):
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    reference = draw(pipe, steps=8)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = draw(pipe, steps=8)
    assert torch.equal(images, draw(pipe, steps=8)), "the generators must determine the picture"
    if name != "DDPMScheduler":  # that one is stochastic: another picture
        assert (images - reference).abs().mean() < 0.1


def test_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def blank(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.ones_like(tensors["latents"])}

    images = draw(pipe, "A", steps=4, callback_on_step_end=blank)
    assert [s for s, _ in seen] == [0, 1, 2, 3] and seen[0][1] == 999 and (images == 1).all()
    with pytest.raises(ValueError, match=r"'prompt'.*'latents'"):
        draw(pipe, "A", callback_on_step_end=blank, callback_on_step_end_tensor_inputs=["prompt"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [36]}, "36; valid are integers 0 to 35"),
        ({"class_labels": [-1]}, "-1; valid are integers 0 to 35"),
        ({"class_labels": ["a"]}, "'a'; valid"),
        ({"class_labels": ["AB"]}, "'AB'; valid"),
        ({"class_labels": [1.5]}, "1.5; valid"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": "AB", "generator": seeds(0)}, "1 generators were given for 2 pictures"),
        ({"class_labels": "A", "num_inference_steps": 0}, "num_inference_steps is 0.*at least 1"),
        ({"class_labels": "A", "num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"class_labels": "A", "guidance_scale": float("nan")}, "guidance_scale is nan.*finite"),
        ({"class_labels": "A", "output_type": "jpg"}, "output_type is 'jpg'; valid are 'pil', 'np', 'pt'"),
    ],
)
def test_bad_inputs_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


# --- quality, as shipped -----------------------------------------------------------------------------------------


def test_the_judge_reads_a_handful_of_pictures(pipe):
    labels = "ABEGKMRSWXZ2345789"
    read, features = judge.read(judge.load_judge(), draw(pipe, labels, steps=20))
    assert features.shape == (len(labels), judge.FEATURES)
    assert sum(data.CHARACTERS[i] == c for i, c in zip(read.tolist(), labels)) >= len(labels) - 1


def test_reference_figures():
    reference = json.loads((bundled.folder("glyphs") / "reference.json").read_text())
    assert reference["accuracy"] >= 0.95
    assert reference["judge_accuracy_held_out"] >= 0.95
    distances = reference["nearest_training_picture_rms"]
    # A model that repeats training pictures would be far nearer to them than their own variants are to each other.
    assert distances["drawn"]["median"] > 0.5 * distances["train_to_another"]["median"]
    moments = judge.load_reference()
    assert moments["held_out.covariance"].shape == (judge.FEATURES, judge.FEATURES)
    held_out, trained = ((moments[f"{n}.mean"], moments[f"{n}.covariance"]) for n in ("held_out", "train"))
    floor = frechet_distance(trained, held_out)
    assert floor == pytest.approx(reference["frechet"]["floor_train_to_held_out"], rel=1e-3)
    assert frechet_distance(trained, trained) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    mean, eye = torch.zeros(3), torch.eye(3)
    assert frechet_distance((mean, eye), (mean + 2, 4 * eye)) == pytest.approx(3 * 4 + 3 * (1 + 4 - 4))


def test_attribution_names_every_package_and_no_gpl():
    folder = bundled.folder("glyphs")
    described = json.loads((folder / "data.json").read_text())
    text = (folder / "ATTRIBUTION.md").read_text()
    assert all(p in text for p, faces in described["faces_per_package"].items() if faces)
    assert "GPL" not in text and described["train_pictures"] > 40_000


# --- how it was made ---------------------------------------------------------------------------------------------


def test_stored_weights_are_the_described_network(pipe):
    fresh = train.new_transformer()
    assert fresh.config.num_layers == 8 and sum(p.numel() for p in fresh.parameters()) == 2_845_072
    fresh.load_state_dict(pipe.transformer.state_dict())
    scheduler = train.new_scheduler()
    assert scheduler.config.prediction_type == pipe.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)


def test_new_transformer_starts_as_the_zero_function():
    output = train.new_transformer()(torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), torch.tensor([0, 36])).sample
    assert not output.any()


def test_learning_rate_schedule():
    rates = [train.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] < rates[199] == pytest.approx(train.LEARNING_RATE) == pytest.approx(rates[599])
    assert rates[-1] == pytest.approx(train.FINAL_RATE * train.LEARNING_RATE, rel=0.2)


@pytest.mark.slow
def test_training_resumes_exactly(tmp_path):
    rng = np.random.default_rng(0)
    split = data.Split(rng.integers(0, 256, (130, 32, 32), dtype=np.uint8), np.arange(130) % 36)
    settings = {"precision": "fp32", "save_every": 1e9}
    # The total is part of the learning rate, so both runs are told the same one; the first is stopped by force.
    whole = train.train(split, tmp_path / "whole.safetensors", images=4 * train.BATCH, **settings)

    class Stop(Exception):
        pass

    def stop(model, state):
        if state["step"] == 2:
            raise Stop

    path = tmp_path / "parts.safetensors"
    with pytest.raises(Stop):
        train.train(split, path, images=4 * train.BATCH, precision="fp32", save_every=0, on_save=stop)
    assert train.load_average(path)[1]["step"] == 2
    resumed = train.train(split, path, images=4 * train.BATCH, **settings)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_export_then_load(tmp_path):
    train.export(train.new_transformer(), tmp_path)
    pipe = GlyphsPipeline.from_pretrained(str(tmp_path), low_cpu_mem_usage=False)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert not list(tmp_path.glob(".export-*"))


def test_warped_glyphs_are_dark_on_white():
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (40, 20, 90, 110))
    picture = data.warp(mask, np.random.default_rng(0))
    assert picture.shape == (32, 32) and picture.dtype == np.uint8
    assert picture[0, 0] == 255 and picture[16, 16] == 0
    assert data.to_model_range(picture[None]).max() == 1.0


def test_data_needs_debian_tools(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DITTOCACHE_CACHE", str(tmp_path))
    monkeypatch.setattr(data.shutil, "which", lambda tool: None)
    assert build.main(["--stage", "data", "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert "apt-get was not found" in capsys.readouterr().err
    assert build.main(["--stage", "train", "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert "--stage data" in capsys.readouterr().err


def test_build_rejects_bad_numbers(capsys):
    with pytest.raises(SystemExit):
        build.main(["--images", "0"])
    assert "--images is 0" in capsys.readouterr().err


def test_nearest_training_picture():
    real = torch.rand(40, 1, 32, 32)
    assert report.nearest(real[:3], real).max() < 0.01
    assert report.nearest(real[:3], real, skip_self=True).min() > 0.3
    assert report.nearest(real[:1] * 0 + 2, real * 0)[0] == pytest.approx(2.0)


def test_call_signature_is_that_of_a_diffusers_pipeline():
    names = list(inspect.signature(GlyphsPipeline.__call__).parameters)[1:]
    assert names[:5] == ["class_labels", "num_inference_steps", "guidance_scale", "generator", "output_type"]
