"""L2C training: the objective against plain autograd, draws, files, going on after a kill, several processes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import dittocache
from dittocache.cli import app
from dittocache.models.uvit import UViT
from dittocache.train import (
    Data,
    Objective,
    OuterSteps,
    Pairs,
    Settings,
    class_conditional,
    loop,
    train_l2c,
    train_router,
)

STEPS = 6
FAST = {"num_steps": STEPS, "samples": 6, "batch_size": 4, "iterations": 6, "learning_rate": 0.1, "penalty": 1e-4}
FILES = {"README.md", "recipe.json", "recipe.safetensors", "training.safetensors", "samples.safetensors"}


@pytest.fixture
def network():
    return tiny.dit()


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return Data(torch.randn(9, 4, 8, 8, generator=g), torch.arange(9), 10)


def walk_of(num_steps: int = STEPS, **config) -> Pairs:
    return Pairs.of(diffusers.DDIMScheduler(clip_sample=False, **config), num_steps)


def logits_of(walk, sites: int, seed: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(sites, generator=g).requires_grad_() for _ in range(walk.rows)]


def terms_of(network, walk, logits, row, data, **options):
    rows = torch.full((3,), row) if isinstance(row, int) else torch.tensor(row)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with Objective(network, class_conditional(network)[0]) as objective:
        return objective(walk, logits, rows, data.x0[:3], noise, data.conditions[:3], penalty=1e-3, **options), noise


# ---- the objective --------------------------------------------------------------------------------------------------
def plain_loss(network, walk, row, x0, noise, labels, logits, threshold):
    """The objective written again, with patched forwards instead of the library's hooks."""
    k = walk.rows - 2 - row
    a, s, a1, s1 = (float(v) for v in (walk.alpha[k], walk.sigma[k], walk.alpha[k + 1], walk.sigma[k + 1]))
    modules = [m for block in network.transformer_blocks for m in (block.attn1, block.ff)]
    kept: list[torch.Tensor] = []

    def call(x, k):
        t = walk.timesteps[k].expand(len(x))
        return network(x, timestep=t, class_labels=labels, return_dict=False)[0]

    def patched(change, x, k):
        for j, m in enumerate(modules):
            m.forward = functools.partial(lambda j, old, *i, **o: change(j, old(*i, **o)), j, m.forward)
        try:
            return call(x, k)
        finally:
            for m in modules:
                del m.forward

    x = a * x0 + s * noise
    with torch.no_grad():
        eps = patched(lambda j, f: kept.append(f) or f, x, k)
        x = a1 * (x - s * eps) / a + s1 * eps
        teacher = call(x, k + 1)
    soft = logits.sigmoid()
    beta = soft if threshold is None else (soft > threshold).float() + soft - soft.detach()
    student = patched(lambda j, f: beta[j] * f + (1 - beta[j]) * kept[j], x, k + 1)
    return (teacher - student).square().mean() + 1e-3 * soft.sum()


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_the_gradient_is_that_of_plain_autograd(network, data, threshold):
    walk = walk_of()
    logits = logits_of(walk, 6)
    terms, noise = terms_of(network, walk, logits, 2, data, threshold=threshold)
    terms.loss.backward()
    again = logits[2].detach().clone().requires_grad_()
    frozen = network.requires_grad_(False)
    loss = plain_loss(frozen, walk, 2, data.x0[:3], noise, data.conditions[:3], again, threshold)
    loss.backward()
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert tiny.relative(logits[2].grad, again.grad) < 1e-5
    assert [n for n, row in enumerate(logits) if row.grad is not None] == [2]
    assert terms.data.shape == terms.penalty.shape == (3,) and terms.loss.requires_grad


def test_computing_all_is_the_teacher_and_reusing_all_is_not(network, data):
    walk = walk_of()
    for value, threshold in ((0.0, 0.4), (0.0, 0.5)):  # sigmoid(0) = 0.5 is not above 0.5
        logits = [torch.full((6,), value) for _ in range(STEPS)]
        terms, _ = terms_of(network, walk, logits, 0, data, threshold=threshold)
        assert torch.equal(terms.teacher, terms.student) is (threshold == 0.4)


