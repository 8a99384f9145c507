"""`dittocache eval`: rows x samples as a task, what is measured, what the command writes and refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from test_features import made  # weights at random under which features differ
from typer.testing import CliRunner

from dittocache import bundled, clock
from dittocache.cli import app
from dittocache.evaluate import Comparison, compare, metrics, pipelines
from dittocache.evaluate.rows import Row, _Steps, cached, fewer, run_row, run_rows, uncached
from dittocache.evaluate.steps import step_errors
from dittocache.evaluate.task import Asked, Evaluation, asked_of, summary
from dittocache.work import run as work

STEPS, SAMPLES, BATCH = 4, 6, 2
ASKED = Asked((3, 30, 17), ("D", "4", "R"), (3, 30, 17))
ROWS = (uncached(STEPS), fewer(2), cached("fora", STEPS, interval=2), cached("none", STEPS))
METRICS = ("psnr", "ssim", "latent-error", "fd", "precision-recall", "accuracy")


def task(**changes) -> Evaluation:
    given = {"model": "glyphs", "rows": ROWS, "conditions": ASKED.conditions, "batch": BATCH, "metrics": METRICS}
    return Evaluation(**given | changes)


def evaluate(task, samples, out, asked, engine="local", workers=1, baseline=None) -> Comparison:
    return summary(task, *work(task, samples, task.batch, out, engine, workers), asked, baseline)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folder, shards, and what they say."""
    out = tmp_path_factory.mktemp("shards")
    comparison = evaluate(task(), SAMPLES, out, ASKED, baseline="2 steps")
    return *work(task(), SAMPLES, BATCH, out), comparison