def test_rows_of_several_steps_in_a_batch_are_those_of_single_ones(network, data):
    walk = walk_of()
    logits = logits_of(walk, 6)
    together, _ = terms_of(network, walk, logits, [0, 4, 2], data)
    for n, row in enumerate((0, 4, 2)):
        alone, _ = terms_of(network, walk, logits, row, data)
        assert together.data[n].item() == pytest.approx(alone.data[n].item(), rel=1e-5)
        assert together.penalty[n].item() == pytest.approx(alone.penalty[n].item(), rel=1e-6)
    weights = torch.tensor([2.0, 0, 0, 0, 1.0, 0])
    weighted, _ = terms_of(network, walk, logits, [0, 4, 2], data, weights=weights)
    wanted = (weights[[0, 4, 2]] * together.data + 1e-3 * together.penalty).mean()
    assert weighted.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_network_is_frozen_inside_and_as_it_was_afterwards(network, data):
    network.train()
    network.pos_embed.proj.weight.requires_grad_(False)
    before, state = tiny.fingerprint(network), {n: p.clone() for n, p in network.state_dict().items()}
    wanted = [p.requires_grad for p in network.parameters()]
    predict, _ = class_conditional(network)
    with Objective(network, predict) as objective:
        assert not any(p.requires_grad for p in network.parameters()) and not network.training
        assert objective.columns == 6
    trained = train_router(network, predict, walk_of(), data, Settings(iterations=2, batch_size=2))
    assert trained.iteration == 2
    assert [p.requires_grad for p in network.parameters()] == wanted and network.training
    assert all(torch.equal(p, state[n]) for n, p in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert tiny.fingerprint(network) == before and not tiny.traces_of_cache(network)


def test_an_error_inside_leaves_nothing_behind(network):
    with pytest.raises(RuntimeError, match="broken"), Objective(network, lambda *a: network(*a)):
        raise RuntimeError("broken")
    assert not tiny.traces_of_cache(network)


def test_uvit_trains_the_start_of_outer_steps(data):
    network = tiny.randomize(UViT(8, 2, 4, 16, 2, 2, num_classes=11))
    predict, null = class_conditional(network)
    assert null == 10
    settings = Settings(iterations=8, batch_size=2, penalty=0.1)
    trained = train_router(network, predict, OuterSteps(6), data, settings)
    start = loop.Training(OuterSteps(6), 6, settings, {}, "cpu").table
    changed = (trained.table != start).any(1).tolist()
    assert changed == [False, True, True] and trained.table.shape == (3, 6)
    with pytest.raises(ValueError, match="per_sample"):
        train_router(network, predict, OuterSteps(6), data, Settings(per_sample=True))


def test_other_networks_are_told_what_to_pass():
    with pytest.raises(ValueError, match=r"PixArtTransformer2DModel .* train_router with a function predict"):
        class_conditional(tiny.pixart())
    with pytest.raises(ValueError, match="Linear"):
        class_conditional(nn.Linear(2, 2))


# ---- steps and draws ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("steps", "trained"), [(2, [0]), (5, [0, 2]), (6, [0, 2, 4]), (20, list(range(0, 20, 2)))])
def test_rows_that_are_trained_are_those_that_are_read(steps, trained):
    walk = walk_of(steps)
    assert list(walk.trained) == trained
    read = []
    sites = dittocache.describe(tiny.dit()).sites[:6]
    for row in range(steps):
        logits = torch.full((steps, 6), 5.0)
        logits[row] = -5.0
        when = dittocache.recipe("l2c", router_logits=logits).when
        read += [row] * bool((when.table(steps, sites) == 0).any())
    assert read == trained


SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddim-v": functools.partial(diffusers.DDIMScheduler, prediction_type="v_prediction"),
    "ddim-sample": functools.partial(diffusers.DDIMScheduler, prediction_type="sample"),
    "ddpm": diffusers.DDPMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_gives_its_own_levels(name, network, data):
    """The noisy input is what `add_noise` (or `scale_noise`), scaled as the sampler scales it, makes of the sample."""
    scheduler = SCHEDULERS[name]()
    walk = Pairs.of(scheduler, STEPS)
    assert getattr(scheduler, "num_inference_steps", None) is None  # left as it was
    scheduler.set_timesteps(STEPS)
    x0, noise = data.x0[:2], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for row in walk.trained:
        t = scheduler.timesteps[STEPS - 2 - row]
        add = getattr(scheduler, "scale_noise", None)
        if hasattr(scheduler, "set_begin_index"):
            scheduler._step_index = scheduler._begin_index = None
        noisy = add(x0, t[None], noise) if add else scheduler.add_noise(x0, noise, t.expand(2))
        if hasattr(scheduler, "scale_model_input"):
            noisy = scheduler.scale_model_input(noisy, t)
        found = walk.start(torch.full((2,), row), x0, noise)
        assert tiny.relative(found, noisy) < 2e-3, row
    settings = Settings(iterations=3, batch_size=2, per_sample=True)
    trained = train_router(network, class_conditional(network)[0], walk, data, settings)
    assert trained.loss is not None and trained.loss > 0


def test_draws_depend_on_seed_iteration_and_process_only(data):
    def one(iteration=0, rank=0, **settings):
        return loop.draw(Settings(batch_size=40, label_dropout=0.3, **settings), (0, 2, 4), data, iteration, rank)

    first = one()
    assert all(torch.equal(a, b) for a, b in zip(first, one()))
    for other in (one(1), one(rank=1), one(seed=1)):
        assert not torch.equal(first.noise, other.noise)
    assert len(first.rows.unique()) == 1 and 3 < int(first.dropped.sum()) < 25
    spread = one(per_sample=True).rows.bincount()
    assert spread[[0, 2, 4]].tolist() in ([14, 13, 13], [13, 14, 13], [13, 13, 14])
    assert not loop.draw(Settings(label_dropout=0.0), (0,), data, 0, 0).dropped.any()
    assert not loop.draw(Settings(label_dropout=1.0), (0,), data._replace(null=None), 0, 0).dropped.any()


def test_dropped_labels_are_null_in_all_forwards(network, data):
    seen = []
    predict, null = class_conditional(network)

    def watched(x, t, labels):
        seen.append(labels)
        return predict(x, t, labels)

    train_router(network, watched, walk_of(), data, Settings(iterations=1, batch_size=8, label_dropout=0.5))
    assert len(seen) == 3 and all(torch.equal(seen[0], labels) for labels in seen)
    assert 0 < int((seen[0] == null).sum()) < 8 and data.conditions.max() < null  # the data are left as they are


def test_only_drawn_rows_change_and_logits_stay_within_the_clamp(network, data):
    walk, predict = walk_of(), class_conditional(network)[0]
    settings = Settings(iterations=1, batch_size=2, learning_rate=50.0, penalty=1.0)
    start = loop.Training(walk, 6, settings, {}, "cpu").table
    trained = train_router(network, predict, walk, data, settings)
    drawn = int(loop.draw(settings, walk.trained, data, 0, 0).rows[0])
    assert (trained.table != start).any(1).nonzero().flatten().tolist() == [drawn]
    assert trained.table[drawn].abs().max() == 5
    assert [bool(trained.optimizer.state.get(p)) for p in trained.logits] == [n == drawn for n in range(STEPS)]


def test_a_penalty_removes_and_none_keeps(network, data):
    predict = class_conditional(network)[0]
    fast = {"iterations": 60, "batch_size": 6, "learning_rate": 0.3, "per_sample": True}
    removed = [
        train_router(network, predict, walk_of(), data, Settings(penalty=p, **fast)).removed for p in (0.0, 10.0)
    ]
    assert removed == [0.0, 1.0]


def test_patience_ends_the_training(network, data):
    predict = class_conditional(network)[0]
    settings = Settings(iterations=200, batch_size=3, learning_rate=0.3, penalty=10.0, per_sample=True, patience=8)
    trained = train_router(network, predict, walk_of(), data, settings)
    assert trained.iteration < 100 and trained.unchanged == 8 and trained.removed == 1


def test_a_loss_that_is_not_finite_is_an_error(network, data):
    bad = data._replace(x0=data.x0 * float("inf"))
    with pytest.raises(ValueError, match="loss of iteration 0 is nan"):
        train_router(network, class_conditional(network)[0], walk_of(), bad, Settings(iterations=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("iterations", 0), ("batch_size", 0), ("learning_rate", -1), ("penalty", float("nan")), ("threshold", 2)]
    + [("label_dropout", 1.5), ("seed", -1), ("patience", 0), ("checkpoint_every", 0), ("hard", 1), ("per_sample", "")],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})