# ---- rows -----------------------------------------------------------------------------------------------------------
def test_latents_are_those_that_the_scheduler_ended_with(bundled_pipe):
    found = run_row(bundled_pipe, uncached(3), [3, 5], [0, 1])
    assert np.array_equal(found.pictures, (found.latents.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy())


def test_another_scheduler_is_used_and_given_back(bundled_pipe):
    own, before = bundled_pipe.scheduler, tiny.fingerprint(bundled_pipe)
    plain = run_row(bundled_pipe, uncached(3), [3], [0])
    other = run_row(bundled_pipe, fewer(3, "DPMSolverMultistepScheduler"), [3], [0])
    assert not np.array_equal(plain.pictures, other.pictures)
    assert bundled_pipe.scheduler is own and "step" not in vars(own) and tiny.fingerprint(bundled_pipe) == before
    assert fewer(3, "DPMSolverMultistepScheduler").label == "3 steps, DPMSolverMultistep"
    assert np.array_equal(run_row(bundled_pipe, uncached(3), [3], [0]).pictures, plain.pictures)


def test_rows_take_turns_at_being_first(bundled_pipe):
    order: list[str] = []
    runs = run_rows(bundled_pipe, ROWS[:3], [3], [0], turn=4, before=lambda row: order.append(row.label))
    assert order == [ROWS[1].label, ROWS[2].label, ROWS[0].label]
    alone = run_row(bundled_pipe, ROWS[1], [3], [0])
    assert np.array_equal(runs[1].pictures, alone.pictures)  # but given in the order of the rows


def test_a_pipeline_without_callbacks(dit_folder):
    """DiTPipeline has none; and it steps both halves of guidance."""
    pipe = pipelines.load(str(dit_folder))
    rows = uncached(4), cached("fora", 4, interval=2)
    plain, found = (run_row(pipe, row, [1, 2], [0, 1], 4.0, every_step=True) for row in rows)
    assert found.latents.shape == (2, 4, 8, 8) and found.compute_fraction < 1
    assert metrics.latent_errors(found.latents, plain.latents).min() > 0
    (errors,) = step_errors(rows, [plain, found]).values()
    assert len(errors) == 4 and errors[0] == 0
    assert errors[-1] == pytest.approx(float((found.latents - plain.latents).norm() / plain.latents.norm()), rel=1e-5)


def test_a_copy_of_a_watched_scheduler_is_its_own():
    """LTX-2 draws sound with a copy."""
    scheduler, seen = FlowMatchEulerDiscreteScheduler(), []
    scheduler.set_timesteps(3)
    x, t = torch.ones(1, 4), scheduler.timesteps[0]
    with clock.observed(scheduler, _Steps(seen.append)):
        other = copy.deepcopy(scheduler)
        other.step(x, t, x)
        assert (other.step_index, scheduler.step_index, seen) == (1, None, [])
        after = scheduler.step(x, t, x).prev_sample
    assert len(seen) == 1 and seen[0] is after and scheduler.step_index == 1


def test_what_is_no_picture_is_refused(bundled_pipe, monkeypatch):
    call = type(bundled_pipe).__call__

    def flat(self, class_labels=None, guidance_scale=1.5, **kwargs):
        return (call(self, class_labels, **kwargs).images[..., 0],)

    monkeypatch.setattr(type(bundled_pipe), "__call__", flat)
    with pytest.raises(ValueError, match="GlyphsPipeline draws neither pictures nor videos: it cannot be measured"):
        run_row(bundled_pipe, uncached(2), [3], [0])


# ---- the task -------------------------------------------------------------------------------------------------------
def test_a_shard_holds_a_line_for_every_row_and_sample(shards):
    folder, plan, _ = shards
    found = folder.read(plan[1])
    assert found.table["row"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.table["sample"] == [2, 3] * 4
    assert found.arrays["pictures/2"].dtype == np.uint8 and found.arrays["pictures/2"].shape == (2, 32, 32, 1)
    assert found.arrays["features/0"].shape == (2, 64) and found.arrays["latents/3"].shape == (2, 1, 32, 32)
    assert len(found.timing["seconds"]) == 4 and found.timing["provenance"]["network"].startswith("DiT")


def test_what_computes_everything_is_equal_in_every_measure(shards):
    row = shards[2].results[3]
    assert row.psnr == math.inf and row.ssim == 1 and row.frechet == pytest.approx(0, abs=1e-9)
    assert row.scores["latent error"] == {"value": 0, "low": 0, "high": 0}
    assert row.scores["precision"]["value"] == row.scores["recall"]["value"] == 1
    assert row.compute_fraction == 1


def test_measures_are_those_of_the_pictures_themselves(shards, bundled_pipe):
    """Drawn again, each alone, and measured by hand."""
    rows = [[run_row(bundled_pipe, row, [ASKED.conditions[j % 3]], [j]) for j in range(SAMPLES)] for row in ROWS[:3]]
    wanted, *others = ([torch.from_numpy(run.pictures[0]).permute(2, 0, 1) for run in runs] for runs in rows)
    for result, pictures, runs in zip(shards[2].results[1:], others, rows[1:]):
        a, b = torch.stack(pictures), torch.stack(wanted)
        assert result.psnr == pytest.approx(metrics.psnr(a, b), abs=1e-3)
        assert result.ssim == pytest.approx(metrics.ssim(a, b), abs=1e-4)
        x, r = (torch.cat([run.latents for run in side]) for side in (runs, rows[0]))
        apart = metrics.latent_errors(x, r)
        assert result.scores["latent error"]["value"] == pytest.approx(apart.mean().item(), rel=1e-3)


def test_intervals_hold_their_values_and_differences_are_paired(shards):
    _, other, row, _ = shards[2].results
    for name in ("psnr", "ssim", "latent error", "frechet", "accuracy"):
        score = row.scores[name]
        assert score["low"] <= score["value"] <= score["high"]
        assert row.deltas[name]["value"] == pytest.approx(score["value"] - other.scores[name]["value"])
    assert row.psnr == row.scores["psnr"]["value"]
    assert other.deltas == {} and shards[2].provenance["baseline"] == "2 steps"
    assert set(shards[2].reference.scores) == {"accuracy"}


def test_speed_is_the_median_of_paired_ratios(shards):
    folder, plan, comparison = shards
    seconds = np.array([folder.read(shard).timing["seconds"] for shard in plan])
    ratios = seconds[:, 0] / seconds[:, 2]
    row = comparison.results[2]
    assert (row.speedup, row.speedup_low, row.speedup_high) == (np.median(ratios), ratios.min(), ratios.max())


def test_errors_of_steps_are_there_for_rows_with_as_many(shards):
    plain, other, row, same = shards[2].results
    assert plain.step_errors is None and other.step_errors is None
    assert len(row.step_errors) == STEPS and row.step_errors[0] == 0 and row.step_errors[-1] > 0
    assert same.step_errors == (0,) * STEPS


def test_the_same_numbers_as_the_comparison_in_one_process(shards, bundled_pipe):
    conditions = [ASKED.conditions[j % 3] for j in range(SAMPLES)]
    found = compare(bundled_pipe, ROWS, conditions, range(SAMPLES), BATCH)
    for ours, theirs in zip(shards[2].results, found.results):
        assert (ours.psnr, ours.ssim, ours.compute_fraction) == (theirs.psnr, theirs.ssim, theirs.compute_fraction)
        assert np.array_equal(shards[2].pictures[ours.label], found.pictures[ours.label])


def test_it_is_saved_and_read_like_any_comparison(shards, tmp_path):
    again = Comparison.load(shards[2].save(tmp_path))
    assert again.to_dict() == shards[2].to_dict()


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*") if path.suffix != ".json"}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "workers"), [("accelerate", 2), ("accelerate", 4), ("ray", 2)])
def test_the_same_bytes_for_any_number_of_workers(engine, workers, shards, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    evaluate(task(), SAMPLES, tmp_path, ASKED, engine, workers)
    assert shard_bytes(tmp_path) == shard_bytes(shards[0].path)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3])
def test_bytes_do_not_depend_on_threads_here(threads, shards, tmp_path):
    """They may elsewhere, so threads are part of the configuration."""
    before = torch.get_num_threads()
    try:
        found = evaluate(task(threads=threads), SAMPLES, tmp_path, ASKED)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found.results, shards[2].results):
        assert np.array_equal(found.pictures[ours.label], shards[2].pictures[theirs.label])


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(shards, tmp_path):
    given = {field.name: getattr(task(), field.name) for field in dataclasses.fields(Evaluation)}
    killed = jobs.KilledEvaluation(**given, mark=tmp_path / "mark")
    evaluate(killed, SAMPLES, tmp_path / "out", ASKED, "accelerate", 2)
    assert (tmp_path / "mark").exists()
    assert shard_bytes(tmp_path / "out") == shard_bytes(shards[0].path)