# ---- from a pipeline to a recipe ------------------------------------------------------------------------------------
def test_the_recipe_is_saved_and_is_for_this_model_only(pipe, tmp_path):
    before, told = tiny.fingerprint(pipe), []
    recipe = train_l2c(pipe, tmp_path / "out", **FAST, progress=lambda *a: told.append(a))
    assert tiny.fingerprint(pipe) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert told[0] == (6, 6, "samples") and told[-1][:2] == (6, 6) and "removed" in told[-1][2]
    saved = dittocache.Recipe.from_pretrained(tmp_path / "out")
    assert saved == recipe and saved.method == "l2c"
    assert saved.provenance["iterations"] == 6 and saved.provenance["settings"]["penalty"] == 1e-4
    with dittocache.enable(pipe, str(tmp_path / "out")) as cache, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped nothing")
        tiny.draw(pipe, STEPS)
        table = torch.tensor(cache.trace.table)
        assert bool((table[[0, 2, 4]] == 1).all())
        assert 1 - float(table[1::2].mean()) == pytest.approx(saved.provenance["removed"], abs=1e-6)
        with pytest.raises(ValueError, match="made for 6 steps"):
            tiny.draw(pipe, 8)
    with pytest.raises(ValueError, match="other weights"):
        dittocache.enable(tiny.pipeline(seed=1), str(tmp_path / "out"))


def test_a_finished_training_returns_at_once_and_more_iterations_go_on(pipe, tmp_path, monkeypatch):
    first = train_l2c(pipe, tmp_path, **FAST)
    longer = train_l2c(pipe, tmp_path, **FAST | {"iterations": 9})
    monkeypatch.setattr(loop.Training, "step", None)
    monkeypatch.setattr(type(pipe), "__call__", None)
    assert train_l2c(pipe, tmp_path, **FAST | {"iterations": 9}).when == longer.when != first.when
    monkeypatch.undo()
    assert train_l2c(pipe, tmp_path, **FAST, fresh=True).when == first.when
    straight = train_l2c(pipe, tmp_path, **FAST | {"iterations": 9}, fresh=True)
    assert straight.when == longer.when  # taken up in the middle, and bit for bit the same


def test_going_on_from_any_checkpoint_is_bit_for_bit_the_same(network, data, tmp_path):
    predict, path = class_conditional(network)[0], tmp_path / "training.safetensors"
    settings = Settings(iterations=12, batch_size=3, learning_rate=0.1, label_dropout=0.3)
    straight = train_router(network, predict, walk_of(), data, settings)
    for stop in (1, 5, 12):
        path.unlink(missing_ok=True)
        train_router(network, predict, walk_of(), data, dataclasses.replace(settings, iterations=stop), path=path)
        again = train_router(network, predict, walk_of(), data, settings, path=path)
        assert torch.equal(again.table, straight.table)
        assert (again.loss, again.unchanged, again.iteration) == (straight.loss, straight.unchanged, 12)


def test_measured_weights_are_kept_and_used(pipe, tmp_path):
    plain = train_l2c(pipe, tmp_path / "plain", **FAST)
    weighted = train_l2c(pipe, tmp_path / "weighted", **FAST, weighted=3)
    weights = load_file(tmp_path / "weighted" / "weights.safetensors")["weights"]
    assert weights[1::2].eq(0).all() and weights[::2].gt(0).all()
    assert float(weights[::2].log().mean()) == pytest.approx(0, abs=1e-6)
    assert weighted.provenance["weights"] == weights.tolist() and plain.provenance["weights"] is None
    assert weighted.when != plain.when
    with pytest.raises(ValueError, match=r"training.safetensors.* weighted is 3 there, 0 here"):
        train_l2c(pipe, tmp_path / "weighted", **FAST)


def test_latents_of_a_pipeline_with_an_autoencoder():
    from dittocache.train.data import network_space

    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5)
    pipe = tiny.pipeline()
    pictures = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        wanted = vae.encode(2 * pictures - 1).latent_dist.mean * 0.5
    pipe.vae = vae
    assert torch.equal(network_space(pipe, pictures), wanted)
    assert torch.equal(network_space(tiny.pipeline(), pictures), 2 * pictures - 1)


# ---- what is refused ------------------------------------------------------------------------------------------------
def good_file(folder: Path, **changes) -> Path:
    tensors = {"x0": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([0, 1, 35])} | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "data.safetensors")
    return folder / "data.safetensors"