def test_the_configuration_holds_what_results_depend_on(tmp_path):
    found = task().config()
    json.dumps(found)
    for changes in (
        {"seed": 1}, {"guidance_scale": 2.0}, {"threads": 2}, {"dtype": "bfloat16"}, {"conditions": (3, 30)},
        {"rows": ROWS[:2]}, {"rows": (*ROWS[:3], fewer(3))}, {"model": "emoji"}, {"metrics": ("psnr",)},
    ):  # fmt: skip
        assert task(**changes).config() != found, changes
    other = cached("fora", STEPS, label=ROWS[2].label, interval=3)
    assert task(rows=(*ROWS[:2], other, ROWS[3])).config() != found
    assert task().config() == found


def test_other_weights_are_another_configuration(tmp_path, dit_folder):
    found = task(model=str(dit_folder), metrics=("psnr",)).config()
    pipe = pipelines.load(str(dit_folder))
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias[0] += 1
    pipe.save_pretrained(tmp_path)
    other = task(model=str(tmp_path), metrics=("psnr",)).config()
    assert other["fingerprint"] != found["fingerprint"]


def test_questions_are_spread_over_all_that_a_model_knows():
    asked = asked_of("glyphs")
    assert sorted(asked.classes) == list(range(36)) and asked.conditions == asked.classes
    gaps = np.diff(sorted(asked.classes[:6]))
    assert gaps.max() <= 10
    emoji = asked_of("emoji")
    assert sorted(emoji.names) == sorted(bundled.emoji_names())