def test_a_file_of_data_is_used(pipe, tmp_path):
    train_l2c(pipe, tmp_path / "out", **FAST, data=good_file(tmp_path, x0=torch.randn(3, 1, 8, 8)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"samples.safetensors"}
    good_file(tmp_path, x0=torch.randn(3, 1, 8, 8))
    with pytest.raises(ValueError, match="of another training: digest is"):
        train_l2c(pipe, tmp_path / "out", **FAST, data=tmp_path / "data.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.full((3, 1, 8, 8), float("nan"))}, "x0 has 192 of 192 entries that are not finite"),
        ({"x0": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, "at least one sample"),
        ({"x0": torch.zeros(3, 4, 8, 8)}, r"x0 must be \[n, 1, 8, 8\].* got \[3, 4, 8, 8\]"),
        ({"x0": torch.zeros(3, 1, 8, 8).long()}, "of floats; got .* torch.int64"),
        ({"labels": torch.tensor([0, 1, 36])}, "labels must lie from 0 to 35; got 36"),
        ({"labels": torch.tensor([0, -1, 3])}, "got -1"),
        ({"labels": torch.tensor([0, 1])}, r"labels must be \[3\] whole numbers; got \[2\]"),
        ({"labels": torch.zeros(3)}, "whole numbers; got .* torch.float32"),
        ({"labels": None}, "has no tensor 'labels'; it has x0"),
    ],
)
def test_data_that_do_not_fit_are_refused(pipe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_l2c(pipe, tmp_path / "out", **FAST, data=good_file(tmp_path, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_missing_and_damaged_data(pipe, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        train_l2c(pipe, tmp_path / "out", data=tmp_path / "nowhere")
    (tmp_path / "data").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged, or no safetensors"):
        train_l2c(pipe, tmp_path / "out", data=tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 8), ("learning_rate", 0.2), ("penalty", 0.5), ("hard", True), ("seed", 1), ("batch_size", 5)]
    + [("guidance_scale", 2.0), ("samples", 7), ("label_dropout", 0.2)],
)
def test_a_checkpoint_of_another_training_is_refused(pipe, tmp_path, name, value):
    train_l2c(pipe, tmp_path, **FAST)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"is of another training: {name} is .* there, .* here") as caught:
        train_l2c(pipe, tmp_path, **FAST | {name: value})
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train_l2c(pipe, tmp_path, **FAST | {name: value}, fresh=True)


def test_a_checkpoint_of_another_model_is_refused(pipe, tmp_path):
    train_l2c(pipe, tmp_path, **FAST)
    with pytest.raises(ValueError, match="of another training: weights is"):
        train_l2c(tiny.pipeline(seed=1), tmp_path, **FAST)


@pytest.mark.parametrize("name", ["training.safetensors", "samples.safetensors"])
def test_damaged_and_foreign_checkpoints_are_refused(pipe, tmp_path, name):
    train_l2c(pipe, tmp_path, **FAST)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name}' is damaged or foreign") as caught:
        train_l2c(pipe, tmp_path, **FAST)
    assert "\n" not in str(caught.value)
    save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}' is damaged or foreign.* format is None"):
        train_l2c(pipe, tmp_path, **FAST)
    train_l2c(pipe, tmp_path, **FAST, fresh=True)