def test_it_cannot_be_built_wrongly():
    with pytest.raises(ValueError, match="the first row is the reference"):
        task(rows=ROWS[2:])
    with pytest.raises(ValueError, match="'2 steps' occurs twice"):
        task(rows=(*ROWS, fewer(2)))
    with pytest.raises(ValueError, match="'Nope' is no scheduler of diffusers"):
        task(rows=(*ROWS, Row("x", "y", 3, scheduler="Nope")))
    with pytest.raises(ValueError, match="metric must be one of"):
        task(metrics=("beauty",))


# ---- the command ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    """A saved DiTPipeline of 1000 classes, tiny and random, with pictures of 64 pixels."""
    folder = tmp_path_factory.mktemp("dit")
    network = tiny.dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    DiTPipeline(transformer=network, vae=vae.eval(), scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


SMALL = ("--steps", 4, "--samples", 4, "--batch", 2, "--fewer", 2, "--recipe", "fora:interval=2")


def test_the_command_writes_a_folder_and_goes_on(tmp_path):
    result = command(*SMALL, "--fewer", "3:UniPCMultistepScheduler", "--recipe", "none", "--out", "found")
    assert "fora(interval=2)" in result.stdout and "3 steps, UniPCMultistep" in result.stdout
    folder = tmp_path / "found"
    assert {path.name for path in folder.iterdir()} == {
        "comparison.json", "index.html", "pictures.safetensors", "shards",
    }  # fmt: skip
    (folder / "shards" / "shard-00001.parquet").write_bytes(b"damaged")
    kept = (folder / "shards" / "shard-00000.json").stat().st_mtime_ns
    more = (*SMALL, "--fewer", "3:UniPCMultistepScheduler", "--recipe", "none", "--out", "found", "--json")
    found = json.loads(command(*more).stdout)
    assert (folder / "shards" / "shard-00000.json").stat().st_mtime_ns == kept
    rows = {row["label"]: row for row in found["results"]}
    assert rows["none"]["psnr"] == "inf"
    assert set(rows["fora(interval=2)"]["deltas"]) >= {"psnr", "ssim", "latent error", "frechet"}
    assert found["provenance"]["baseline"] == "2 steps" and found["provenance"]["samples"] == 4
    assert found["provenance"]["command"] and len(found["labels"]) == 4
    assert json.loads(json.dumps(Comparison.load(folder).to_dict()["results"])) == found["results"]
    refused = command(*SMALL, "--seed", 7, "--out", "found", code=2)
    assert (
        "holds shards of another configuration: seed is 0 there and 7 here" in refused.stderr
        and refused.stderr.count("\n") == 1
    )


def test_prompts_from_a_file_and_a_saved_recipe(tmp_path):
    cached("pab", 4).recipe.save_pretrained("my-recipe")
    Path("prompts.txt").write_text("red heart\n\ncat face\n")
    arguments = ("--recipe", "my-recipe", "--prompts", "prompts.txt", "--samples", 4, "--steps", 4, "--batch", 2)
    found = json.loads(command("emoji", *arguments, "--json").stdout)
    assert found["labels"] == ["red heart", "cat face"] * 2
    assert [row["label"] for row in found["results"]] == ["uncached", "my-recipe"]
    assert found["results"][1]["accuracy"] is None and found["results"][1]["frechet"] > 0


@pytest.mark.slow
def test_several_workers(tmp_path):
    plain = json.loads(command(*SMALL, "--out", "a", "--json").stdout)
    shared = json.loads(command(*SMALL, "--out", "b", "--workers", 2, "--json").stdout)
    for a, b in zip(plain["results"], shared["results"]):
        assert (a["psnr"], a["scores"], a["deltas"]) == (b["psnr"], b["scores"], b["deltas"])


@pytest.mark.slow
def test_the_protocol_of_imagenet(dit_folder, tmp_path):
    from dittocache.evaluate import adm, features
    from dittocache.evaluate.inception import Inception

    torch.save(made(Inception()), "weights.pth")
    levels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    np.savez("reference.npz", levels)
    arguments = (dit_folder, "--adm", "reference.npz", "--weights", "inception=weights.pth", "--fewer", 2)
    found = json.loads(command(*arguments, "--steps", 3, "--samples", 5, "--batch", 2, "--out", "o", "--json").stdout)
    assert found["labels"] == ["0", "1", "2", "3", "4"]
    inception = features.load("inception", {"inception": "weights.pth"})
    reference = adm.read_reference("reference.npz", inception)
    assert adm.count_pictures("o/samples-0-uncached.npz") == adm.count_pictures("o/samples-1-2-steps.npz") == 5
    wanted = adm.evaluate(adm.gather(adm.pictures("o/samples-1-2-steps.npz"), inception), reference)
    scores = {name: score["value"] for name, score in found["results"][1]["scores"].items()}
    assert scores["fid"] == pytest.approx(wanted.fid, rel=1e-3)
    assert scores["sfid"] == pytest.approx(wanted.sfid, rel=1e-3)
    assert scores["inception score"] == pytest.approx(wanted.inception_score, rel=1e-4)
    assert (scores["precision"], scores["recall"]) == (wanted.precision, wanted.recall)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples"),
        (["--samples", "1"], "--samples"),
        (["nope"], "unknown bundled model 'nope'"),
        (["--metric", "beauty"], "metric must be one of psnr, ssim, latent-error"),
        (["--metric", "lpips"], "lpips: no weights at"),
        (["--metric", "clip"], "clip: no weights at"),
        (["--space", "inception", "--metric", "accuracy"], "accuracy is what a judge reads"),
        (["--metric", "fd", "--space", "inception"], "inception: no weights at"),
        (["--metric", "precision-recall", "--samples", "3"], "precision-recall needs more than 3 samples; got 3"),
        (["--metric", "accuracy", "--condition", "3"], "accuracy needs a bundled model's own questions"),
        (["--weights", "beauty=x"], "unknown metric 'beauty'"),
        (["--weights", "lpips"], "a parameter is NAME=VALUE, not 'lpips'"),
        (["--recipe", "nope"], "unknown method 'nope'"),
        (["--recipe", "fora:speed=2"], "fora has no parameter 'speed'"),
        (["--recipe", "fora", "--recipe", "fora"], "'fora' occurs twice"),
        (["--fewer", "many"], "--fewer is STEPS or STEPS:SCHEDULER, such as 25; got 'many'"),
        (["--fewer", "50"], "--fewer 50 is what --steps 50 says"),
        (["--fewer", "20:Nope"], "'Nope' is no scheduler of diffusers"),
        (["--baseline", "nope"], "baseline must be one of uncached"),
        (["--engine", "cluster"], "engine must be one of local, accelerate, ray"),
        (["--engine", "local", "--workers", "2"], "the engine local is one worker"),
        (["--worker", "num_cpus=1"], "--worker goes with --engine ray"),
        (["--address", "auto"], "--address goes with --engine ray"),
        (["--engine", "ray", "--worker", "num_cpus=1", "--workers", "2"], "give one of them"),
        (["--condition", "A"], "glyphs draws classes: give their numbers, not 'A'"),
        (["--condition", "1", "--prompts", "file"], "give one"),
        (["--random-labels"], "give one"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "file"], "holds no prompts"),
        (["--adm", "reference.npz"], "--adm is for models of 1000 classes; glyphs has 36"),
        (["--dtype", "int8"], "dtype must be one of float32"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--out", "file"], "file"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_drawn(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("DITTOCACHE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    result = command(*arguments, code=2)
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "dittocache-eval" / "comparison.json").exists()
    assert not list(tmp_path.rglob("shard-*.json"))


def test_help_has_examples():
    assert "Examples" in command("--help").stdout