def test_a_folder_that_holds_something_else_is_left_alone(pipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', which no training wrote"):
        train_l2c(pipe, tmp_path, **FAST, fresh=True)
    dittocache.recipe("fora").save_pretrained(tmp_path / "recipe")
    with pytest.raises(ValueError, match=r"holds 'recipe.json'"):
        train_l2c(pipe, tmp_path / "recipe", **FAST)
    with pytest.raises(ValueError, match="is no folder"):
        train_l2c(pipe, tmp_path / "thesis.txt", **FAST)


def test_what_cannot_be_trained(pipe, tmp_path):
    with pytest.raises(ValueError, match="no setting 'speed'; known: iterations"):
        train_l2c(pipe, tmp_path, speed=1)
    with pytest.raises(ValueError, match="num_steps must be a whole number, 2 or more; got 1"):
        train_l2c(pipe, tmp_path, num_steps=1)
    with pytest.raises(ValueError, match="needs a pipeline"):
        train_l2c(object(), tmp_path)
    with dittocache.enable(pipe, "fora"), pytest.raises(ValueError, match="a cache is on"):
        train_l2c(pipe, tmp_path, **FAST)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler is not supported"):
        train_l2c(pipe, tmp_path, **FAST)
    assert not list(tmp_path.iterdir())


# ---- the command ----------------------------------------------------------------------------------------------------
QUICK = ["--steps", "4", "--samples", "2", "--iterations", "2", "--batch", "2", "--weighted", "0"]


def command(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["train", "l2c", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_trains_and_its_recipe_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = command("--out", tmp_path / "out", *QUICK).stdout
    assert "2 iterations" in text and "dittocache.enable(pipe" in text
    found = json.loads(command("--out", tmp_path / "out", *QUICK, "--json").stdout)
    assert found["provenance"]["iterations"] == 2 and found["out"] == str(tmp_path / "out")
    again = command("--out", tmp_path / "out", *QUICK, "--lr", "0.7", code=2)
    assert "learning_rate is 0.1 there, 0.7 here" in again.stderr and again.stderr.count("\n") == 1
    dittocache.enable(dittocache.bundled.load("glyphs"), str(tmp_path / "out")).disable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "there is no file 'nowhere'"),
        (["--lr", "nan"], "--lr"),
        (["--steps", "1"], "--steps"),
        (["--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = command("--out", tmp_path / "out", *arguments, code=2)
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- kills, and several processes -----------------------------------------------------------------------------------
SCRIPT = """
import sys, time, tiny
from dittocache.train import loop, train_l2c
if "--slow" in sys.argv:
    step = loop.Training.step
    def slow(self, *args):
        time.sleep(0.05)
        step(self, *args)
    loop.Training.step = slow
train_l2c(tiny.pipeline(), sys.argv[1], num_steps=6, samples=4, batch_size=3, iterations=60, learning_rate=0.1,
          checkpoint_every=7, label_dropout=0.3)
"""


def spawn(out: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    surroundings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), *arguments], env=surroundings)


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    process = spawn(tmp_path / "killed", "--slow")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "training.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "recipe.json").exists()
    for folder in ("killed", "whole"):
        assert spawn(tmp_path / folder).wait(120) == 0
    routers = [load_file(tmp_path / folder / "recipe.safetensors") for folder in ("killed", "whole")]
    assert all(torch.equal(routers[0][name], routers[1][name]) for name in routers[1])
    checkpoints = [load_file(tmp_path / folder / "training.safetensors") for folder in ("killed", "whole")]
    assert all(torch.equal(checkpoints[0][name], checkpoints[1][name]) for name in checkpoints[1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_two_processes_average_their_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    started = [spawn(tmp_path / "out", RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    assert [process.wait(240) for process in started] == [0, 0]
    found = load_file(tmp_path / "out" / "training.safetensors")

    # the same, in one process
    pipe, kept = tiny.pipeline(), load_file(tmp_path / "out" / "samples.safetensors")
    predict, null = class_conditional(pipe.transformer)
    walk, data = Pairs.of(pipe.scheduler, 6), Data(kept["x0"], kept["labels"], null)
    settings = Settings(iterations=60, batch_size=3, learning_rate=0.1, label_dropout=0.3)
    training = loop.Training(walk, 6, settings, {}, "cpu")
    with Objective(pipe.transformer, predict) as objective:
        for iteration in range(60):
            gradients: dict[int, torch.Tensor] = {}
            for rank in range(2):
                chosen = loop.draw(settings, walk.trained, data, iteration, rank)
                labels = torch.where(chosen.dropped, null, data.conditions[chosen.samples])
                x0 = data.x0[chosen.samples]
                terms = objective(walk, training.logits, chosen.rows, x0, chosen.noise, labels, settings.penalty)
                row = int(chosen.rows[0])
                (gradient,) = torch.autograd.grad(terms.loss, [training.logits[row]])
                gradients[row] = gradients.get(row, 0) + gradient / 2
            for row, parameter in enumerate(training.logits):
                parameter.grad = gradients.get(row)
            training.optimizer.step()
            loop.clamp(training.logits, walk.limit)
    assert tiny.relative(found["logits"], training.table) < 1e-4


def test_several_processes_without_accelerate_are_told(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"needs accelerate: pip install 'dittocache\[train\]'"):
        train_l2c(pipe, tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()
