"""Calibration against plain torch: forward hooks and partial forwards that know nothing of caches. And refusals."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.pipelines import ImagePipelineOutput
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dittocache
from dittocache.calibrate import Setup, Statistics, calibrate, fit, make, merge, merged, record, shard
from dittocache.calibrate.base import CALIBRATORS, Recorder
from dittocache.calibrate.setup import draw
from dittocache.calibrate.trial import Trial
from dittocache.cli import app

SETUP = Setup(num_steps=5, guidance_scale=1.5, seed=50, conditions=(3, 7, 1))
METHODS = ("eoc", "goc", "icc", "eb-cache")
KNOWN = "block-caching, dpcache, eb-cache, eoc, goc, icc, lemica, magcache, teacache"
MODULES = [f"transformer_blocks.{l}.{part}" for l in range(3) for part in ("attn1", "ff")]


# ---- independent recording ------------------------------------------------------------------------------------------
class TextPipeline(DiffusionPipeline):
    """Draws from prompts with a tiny PixArt; embeddings are made from a hash of the prompt, the null prompt's first."""

    apart = False  # guidance in two network calls

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.drawn = []

    @staticmethod
    def embed(prompt):
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
        return torch.randn(1, tiny.TEXT, 12, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def __call__(
        self, prompt, num_inference_steps=5, guidance_scale=4.5, generator=None, output_type="pt", return_dict=True
    ):
        self.drawn += prompt
        yes = torch.cat([self.embed(p) for p in prompt])
        no = self.embed("").expand_as(yes)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            if guidance_scale <= 1:
                prediction = self._predict(x, t, yes)
            else:
                both = ((x, no), (x, yes)) if self.apart else ((torch.cat([x, x]), torch.cat([no, yes])),)
                without, given = torch.cat([self._predict(a, t, b) for a, b in both]).chunk(2)
                prediction = without + guidance_scale * (given - without)
            x = self.scheduler.step(prediction, t, x).prev_sample
        return ImagePipelineOutput(images=x)

    def _predict(self, x, t, text):
        return tiny.call(self.transformer, tiny.inputs(self.transformer, x, t, {"encoder_hidden_states": text}))


def text_pipeline():
    pipe = TextPipeline(tiny.pixart(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def listening(network, names):
    """Outputs and inputs of modules by plain forward hooks: name -> one (output, input) for every call."""
    heard, handles = {name: [] for name in names}, []
    for name in names:

        def hear(module, args, kwargs, output, name=name):
            given = args[0] if args else kwargs["hidden_states"]
            output = output if isinstance(output, torch.Tensor) else output[0]
            heard[name].append((output.detach().clone(), given.detach().clone()))

        handles.append(network.get_submodule(name).register_forward_hook(hear, with_kwargs=True))
    yield heard
    for handle in handles:
        handle.remove()


def plain_draw(pipe, setup, samples):
    """What a sample is, told again: condition j modulo their number, seed + j."""
    argument = "prompt" if isinstance(pipe, TextPipeline) else "class_labels"
    return pipe(
        **{argument: [setup.conditions[j % len(setup.conditions)] for j in samples]},
        num_inference_steps=setup.num_steps,
        guidance_scale=setup.guidance_scale,
        generator=[torch.Generator().manual_seed(setup.seed + (0 if setup.shared_noise else j)) for j in samples],
        output_type="np" if isinstance(pipe, DiTPipeline) else "pt",
    ).images


def features(pipe, setup, samples, names):
    """Conditional rows of the modules' outputs and inputs: name -> ([steps, samples, ...], the same)."""
    with listening(pipe.transformer, names) as heard:
        plain_draw(pipe, setup, samples)
    n = len(samples)
    rows = slice(None)
    if setup.guidance_scale > 1:
        rows = slice(n, 2 * n) if isinstance(pipe, TextPipeline) else slice(0, n)
    return {name: tuple(torch.stack([c[i][rows] for c in calls]) for i in (0, 1)) for name, calls in heard.items()}


def expected_eoc(pipe, setup, samples, steps, names=MODULES):
    found = {}
    for name, (out, _) in features(pipe, setup, samples, names).items():
        for k in steps:
            found[f"{name}@{k}"] = (out[k] - out[k - 1]).sum(0)
            found[f"{name}@{k}#square"] = out[k].double().square().sum()
    return found


def linears(network):
    blocks = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and "transformer_blocks" in n]
    return [n for n in blocks if ".attn" in n or ".ff." in n]


def expected_icc(pipe, setup, samples, change):
    def statistic(x):  # [samples, channels]
        v = x.abs().mean(-2)
        low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
        return (v - low + 1e-6) / (high - low + 1e-6)

    names, found = linears(pipe.transformer), {}
    seen = features(pipe, setup, samples, names)
    for k in range(1 if change else 0, setup.num_steps):
        now = {n: tuple(x[k] - x[k - 1] if change else x[k] for x in seen[n]) for n in names}
        for name in names:
            attention, _, last = name.rpartition(".")
            if last in ("to_q", "to_k", "to_v"):
                parts = [now[f"{attention}.to_{letter}"][0].abs().mean(-2) for letter in "qkv"]
                v = torch.cat(parts, -1)[:, None]
                width = parts[0].shape[-1]
                out = statistic(v).split(width, -1)["qkv".index(last[-1])]
            else:
                out = statistic(now[name][0])
            for key, value in ((f"{name}/out", out), (f"{name}/in", statistic(now[name][1]))):
                found[key] = found.get(key, 0) + value.double().sum(0)
            found[f"{name}/count"] = found.get(f"{name}/count", 0) + torch.tensor(float(len(samples)))
    return found


def close(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert tiny.relative(found[name].double(), value.double()) < tolerance, name


def recorded(pipe, method="eoc", samples=3, setup=SETUP, batch=8, out=None, progress=None, **params):
    return record(pipe, make(method, params), samples, setup, batch=batch, out=out, progress=progress)


def settings_of(setup=SETUP, **changes):
    return Setup(**{**setup.to_dict(), **changes})


# ---- what is recorded -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_eoc_sums_changes_of_conditional_rows_at_reused_steps(pipe, guidance, batch):
    setup = settings_of(guidance_scale=guidance)
    found = recorded(pipe, samples=5, setup=setup, batch=batch)
    close(found.sums, expected_eoc(pipe, setup, range(5), (1, 3)))


def test_eoc_follows_the_schedule_it_is_given(pipe):
    steps = (1, 2, 4)
    found = recorded(pipe, reuse_steps=np.array(steps))
    close(found.sums, expected_eoc(pipe, SETUP, range(3), steps))
    logits = torch.full((5, 6), 5.0)
    logits[4 - 2, [1, 4]] = -5.0  # step 2; odd i and the first step are not read
    found = recorded(pipe, router_logits=logits)
    full = expected_eoc(pipe, SETUP, range(3), (2,))
    close(found.sums, {n: v for n, v in full.items() if n.split("@")[0] in (MODULES[1], MODULES[4])})


def test_shared_noise_starts_every_sample_alike(pipe):
    setup = settings_of(shared_noise=True)
    close(recorded(pipe, setup=setup).sums, expected_eoc(pipe, setup, range(3), (1, 3)))
    assert tiny.relative(draw(pipe, setup, [0]), draw(pipe, setup, [3])) == 0  # the same condition and noise
    assert tiny.relative(draw(pipe, SETUP, [0]), draw(pipe, SETUP, [3])) > 0.01


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_goc_cosines_are_those_of_changes_in_a_row(pipe, guidance, batch):
    setup = settings_of(guidance_scale=guidance)
    statistics = recorded(pipe, "goc", 5, setup, batch)
    expected = torch.zeros(len(MODULES), 5, dtype=torch.float64)
    for row, (out, _) in zip(expected, features(pipe, setup, range(5), MODULES).values(), strict=True):
        for k in range(2, 5):
            a, b = (out[k] - out[k - 1]).flatten(), (out[k - 1] - out[k - 2]).flatten()
            row[k] = torch.cosine_similarity(a.double(), b.double(), dim=0)
    cosines = CALIBRATORS["goc"].cosines(statistics)
    assert torch.allclose(cosines, expected.mean(0), atol=1e-6)
    assert len({round(float(c), 3) for c in cosines[2:]}) == 3  # three different ones


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("factors", ["activation-svd", "change-svd"])
@pytest.mark.parametrize("batch", [2, 5])
def test_icc_sums_channel_statistics_q_k_and_v_together(pipe, guidance, factors, batch):
    setup = settings_of(guidance_scale=guidance)
    found = recorded(pipe, "icc", 5, setup, batch, factors=factors, rank=4)
    close(found.sums, expected_icc(pipe, setup, range(5), factors == "change-svd"), 1e-4)


def test_icc_records_the_same_whatever_the_ranks_are(pipe):
    whole, some = (recorded(pipe, "icc", rank=rank) for rank in (4, {"q": 2, "fc2": 3}))
    assert whole.settings == some.settings
    assert set(whole.sums) == set(some.sums)
    assert all(torch.equal(whole.sums[name], some.sums[name]) for name in whole.sums)


@pytest.mark.parametrize("method", METHODS)
def test_shards_add_up_in_any_order(pipe, method, tmp_path):
    rank = {"rank": 4} if method == "icc" else {"delta_low": 0.05, "delta_high": 0.1} if method == "eb-cache" else {}
    whole = recorded(pipe, method, 5, **rank)
    parts = [recorded(pipe, method, numbers, out=tmp_path / str(numbers), **rank) for numbers in ([4], [0, 3], [1, 2])]
    recipes = []
    for order in itertools.permutations(range(3)):
        summed = merge(parts[n] for n in order)
        assert summed.samples == whole.samples == (0, 1, 2, 3, 4)
        close(summed.sums, whole.sums)
        folders = [tmp_path / str(numbers) for numbers in ([4], [0, 3], [1, 2])]
        recipes.append(merged(pipe, make(method, rank), [folders[n] for n in order], SETUP))
    made = fit(pipe, make(method, rank), whole, SETUP)
    assert all(r.when == made.when and r.made_for == made.made_for for r in recipes)
    tensors = {"eoc": "trend", "icc": "factors"}.get(method)
    for name in getattr(made.fill, tensors) if tensors == "trend" else ():
        assert torch.allclose(getattr(recipes[0].fill, tensors)[name], made.fill.trend[name], rtol=1e-2, atol=1e-4)
    found = dict(recipes[0].provenance)
    assert found["samples"] == 5 and found["merged"] == 3 and found["versions"]["torch"]
    assert found["memory"]["peak of the process"] > 1e7 and found["memory"]["statistics"] == whole.bytes
    assert found["seconds"] == pytest.approx(sum(part.record["seconds"] for part in parts), abs=0.01)


def test_text_pipelines_have_their_conditional_rows_second():
    pipe, setup = text_pipeline(), settings_of(conditions=("a cat", "two dogs"))
    names = [f"transformer_blocks.{l}.{part}" for l in range(3) for part in ("attn1", "attn2", "ff")]
    for guidance in (1.0, 4.0):
        setup = settings_of(setup, guidance_scale=guidance)
        close(recorded(pipe, setup=setup, batch=2).sums, expected_eoc(pipe, setup, range(3), (1, 3), names))
        close(recorded(pipe, "icc", 2, setup, rank=4).sums, expected_icc(pipe, setup, range(2), False), 1e-4)
    assert set(pipe.drawn) == {"a cat", "two dogs"}


def test_the_class_conditional_pipeline_of_diffusers():
    """It predicts variances along with the noise."""
    network = tiny.dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(transformer=network, vae=vae.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    close(recorded(pipe, batch=2).sums, expected_eoc(pipe, SETUP, range(3), (1, 3)))
    limit = float(searched(pipe, SETUP, range(2), 0, 0)[1][:, 1:].median()) * 1.001
    votes, _ = searched(pipe, SETUP, range(2), limit, limit)
    found = recorded(pipe, "eb-cache", 2, delta_low=limit, delta_high=limit)
    assert torch.equal(found.sums["votes"], votes) and 0 < votes[1:, 0].sum() < 8


def test_a_scheduler_that_calls_the_network_twice_a_step(pipe):
    """Heun makes 2 T - 1 network calls of T steps; each is a step of a cache."""
    pipe.scheduler = HeunDiscreteScheduler()
    setup = settings_of(num_steps=3)
    close(recorded(pipe, setup=setup, samples=2).sums, expected_eoc(pipe, setup, range(2), (1, 3)))
    made = calibrate(pipe, "goc", 2, setup, limit=-1.0)
    assert made.fill.positions == (3,) and len(made.made_for["timesteps"]) == 5
    with dittocache.enable(pipe, made) as cache:
        plain_draw(pipe, setup, [0])
    assert len(cache.trace.steps) == 5 and cache.report().compute_fraction < 1
    assert recorded(pipe, "eb-cache", 2, setup).sums["votes"].shape == (5, 4)


def test_outputs_that_a_model_changes_in_place_are_recorded_as_they_were(pipe):
    expected, block, kept = expected_eoc(pipe, SETUP, range(2), (1, 3)), pipe.transformer.transformer_blocks[0], []

    def remember(module, args, output):
        kept.append(output)

    def change(module, args):  # after the output's last use
        kept.pop().mul_(-7)

    handles = [block.attn1.register_forward_hook(remember), block.norm3.register_forward_pre_hook(change)]
    found = recorded(pipe, samples=2).sums
    for handle in handles:
        handle.remove()
    close(found, expected)


def test_guidance_in_two_calls_is_refused_where_rows_would_be_mixed():
    pipe, setup = text_pipeline(), settings_of(conditions=("a cat",))
    pipe.apart = True
    for method in ("eoc", "goc", "eb-cache"):
        with pytest.raises(ValueError, match=r"^[^\n]*needs one network call a step[^\n]*$"):
            recorded(pipe, method, 2, setup)
        assert tiny.traces_of_cache(pipe.transformer) == []
    counts = recorded(pipe, "icc", 2, setup, rank=2).sums
    assert float(counts["transformer_blocks.0.ff.net.2/count"]) == 5 * 2 * 2  # both halves, and counted as such


# ---- EB-Cache's candidates ------------------------------------------------------------------------------------------
def searched(pipe, setup, samples, low, high, kind="epsilon", turn=0.4, factor=lambda time: 1.0):
    """Votes [steps, 4] and gaps of both candidates [steps, samples], from forwards whose modules return old outputs."""
    network, calls, n = pipe.transformer, [], len(samples)

    def see(module, args, kwargs, output):
        calls.append((args, kwargs, output[0] if not isinstance(output, torch.Tensor) else output))

    handle = network.register_forward_hook(see, with_kwargs=True)
    plain_draw(pipe, setup, samples)
    handle.remove()
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(setup.num_steps)
    times = [float(t) / 1000 for t in scheduler.timesteps]

    def norm(k, output):
        output = output[:, : network.config.in_channels]
        x, t = (*calls[k][0], calls[k][1].get("hidden_states"))[0], int(scheduler.timesteps[k])
        alpha = scheduler.alphas_cumprod[t].sqrt()
        noise = output if kind == "epsilon" else alpha * output + (1 - alpha**2).sqrt() * x
        if setup.guidance_scale > 1:
            yes, no = noise[:n], noise[n:]
            noise = setup.guidance_scale * yes + (1 - setup.guidance_scale) * no
        return noise.flatten(1).double().norm(dim=1)

    old = {}

    def forward(k, states):
        """The output if sample j reuses what state j says, and all that modules handed on."""
        handed, handles = {}, []
        for name in MODULES:
            reusing = (1, 2) if name.endswith("attn1") else (2, 3)
            rows = torch.tensor([state in reusing for state in states]).repeat(1 + (setup.guidance_scale > 1))

            def hand(module, args, output, name=name, rows=rows):
                handed[name] = torch.where(rows[:, None, None], old[name], output) if name in old else output
                return handed[name]

            handles.append(network.get_submodule(name).register_forward_hook(hand))
        with torch.no_grad():
            output = network(*calls[k][0], **calls[k][1])[0]
        for handle in handles:
            handle.remove()
        return output, handed

    votes, gaps = torch.zeros(len(times), 4, dtype=torch.float64), torch.zeros(2, len(times), n, dtype=torch.float64)
    votes[0, 0] = n
    old = forward(0, [0] * n)[1]
    for k in range(1, len(times)):
        single, limit, true = 3 if times[k] > turn else 1, low + (high - low) * times[k], norm(k, calls[k][2])
        gaps[0, k] = (norm(k, forward(k, [2] * n)[0]) * factor(times[k]) / true - 1).abs()
        gaps[1, k] = (norm(k, forward(k, [single] * n)[0]) / true - 1).abs()
        states = [2 if b <= limit else single if s <= limit else 0 for b, s in gaps[:, k].T]
        for state in states:
            votes[k, state] += 1
        old = forward(k, states)[1]
    return votes, gaps


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize(
    ("kind", "guidance", "params"),
    [
        ("epsilon", 1.0, {}),
        ("epsilon", 1.5, {}),
        ("v_prediction", 1.5, {}),
        ("epsilon", 1.5, {"noise_scale": 0.9}),
        ("v_prediction", 1.5, {"noise_bias": True, "noise_scale": 1.05}),
        ("epsilon", 1.5, {"turn": 0.7}),
    ],
)
def test_votes_are_those_of_hand_made_partial_forwards(kind, guidance, params, batch):
    pipe = tiny.pipeline(scheduler=DDIMScheduler(prediction_type=kind))
    setup = settings_of(guidance_scale=guidance)

    def factor(time):
        b = 1.0
        if params.get("noise_bias"):
            span = 0.6
            b = 0.98 + 0.02 * np.exp(-5 * (1 - time) / span)
            b = b if time >= 0.4 else 0.96 + 0.02 * np.exp(5 * (time - 0.4) / span)
        return b / params.get("noise_scale", 1.0)

    turn = params.get("turn", 0.4)
    _, gaps = searched(pipe, setup, range(5), 0, 0, kind, turn, factor)
    # limits in the middle of what there is, so that all kinds of votes come up
    low, high = float(gaps[1, -1].median()) * 1.001, float(gaps[0, 1].median()) * 1.001
    expected, _ = searched(pipe, setup, range(5), low, high, kind, turn, factor)
    found = recorded(pipe, "eb-cache", 5, setup, batch, delta_low=low, delta_high=high, **params)
    assert torch.equal(found.sums["votes"], expected)
    assert torch.equal(expected.sum(1), torch.full((5,), 5.0, dtype=torch.float64))
    assert (expected[1:].sum(0) > 0).sum() > 1  # more than one state was voted for


def test_larger_limits_move_votes_from_full_towards_reuse(pipe):
    limits = (0.0, 0.01, 0.03, 0.1, 0.3, 10.0)
    votes = [recorded(pipe, "eb-cache", 4, delta_low=d, delta_high=d).sums["votes"] for d in limits]
    for less, more in itertools.pairwise(votes):  # step 1 has the same past for all
        assert more[1, 0] <= less[1, 0] and more[1, 2] >= less[1, 2]
    assert all(torch.equal(table.sum(1), torch.full((5,), 4.0, dtype=torch.float64)) for table in votes)
    assert torch.equal(votes[0][:, 0], torch.full((5,), 4.0, dtype=torch.float64))
    assert torch.equal(votes[-1][1:, 2], torch.full((4,), 4.0, dtype=torch.float64))
    assert any(0 < float(v) < 4 for table in votes for v in table[1:].flatten())


def test_batch_mates_do_not_change_a_vote(pipe):
    """What a sample's candidates reuse is what its own choices kept."""
    alone = [recorded(pipe, "eb-cache", [n], delta_low=0.03, delta_high=0.1).sums["votes"] for n in range(6)]
    assert len({tuple(table.flatten().tolist()) for table in alone}) > 1
    assert torch.equal(recorded(pipe, "eb-cache", 6, delta_low=0.03, delta_high=0.1).sums["votes"], sum(alone))


def test_the_most_votes_win_and_of_as_many_the_least_reuse(pipe):
    calibrator = make("eb-cache", {})
    statistics = recorded(pipe, "eb-cache", 4)
    statistics.sums["votes"] = torch.tensor([[4.0, 0, 0, 0], [2, 0, 2, 0], [0, 2, 2, 0], [0, 0, 2, 2], [1, 0, 3, 0]])
    assert fit(pipe, calibrator, statistics, SETUP).params["table"] == (0, 0, 1, 3, 2)


class FluxTextPipeline(TextPipeline):
    """The same around a tiny FLUX: single-stream blocks with attention and feed-forward fused in one site."""

    def _predict(self, x, t, text):
        given = {"encoder_hidden_states": text, "pooled_projections": text.flatten(1)[:, :10]}
        tokens = x.flatten(2).transpose(1, 2)  # [batch, 64, 4]
        found = tiny.call(self.transformer, tiny.inputs(self.transformer, tokens, t, given))
        return found.transpose(1, 2).reshape(x.shape)


def test_fused_sites_are_reused_only_where_both_kinds_are():
    """As by the recipe: the candidate that reuses feed-forwards computes the fused sites."""
    pipe, setup = FluxTextPipeline(tiny.flux(), DDIMScheduler()), Setup(3, 1.0, 50, ("a cat",))
    names = [f"transformer_blocks.{l}.{part}" for l in range(2) for part in ("ff", "ff_context")]
    calls = []
    with listening(pipe.transformer, names) as heard:
        handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
        plain_draw(pipe, setup, [0])
        handle.remove()
    handles = [
        pipe.transformer.get_submodule(n).register_forward_hook(lambda m, a, o, old=heard[n][0][0]: old) for n in names
    ]
    with torch.no_grad():
        candidate = pipe.transformer(**calls[1])[0]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        true = pipe.transformer(**calls[1])[0]
    gap = abs(float(candidate.double().norm() / true.double().norm()) - 1)
    for limit, votes in ((gap * 1.01, 1), (gap * 0.99, 0)):
        found = recorded(pipe, "eb-cache", 1, setup, delta_low=limit, delta_high=limit, turn=0.0).sums["votes"]
        assert float(found[1, 3]) == votes


# ---- nothing is left behind -----------------------------------------------------------------------------------------
class Interrupting(DDIMScheduler):
    """A scheduler that is interrupted from the keyboard in the middle of a run."""

    def step(self, *args, **kwargs):
        LEFT["steps"] -= 1
        if LEFT["steps"] < 0:
            raise KeyboardInterrupt
        return super().step(*args, **kwargs)


LEFT = {"steps": 10**9}  # until the interruption
PARAMS = {"eoc": {}, "goc": {"judge": "cosine"}, "icc": {"rank": 4}, "eb-cache": {}}


@pytest.mark.parametrize("method", METHODS)
def test_pictures_are_the_uncached_ones_and_the_pipeline_is_left_as_it_was(pipe, method):
    weights = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    before, reference = tiny.fingerprint(pipe), plain_draw(pipe, SETUP, range(2))
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    drawn, original = [], type(pipe).__call__

    class Listening(type(pipe)):
        def __call__(self, *args, **kwargs):
            drawn.append(original(self, *args, **kwargs))
            return drawn[-1]

        __call__.__signature__ = inspect.signature(original)

    pipe.__class__, cls = Listening, type(pipe)
    calibrate(pipe, method, 2, SETUP, **PARAMS[method])
    pipe.__class__ = cls
    assert len(drawn) == 1 and torch.equal(drawn[0].images, reference)
    assert tiny.fingerprint(pipe) == before and tiny.traces_of_cache(pipe.transformer) == []
    assert pipe.scheduler is scheduler and type(scheduler) is DDIMScheduler and dict(scheduler.config) == config
    assert all(torch.equal(p, weights[name]) for name, p in pipe.transformer.state_dict().items())
    assert torch.equal(plain_draw(pipe, SETUP, range(2)), reference)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["first run", "second run", "progress"])
def test_an_interruption_leaves_nothing_on_the_model(method, where, monkeypatch, tmp_path):
    pipe = tiny.pipeline(scheduler=Interrupting())
    before, reference = tiny.fingerprint(pipe), plain_draw(pipe, SETUP, [0])
    monkeypatch.setitem(LEFT, "steps", {"first run": 3, "second run": 8}.get(where, 10**9))

    def progress(done, count, what):
        if where == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(pipe, method, 3, batch=1, out=tmp_path / "out", progress=progress, **PARAMS[method])
    assert tiny.fingerprint(pipe) == before and tiny.traces_of_cache(pipe.transformer) == []
    LEFT["steps"] = 10**9
    assert torch.equal(plain_draw(pipe, SETUP, [0]), reference)
    saved = (tmp_path / "out" / "statistics.safetensors").exists()
    assert saved == (where != "first run")


def test_a_search_that_fails_among_its_candidates_takes_its_cache_off_at_once(pipe):
    calls = []

    def fail(module, args):
        calls.append(len(calls))
        if len(calls) == 9:
            raise RuntimeError("broken")

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken") as caught:
        recorded(pipe, "eb-cache", 2)
    handle.remove()
    assert caught.tb is not None  # the traceback is alive, and with it all frames
    assert tiny.traces_of_cache(pipe.transformer) == [] and dittocache.hooks.caches_on(pipe.transformer) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_is_on_is_refused_and_stays_on(pipe, method):
    with dittocache.enable(pipe, "fora") as cache:
        with pytest.raises(ValueError, match=r"^a cache is on[^\n]*disable first$"):
            calibrate(pipe, method, 2, SETUP, **PARAMS[method])
        assert cache.enabled and dittocache.hooks.caches_on(pipe.transformer) == [cache]


def test_trial_runs_do_not_replace_a_cache_that_is_on(pipe):
    statistics, calibrator = recorded(pipe), make("eoc", {"judge": "trial"})
    with dittocache.enable(pipe, "fora") as cache:
        with pytest.raises(ValueError, match=r"^a cache is on"):
            fit(pipe, calibrator, statistics, SETUP)
        assert cache.enabled


def test_a_cache_of_diffusers_is_refused(pipe):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(ModelHook(), "fbc_leader_block_hook")
    with pytest.raises(ValueError, match=r"^a diffusers cache is on \(fbc_leader_block_hook\)"):
        recorded(pipe, "eb-cache", 2)


# ---- resume ---------------------------------------------------------------------------------------------------------
class Stop(Exception):
    pass


def stop_after(batches):
    done = []

    def progress(count, total, what):
        done.append(count)
        if len(done) == batches:
            raise Stop

    return progress


@pytest.mark.parametrize("method", METHODS)
def test_what_was_interrupted_goes_on_to_the_same_bits(pipe, method, tmp_path):
    whole = calibrate(pipe, method, 6, SETUP, batch=2, out=tmp_path / "whole", **PARAMS[method])
    with pytest.raises(Stop):
        calibrate(pipe, method, 6, SETUP, batch=2, out=tmp_path / "out", progress=stop_after(2), **PARAMS[method])
    half = Statistics.load(tmp_path / "out")
    assert half.samples == (0, 1, 2, 3) and not (tmp_path / "out" / "recipe.json").exists()
    told = []
    made = calibrate(
        pipe, method, 6, SETUP, batch=2, out=tmp_path / "out", progress=lambda *a: told.append(a), **PARAMS[method]
    )
    assert told == [(6, 6, method)]
    ours, theirs = Statistics.load(tmp_path / "out"), Statistics.load(tmp_path / "whole")
    assert ours.samples == theirs.samples and ours.settings == theirs.settings and set(ours.sums) == set(theirs.sums)
    assert all(torch.equal(value, theirs.sums[name]) for name, value in ours.sums.items())
    assert made == whole and dittocache.Recipe.from_pretrained(tmp_path / "out") == whole
    assert ours.record["seconds"] > half.record["seconds"] > 0
    assert ours.record["memory"]["peak of the process"] >= half.record["memory"]["peak of the process"]


def test_nothing_is_drawn_again_that_is_there(pipe, tmp_path):
    recorded(pipe, "goc", 4, out=tmp_path)
    pipe.transformer.register_forward_pre_hook(lambda *a: pytest.fail("drawn again"))
    made = calibrate(
        pipe, "goc", 4, SETUP, out=tmp_path, limit=0.9, eta=0.5, judge="cosine"
    )  # neither is a setting of the statistics
    assert made.params["eta"] == 0.5 and made.provenance["samples"] == 4
    assert calibrate(pipe, "goc", [2, 1], SETUP, out=tmp_path, judge="cosine").provenance["samples"] == 4


@pytest.mark.parametrize(
    ("changes", "params", "entry"),
    [
        ({"num_steps": 6}, {}, r"setup\.num_steps = 5, not 6"),
        ({"guidance_scale": 2.0}, {}, r"setup\.guidance_scale = 1\.5, not 2\.0"),
        ({"seed": 51}, {}, r"setup\.seed = 50, not 51"),
        ({"conditions": (3, 7)}, {}, r"setup\.conditions = \[3, 7, 1\], not \[3, 7\]"),
        ({"shared_noise": True}, {}, r"setup\.shared_noise = False, not True"),
        ({}, {"interval": 3}, r"parameters\.interval = 2, not 3"),
        ({}, {"reuse_steps": (1,)}, r"parameters\.interval = 2, not None"),
        ({}, {"router_logits": torch.full((5, 6), -9.0)}, r"parameters\.interval = 2, not None"),
    ],
)
def test_another_configuration_is_refused_by_name(pipe, changes, params, entry, tmp_path):
    recorded(pipe, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    pipe.transformer.register_forward_pre_hook(lambda *a: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match=rf"^these statistics were recorded with {entry}$"):
        calibrate(pipe, "eoc", 6, settings_of(**changes), out=tmp_path, **params)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_method_model_or_scheduler_is_refused(pipe, tmp_path):
    recorded(pipe, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for other, method, message in (
        (pipe, "goc", r"^these statistics are for 'eoc', not for 'goc'$"),
        (tiny.pipeline(1), "eoc", r"^these statistics were recorded with made_for\.weights[^\n]*$"),
        (
            tiny.pipeline(scheduler=EulerDiscreteScheduler()),
            "eoc",
            r"made_for\.scheduler = 'DDIMScheduler', not 'EulerDiscreteScheduler'$",
        ),
        (
            tiny.pipeline(scheduler=DDIMScheduler(timestep_spacing="trailing")),
            "eoc",
            r"^these statistics were recorded with made_for\.timesteps[^\n]*$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(other, method, 6, SETUP, out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    calibrate(tiny.pipeline(), "eoc", 4, SETUP, out=tmp_path)  # the same model, loaded again, goes on


@pytest.mark.slow
def test_a_killed_process_loses_one_batch_at_most(pipe, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny, torch; torch.set_num_threads(1)\n"
        "from dittocache.calibrate import Setup, calibrate\n"
        "setup = Setup(num_steps=5, guidance_scale=1.5, seed=50, conditions=(3, 7, 1))\n"
        "calibrate(tiny.pipeline(), 'icc', 5000, setup, batch=1, out=sys.argv[2], rank=4,\n"
        "    progress=lambda *a: print(*a, flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "out")]
    for least in (2, 4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            done = 0
            while done < least:
                done = int(process.stdout.readline().split()[0])
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    found = Statistics.load(tmp_path / "out")
    count = len(found.samples)
    assert count >= 4 and found.samples == tuple(range(count))
    whole = recorded(pipe, "icc", count, batch=1, rank=4)
    assert all(torch.equal(value, whole.sums[name]) for name, value in found.sums.items())
    made = calibrate(pipe, "icc", count + 1, SETUP, batch=1, out=tmp_path / "out", rank=4)
    assert made.provenance["samples"] == count + 1


def test_a_run_killed_while_it_first_wrote_can_be_repeated(pipe, tmp_path):
    (tmp_path / "statistics.safetensors.new").write_bytes(b"half of it")
    assert calibrate(pipe, "goc", 2, SETUP, out=tmp_path).provenance["samples"] == 2


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.fixture
def untouched(pipe, tmp_path):
    """A pipeline that must not be asked to draw, and an empty folder that must stay empty."""
    handle = pipe.transformer.register_forward_pre_hook(lambda *a: pytest.fail("something was drawn"))
    yield pipe
    handle.remove()
    assert list(tmp_path.iterdir()) == [] and tiny.traces_of_cache(pipe.transformer) == []


@pytest.mark.parametrize(
    ("method", "samples", "setup", "params", "message"),
    [
        ("nope", 2, {}, {}, f"'nope' is not calibrated; these are: {KNOWN}"),
        ("fora", 2, {}, {}, "'fora' is not calibrated"),
        ("eoc", 2, {}, {"ranks": 3}, "calibrating eoc has no parameter 'ranks'; known: interval, reuse_steps, "),
        ("eoc", 2, {}, {"interval": 0}, "interval must be a whole number, 1 or more; got 0"),
        ("eoc", 2, {}, {"judge": "jury"}, "judge must be one of none, trial; got 'jury'"),
        ("eoc", 2, {}, {"precision": "float8"}, "precision must be one of float32, float16, bfloat16; got 'float8'"),
        ("eoc", 2, {}, {"size_quantile": 1.5}, "size_quantile must be a number between 0 and 1; got 1.5"),
        ("eoc", 2, {}, {"reuse_steps": (1, 5)}, "reuse_steps in a run of 5 steps"),
        ("eoc", 2, {}, {"interval": 1}, "the schedule reuses nothing in 5 steps"),
        ("eoc", 2, {"num_steps": 1}, {}, "the schedule reuses nothing in 1 steps"),
        ("goc", 2, {"num_steps": 1}, {}, "the schedule reuses nothing in 1 steps"),
        ("goc", 2, {}, {"limit": 2}, "limit must be a number between -1 and 1; got 2"),
        ("eoc", 2, {}, {"router_logits": "nowhere.safetensors"}, "there is no file 'nowhere.safetensors'"),
        ("eoc", 2, {}, {"router_logits": {"scores": torch.zeros(5, 6)}}, "a router is one table 'logits'"),
        ("goc", 2, {}, {"router_logits": torch.zeros(5, 7)}, "the router has 7 columns, but the model has 6 sites"),
        ("goc", 2, {}, {"router_logits": torch.zeros(4, 6)}, "the router has 4 rows"),
        ("icc", 2, {}, {"rank": 17}, "rank is 17, but 'transformer_blocks.0.attn1.to_q' (q) has rank 16 at most"),
        ("icc", 0, {}, {"rank": 17, "factors": "svd"}, "rank is 17, but"),
        ("icc", 2, {}, {"rank": 0}, "rank must be a whole number, 1 or more; got 0"),
        ("icc", 2, {}, {"rank": {"qkv": 4}}, "rank names 'qkv'; the layers of DiTTransformer2DModel are: q, k, v, "),
        ("icc", 2, {}, {"rank": {"fc1": 17}}, "rank is 17, but 'transformer_blocks.0.ff.net.0.proj' (fc1)"),
        ("icc", 2, {"num_steps": 1}, {"rank": 4, "factors": "change-svd"}, "a run of 1 step has no change"),
        ("eb-cache", 2, {"num_steps": 1}, {}, "2 steps or more are needed"),
        ("eb-cache", 2, {}, {"noise_scale": 0}, "noise_scale must be a number above 0; got 0"),
        ("eb-cache", 2, {}, {"turn": 1.1}, "turn must be a number between 0 and 1; got 1.1"),
        ("eoc", 0, {}, {}, "samples must be a whole number, 1 or more; got 0"),
        ("eoc", -1, {}, {}, "samples must be a whole number, 1 or more; got -1"),
        ("eoc", True, {}, {}, "samples must be a whole number, 1 or more; got True"),
        ("eoc", 2.5, {}, {}, "samples must be a whole number, 1 or more; got 2.5"),
        ("eoc", "3", {}, {}, "samples must be a list of whole numbers; got '3'"),
        ("eoc", [], {}, {}, "samples are one or more different numbers from 0; got []"),
        ("eoc", [1, 2, 1], {}, {}, "samples are one or more different numbers from 0; got [1, 2, 1]"),
        ("eoc", [1, -2], {}, {}, "every entry of samples must be a whole number, 0 or more; got -2"),
        ("eoc", [0.5], {}, {}, "every entry of samples must be a whole number, 0 or more; got 0.5"),
        ("eoc", 2, {"num_steps": 2000}, {}, "1000"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_before_anything_is_drawn(
    untouched, tmp_path, method, samples, setup, params, message
):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        calibrate(untouched, method, samples, settings_of(**setup), out=tmp_path / "out", **params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number, 1 or more; got 0"),
        ({"num_steps": 2.0}, "num_steps must be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number that is finite; got nan"),
        ({"seed": -1}, "seed must be a whole number, from 0 to "),
        ({"seed": 2**64}, "seed must be a whole number, from 0 to "),
        ({"shared_noise": 1}, "shared_noise must be True or False; got 1"),
        ({"conditions": "a cat"}, "conditions are a list of class labels or prompts; got 'a cat'"),
        ({"conditions": None}, "conditions are a list of class labels or prompts; got None"),
        ({"conditions": (1.5,)}, "conditions are a list of class labels or prompts; got (1.5,)"),
        ({"conditions": (True,)}, "conditions are a list"),
    ],
)
def test_a_bad_setup_is_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Setup(**wrong)


def test_numbers_of_numpy_are_plain_ones(pipe, tmp_path):
    setup = Setup(np.int64(5), np.float32(1.5), np.int64(50), np.array([3, 7, 1]), np.bool_(False))
    assert setup == SETUP
    made = calibrate(pipe, "eoc", np.int64(2), setup, out=tmp_path, reuse_steps=np.array([1]), theta=np.float32(0.5))
    assert dittocache.Recipe.from_pretrained(tmp_path) == made
    made = calibrate(pipe, "icc", 2, setup, out=tmp_path / "icc", rank={"q": np.int64(2)})
    assert json.loads((tmp_path / "icc" / "recipe.json").read_text())["provenance"]["calibration"]["rank"] == {"q": 2}


@pytest.mark.parametrize(("method", "name"), [("eoc", "@"), ("goc", ""), ("icc", "/in"), ("eb-cache", "votes")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_saved(pipe, method, name, tmp_path):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[2].ff.net[2].bias[3] = torch.nan
    with pytest.raises(
        ValueError, match=r"^the statistics '[^']*' of samples \[0, 1\] are not finite[^\n]*$"
    ) as caught:
        calibrate(pipe, method, 2, SETUP, out=tmp_path / "out", **PARAMS[method])
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists() and tiny.traces_of_cache(pipe.transformer) == []


def test_statistics_that_turn_bad_later_keep_what_was_good(pipe, tmp_path):
    def spoil(done, count, what):
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].ff.net[2].bias[0] = torch.inf

    with pytest.raises(ValueError, match=r"of samples \[2, 3\] are not finite"):
        recorded(pipe, samples=6, batch=2, out=tmp_path, progress=spoil)
    assert Statistics.load(tmp_path).samples == (0, 1)


def damages(path):
    """What may have become of a statistics file: (how, a function that does it, a part of the message)."""
    whole = path.read_bytes()
    tensors = load_file(path)
    about = {"format": "dittocache-statistics-1", "method": "goc", "settings": {}, "record": {}}

    def saved(meta, **more):
        save_file({**tensors, **more}, path, metadata={"dittocache": meta})

    return {
        "truncated": (lambda: path.write_bytes(whole[:-7]), "is damaged"),
        "header only": (lambda: path.write_bytes(whole[:9]), "is damaged"),
        "empty": (lambda: path.write_bytes(b""), "is damaged"),
        "text": (lambda: path.write_text("hello"), "is damaged"),
        "foreign tensors": (lambda: save_file({"a": torch.ones(2)}, path), "not of this format"),
        "foreign format": (lambda: saved(json.dumps(about | {"format": "else", "samples": [0]})), "not of this format"),
        "broken description": (lambda: saved("{"), "is damaged"),
        "no samples": (lambda: saved(json.dumps(about | {"samples": []})), "no samples"),
        "odd samples": (lambda: saved(json.dumps(about | {"samples": ["a"]})), "every entry of samples"),
        "no list": (lambda: saved(json.dumps(about | {"samples": 3})), "is damaged"),
        "odd settings": (lambda: saved(json.dumps(about | {"samples": [0], "settings": 3})), "settings"),
        "nan": (lambda: saved(json.dumps(about | {"samples": [0]}), bad=torch.tensor([torch.nan])), "not finite"),
    }


@pytest.mark.parametrize(
    "how",
    (
        "truncated",
        "header only",
        "empty",
        "text",
        "foreign tensors",
        "foreign format",
        "broken description",
        "no samples",
        "odd samples",
        "no list",
        "odd settings",
        "nan",
    ),
)
def test_damaged_statistics_are_one_line(pipe, how, tmp_path):
    recorded(pipe, "goc", 2, out=tmp_path)
    damage, message = damages(tmp_path / "statistics.safetensors")[how]
    damage()
    before = (tmp_path / "statistics.safetensors").read_bytes()
    for attempt in (
        lambda: Statistics.load(tmp_path),
        lambda: calibrate(pipe, "goc", 4, SETUP, out=tmp_path),
        lambda: merged(pipe, make("goc", {}), [tmp_path], SETUP),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value) and "statistics.safetensors" in str(caught.value)
    assert (tmp_path / "statistics.safetensors").read_bytes() == before


@pytest.mark.parametrize(("method", "lost"), [("eb-cache", "votes"), ("icc", "ff.net.2/out"), ("eoc", "ff@1#square")])
def test_statistics_without_some_of_their_sums_are_refused(pipe, method, lost):
    statistics = recorded(pipe, method, 2, **PARAMS[method])
    name = next(n for n in statistics.sums if n.endswith(lost))
    del statistics.sums[name]
    with pytest.raises(ValueError, match=re.escape(f"these statistics are incomplete: {name!r} is missing")):
        fit(pipe, make(method, PARAMS[method]), statistics, SETUP)


def test_what_does_not_add_up_is_refused(pipe, tmp_path):
    recorded(pipe, "goc", [0, 1], out=tmp_path / "a")
    recorded(pipe, "goc", [1, 2], out=tmp_path / "b")
    recorded(pipe, "goc", [3], settings_of(seed=1), out=tmp_path / "seed")
    recorded(pipe, "eoc", [3], out=tmp_path / "eoc")
    (tmp_path / "else").mkdir()
    calibrator = make("goc", {})
    for folders, message in (
        ("ab", "^sample 1 is in these statistics already$"),
        ("aa", "^sample 0 is in these statistics already$"),
        (["a", "seed"], r"^these statistics were recorded with setup\.seed = 1, not 50$"),
        (["a", "eoc"], "^these statistics are for 'eoc', not for 'goc'$"),
        (["a", "missing"], r"^'[^']*missing' holds no statistics: statistics\.safetensors is missing$"),
        (["a", "else"], "holds no statistics"),
        ([], "^there are no statistics to merge$"),
    ):
        with pytest.raises(ValueError, match=message):
            merged(pipe, calibrator, [tmp_path / f for f in folders], SETUP, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"setup\.seed = 50, not 2"):
        merged(pipe, calibrator, [tmp_path / "a"], settings_of(seed=2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"b' holds sample 2, which is not among those merged: merge it as well$"):
        merged(pipe, calibrator, [tmp_path / "a"], SETUP, tmp_path / "b")
    assert Statistics.load(tmp_path / "b").samples == (1, 2)
    for _ in range(2):  # a second time is no harm
        merged(pipe, calibrator, [tmp_path / "a"], SETUP, tmp_path / "out")


def test_adding_is_all_or_nothing():
    statistics = Statistics("goc", {}, (0,), {"a": torch.ones(2), "b": torch.ones(2)})
    for sums, message in (
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"^the statistics 'b' are \[3\], those so far \[2\]$"),
        ({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])}, r"^the statistics 'b' of samples \[1\] are not"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.add(sums, [1])
        assert statistics.samples == (0,) and torch.equal(statistics.sums["a"], torch.ones(2))


def test_a_fit_of_nothing_is_refused(pipe):
    calibrator = make("eoc", {})
    settings = recorded(pipe, samples=1).settings
    with pytest.raises(ValueError, match=r"^these statistics hold no samples: record some first$"):
        fit(pipe, calibrator, Statistics("eoc", settings), SETUP)


def test_folders_that_hold_something_else_are_refused(untouched, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    (root / "file").write_text("")
    (root / "full").mkdir()
    (root / "full" / "thesis.txt").write_text("all of it")
    dittocache.recipe("fora", interval=2).save_pretrained(root / "fora")
    dittocache.Recipe(when=dittocache.recipe("fora").when).save_pretrained(root / "own")
    for out, message in (
        ("file", r"file' cannot be a folder: '[^']*file' is a file$"),
        ("file/below/it", r"it' cannot be a folder: '[^']*file' is a file$"),
        ("full", "full' exists and holds something else: choose another folder$"),
        ("fora", "fora' holds a recipe of fora: choose another folder for goc$"),
        ("own", "own' holds a recipe of no method: choose another folder for goc$"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(untouched, "goc", 2, SETUP, out=root / out)
        with pytest.raises(ValueError, match=message):
            merged(untouched, make("goc", {}), [root], SETUP, out=root / out)


@pytest.mark.parametrize(
    ("text", "samples", "message"),
    [
        *((text, 9, f"a shard is given as NUMBER/OF, such as 1/4; got {text!r}")
          for text in ("", "1", "0/4", "5/4", "a/b", "1/0", "-1/4", "1/4/2", "²/3", "1.5/3", " 1/2")),
        ("3/4", 2, "shard 3/4 of 2 samples is empty"),
    ],
)  # fmt: skip
def test_shards_that_are_none(text, samples, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shard(samples, text)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_a_partition(count):
    parts = [shard(11, f"{n}/{count}") for n in range(1, count + 1)]
    assert sorted(itertools.chain(*parts)) == list(range(11))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_cannot_be_sampled_is_refused(pipe):
    text = text_pipeline()
    text.transformer.register_forward_pre_hook(lambda *a: pytest.fail("something was drawn"))
    for method in METHODS:
        with pytest.raises(ValueError, match=r"^TextPipeline draws from prompts: pass some as conditions$"):
            calibrate(text, method, 2, settings_of(conditions=()), **PARAMS[method])
        neither = tiny.LoopPipeline(tiny.dit(), DDIMScheduler())
        with pytest.raises(ValueError, match=r"^LoopPipeline takes neither class_labels nor prompt[^\n]*$"):
            calibrate(neither, method, 2, SETUP, **PARAMS[method])
        with pytest.raises(ValueError, match=r"^samples are drawn by a diffusers pipeline; DiT\w+ has no transformer$"):
            calibrate(tiny.dit(), method, 2, SETUP, **PARAMS[method])
    with pytest.raises(ValueError, match="class_labels contains 99"):
        calibrate(pipe, "goc", 2, settings_of(conditions=(99,)))
    assert tiny.traces_of_cache(pipe.transformer) == []


# ---- memory ---------------------------------------------------------------------------------------------------------
def live_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    tensors = [o for o in gc.get_objects() if isinstance(type(o), type) and issubclass(type(o), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("method", "params"),
    [
        pytest.param("goc", {}, marks=pytest.mark.slow),
        pytest.param("icc", {"rank": 4}, marks=pytest.mark.slow),
        ("icc", {"rank": 4, "factors": "change-svd"}),
        pytest.param("eoc", {"reuse_steps": (1, 3)}, marks=pytest.mark.slow),
    ],
)
def test_memory_grows_neither_with_steps_nor_with_samples(method, params, monkeypatch):
    pipe, seen, keep = tiny.pipeline(), {}, Recorder.keep
    with listening(pipe.transformer, MODULES) as heard:
        plain_draw(pipe, settings_of(num_steps=1), range(2))
    features_of_a_step = sum(out.nbytes for calls in heard.values() for out, _ in calls)
    del heard

    def measured(self, entry, value, at):
        keep(self, entry, value, at)
        if at.step == at.num_steps - 1 and at.site.name.endswith(("2.ff", "2.ff.net.2")):
            seen[key] = live_bytes()

    monkeypatch.setattr(Recorder, "keep", measured)
    for key in ((6, 2), (24, 2), (6, 6)):
        gc.collect()
        statistics = recorded(pipe, method, key[1], settings_of(num_steps=key[0]), 2, **params)
        assert statistics.samples == tuple(range(key[1]))
        del statistics
    base = seen[6, 2]
    assert base > 0
    growth = 6 * 2 * 8 * 18 if method == "goc" else 0  # two numbers for each site and step
    assert seen[24, 2] - base <= growth + 4096 < features_of_a_step
    # later batches find the sums of those before
    kept = recorded(pipe, method, 2, settings_of(num_steps=6), **params).bytes
    assert seen[6, 6] - base <= kept + 4096


def test_sums_of_eoc_grow_with_reused_steps_only(pipe):
    feature = 16 * 16 * 4 + 8
    for steps, reused in ((5, (1,)), (12, (1,)), (12, (1, 3, 5)), (5, (1, 2, 3, 4))):
        found = recorded(pipe, samples=3, setup=settings_of(num_steps=steps), reuse_steps=reused)
        assert found.bytes == len(MODULES) * len(reused) * feature
    assert recorded(pipe, "goc", 3).bytes == len(MODULES) * 5 * 2 * 8
    assert recorded(pipe, "eb-cache", 3).bytes == 5 * 4 * 8


# ---- recipes --------------------------------------------------------------------------------------------------------
SOME = {
    "eoc": {"theta": 0.5, "precision": "float32"},
    "goc": {"limit": -1.0, "judge": "cosine"},
    "icc": {"rank": 4},
    "eb-cache": {"delta_low": 0.1, "delta_high": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_recipes_say_what_they_are_for_and_how_they_were_made_and_survive_a_folder(pipe, method, tmp_path):
    made = calibrate(pipe, method, 3, SETUP, out=tmp_path, batch=2, **SOME[method])
    assert made.method == method
    assert made.made_for["model"] == "DiTTransformer2DModel" and made.made_for["scheduler"] == "DDIMScheduler"
    assert len(made.made_for["timesteps"]) == 5
    told = made.provenance
    assert told["samples"] == 3 and told["seconds"] > 0 and told["setup"] == SETUP.to_dict()
    assert told["memory"]["statistics"] == Statistics.load(tmp_path).bytes
    assert told["memory"]["peak of the process"] > 1e7
    assert {"torch", "diffusers", "dittocache", "python"} <= set(told["versions"]) and told["machine"]
    defaults = {n: p.default for n, p in CALIBRATORS[method].parameters().items() if p.type != "data"}
    assert told["calibration"] == defaults | SOME[method]

    again = dittocache.Recipe.from_pretrained(tmp_path)
    assert again == made and again.provenance["samples"] == 3
    pictures = []
    for what in (made, again, tmp_path, str(tmp_path)):
        with dittocache.enable(pipe, what) as cache:
            pictures.append(plain_draw(pipe, SETUP, [7, 8]))
            assert cache.report().compute_fraction < 0.9
    assert all(torch.equal(p, pictures[0]) for p in pictures)
    assert tiny.relative(pictures[0], plain_draw(pipe, SETUP, [7, 8])) > 1e-4
    assert {p.name for p in tmp_path.iterdir()} <= {
        "README.md", "recipe.json", "recipe.safetensors", "statistics.json", "statistics.safetensors"
    }  # fmt: skip
    assert json.loads((tmp_path / "statistics.json").read_text())["samples"] == [0, 1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_refused_elsewhere(pipe, method):
    made = calibrate(pipe, method, 2, SETUP, **SOME[method])
    for other, message in (
        (tiny.pipeline(1), "with other weights"),
        (text_pipeline(), "made for DiTTransformer2DModel, not for PixArtTransformer2DModel"),
        (tiny.pipeline(scheduler=EulerDiscreteScheduler()), "made for DDIMScheduler, not for EulerDiscreteScheduler"),
    ):
        with pytest.raises(ValueError, match=message):
            dittocache.enable(other, made)
        assert tiny.traces_of_cache(other.transformer) == []
    with dittocache.enable(pipe, made), pytest.raises(ValueError, match="made for 5 steps, but this run has 6"):
        plain_draw(pipe, settings_of(num_steps=6), [0])
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    with dittocache.enable(pipe, made), pytest.raises(ValueError, match="made for timesteps"):
        plain_draw(pipe, settings_of(), [0])


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_trends_are_stored_in_the_precision_that_was_asked_for(pipe, precision, size, tmp_path):
    made = calibrate(pipe, "eoc", 3, SETUP, out=tmp_path, precision=precision)
    expected = {n: v / 3 for n, v in expected_eoc(pipe, SETUP, range(3), (1, 3)).items() if "#" not in n}
    assert set(made.fill.trend) == set(expected)
    for name, value in expected.items():
        assert made.fill.trend[name].dtype == getattr(torch, precision)
        assert tiny.relative(made.fill.trend[name].float(), value) < {4: 1e-5, 2: 5e-3}[size]
    tensors = 12 * 16 * 16 * size
    assert made.fill.trend.bytes == tensors
    assert tensors < (tmp_path / "recipe.safetensors").stat().st_size < tensors + 3000  # the header


def picture_errors(pipe, statistics, steps, samples, **params):
    """Mean squared distance to the uncached pictures of a run that corrects some steps only, drawn by hand."""
    count = len(statistics.samples)
    trend = {
        name: (value / count).half()
        for name, value in statistics.sums.items()
        if "#" not in name and int(name.partition("@")[2]) in steps
    }
    reference = plain_draw(pipe, NINE, samples).double()
    with dittocache.enable(pipe, "eoc", trend=trend, **params):
        return float((plain_draw(pipe, NINE, samples).double() - reference).square().mean())


NINE = settings_of(num_steps=9)


def test_trials_keep_the_steps_that_bring_pictures_closer(pipe):
    statistics = recorded(pipe, samples=3, setup=NINE)
    judged = set()
    for theta in (0.05, -0.3):
        kept, best = (), picture_errors(pipe, statistics, (), range(3), theta=theta)
        for step in (1, 3, 5, 7):
            error = picture_errors(pipe, statistics, (*kept, step), range(3), theta=theta)
            if error < best:
                kept, best = (*kept, step), error
        made = fit(pipe, make("eoc", {"judge": "trial", "theta": theta}), statistics, NINE)
        assert sorted({int(name.partition("@")[2]) for name in made.fill.trend}) == list(kept)
        judged.add(kept)
    assert tiny.traces_of_cache(pipe.transformer) == []
    assert len(judged) == 2 and any(0 < len(kept) < 4 for kept in judged)  # some were kept, some were not


def test_trials_are_of_the_samples_they_are_given(pipe):
    statistics = recorded(pipe, samples=4, setup=NINE)
    made = fit(pipe, make("eoc", {"theta": 0.3}), statistics, NINE)
    errors = [Trial(pipe, NINE, samples).error(made) for samples in ([0, 1], [2, 3], [0, 1, 2, 3])]
    assert errors[0] != errors[1]
    assert errors[2] == pytest.approx((errors[0] + errors[1]) / 2)
    assert Trial(pipe, NINE, [0, 1, 2, 3], batch=3).error(made) == pytest.approx(errors[2], rel=1e-5)
    steps = {1, 3, 5, 7}
    assert errors[0] == pytest.approx(picture_errors(pipe, statistics, steps, [0, 1], theta=0.3), rel=1e-4)


def test_trials_of_a_pipeline_that_gives_arrays(pipe, monkeypatch):
    """Whatever output type is asked for, as diffusers' DiTPipeline did for long."""
    statistics = recorded(pipe, samples=2, setup=NINE)
    made = fit(pipe, make("eoc", {"theta": 0.3}), statistics, NINE)
    error = Trial(pipe, NINE, [0, 1], batch=1).error(made)
    monkeypatch.setattr("dittocache.calibrate.trial.draw", lambda *arguments: draw(*arguments).numpy())
    assert Trial(pipe, NINE, [0, 1], batch=1).error(made) == pytest.approx(error)


def test_trials_that_keep_nothing_leave_a_recipe_that_can_be_read(pipe, tmp_path):
    """The folder held tensors before: those of the recipe without trials."""
    calibrate(pipe, "eoc", 3, SETUP, out=tmp_path, theta=-50.0)
    assert (tmp_path / "recipe.safetensors").exists()
    made = calibrate(pipe, "eoc", 3, SETUP, out=tmp_path, theta=-50.0, judge="trial")
    assert len(made.fill.trend) == 0  # such a correction is never worth it
    assert dittocache.Recipe.from_pretrained(tmp_path) == made
    with dittocache.enable(pipe, tmp_path):
        held = plain_draw(pipe, SETUP, [0])
    with dittocache.enable(pipe, "fora", interval=2, anchor="start"):
        assert torch.equal(plain_draw(pipe, SETUP, [0]), held)


@pytest.mark.parametrize("seed", range(8))
def test_no_trend_is_left_out_unless_asked_for(pipe, seed):
    """Whatever the smallest relative trend is; and a share of them is left out from the small end."""
    statistics = recorded(pipe, samples=1)
    generator = torch.Generator().manual_seed(seed)
    ratios = {}
    for name in [n for n in statistics.sums if "#" not in n]:
        value = torch.randn(16, 16, generator=generator)
        statistics.sums[name] = value
        statistics.sums[f"{name}#square"] = torch.rand((), generator=generator, dtype=torch.float64) + 0.1
        ratios[name] = float(value.double().norm() / statistics.sums[f"{name}#square"].sqrt())
    largest = sorted(ratios, key=ratios.get, reverse=True)
    for share, count in ((0.0, 12), (0.5, 6), (0.75, 3), (1.0, 1)):
        made = fit(pipe, make("eoc", {"size_quantile": share}), statistics, SETUP)
        assert set(made.fill.trend) == set(largest[:count])


def test_goc_corrects_reused_steps_with_a_cosine_above_the_limit(pipe):
    setup = settings_of(num_steps=12)
    statistics = recorded(pipe, "goc", 3, setup)
    cosines = CALIBRATORS["goc"].cosines(statistics)
    found = []
    for limit in (-1.0, float(cosines[5]), float(cosines[3:].median()), 0.0, 1.0):
        made = fit(pipe, make("goc", {"limit": limit, "eta": 0.7, "judge": "cosine"}), statistics, setup)
        assert made.fill.positions == tuple(k for k in (3, 5, 7, 9, 11) if float(cosines[k]) > limit)
        assert made.fill.eta == 0.7 and made.params["base"] == "static"
        found.append(made.fill.positions)
    assert found[0] == (3, 5, 7, 9, 11) and 5 not in found[1] and found[-1] == () and len(set(found)) > 2
    logits = torch.full((12, 6), 5.0)
    logits[[11 - 3, 11 - 7]] = -5.0  # the steps 3 and 7; on L2C both modules of a block must be reused
    made = fit(pipe, make("goc", {"limit": -1.0, "router_logits": logits, "judge": "cosine"}), statistics, setup)
    assert made.fill.positions == (3, 7) and made.fill.require_both and made.fill.eta == 0.8


def test_icc_has_a_rank_for_every_kind_and_holds_the_others(pipe):
    made = calibrate(pipe, "icc", 2, SETUP, rank={"q": 3, "fc2": 5})
    shapes = {name.rpartition("/")[2]: tuple(t.shape) for name, t in made.fill.factors.items() if "fc2" not in name}
    names = {name.rpartition("/")[0] for name in made.fill.factors}
    assert names == {n for n in linears(pipe.transformer) if n.endswith(("to_q", "net.2"))}
    for name, tensor in made.fill.factors.items():
        rank = 3 if "to_q" in name else 5
        assert tensor.shape[1 if name.endswith("/A") else 0] == rank
    assert shapes
    held = calibrate(pipe, "icc", 2, SETUP, rank={"v": 16})
    with dittocache.enable(pipe, held) as cache:
        plain_draw(pipe, SETUP, [0])
    assert cache.report().compute_fraction < 1


@pytest.mark.parametrize("factors", ["svd", "activation-svd", "change-svd"])
def test_icc_with_factors_of_full_rank_draws_the_uncached_pictures(pipe, factors):
    reference = plain_draw(pipe, SETUP, [7, 8])
    errors = []
    for rank in (16, 12, 4, 1):
        with dittocache.enable(pipe, calibrate(pipe, "icc", 2, SETUP, rank=rank, factors=factors)) as cache:
            errors.append(tiny.relative(plain_draw(pipe, SETUP, [7, 8]), reference))
        assert cache.trace.table.min() == 0
    assert errors[0] < 1e-4 < 1e-3 < errors[2] < errors[3]


def test_svd_draws_nothing(untouched):
    for samples in (0, 5):
        made = calibrate(untouched, "icc", samples, settings_of(conditions=()), factors="svd", rank=3)
        assert made.provenance["samples"] == 0
    weight = untouched.transformer.transformer_blocks[1].ff.net[0].proj.weight.detach()
    a, b = (made.fill.factors[f"transformer_blocks.1.ff.net.0.proj/{letter}"] for letter in "AB")
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    assert tiny.relative((a @ b).double(), u[:, :3] * s[:3] @ v[:3]) < 1e-5


def test_weights_of_channels_come_from_the_statistics(pipe):
    """The factors minimise the error weighted with the means that were recorded, by the definition in the paper."""
    statistics = recorded(pipe, "icc", 3, rank=4)
    made = fit(pipe, make("icc", {"rank": 4}), statistics, SETUP)
    name = "transformer_blocks.1.attn1.to_v"
    left, right = ((expected_icc(pipe, SETUP, range(3), False)[f"{name}/{side}"] / 15).sqrt() for side in ("out", "in"))
    left, right = (w.clamp(min=float(w.max()) / 1000) + 1e-6 for w in (left, right))
    weight = pipe.transformer.get_submodule(name).weight.detach().double()
    u, s, v = torch.linalg.svd(left[:, None] * weight * right, full_matrices=False)
    best = (u[:, :4] * s[:4] @ v[:4]) / left[:, None] / right
    product = (made.fill.factors[f"{name}/A"] @ made.fill.factors[f"{name}/B"]).double()
    assert tiny.relative(product, best) < 1e-3
    plain = calibrate(pipe, "icc", 0, SETUP, rank=4, factors="svd").fill.factors
    assert tiny.relative((plain[f"{name}/A"] @ plain[f"{name}/B"]).double(), best) > 1e-2


def test_eb_cache_recipes_hold_the_table_and_the_noise_correction(pipe):
    params = {"delta_low": 0.1, "delta_high": 0.3, "noise_scale": 0.97, "noise_bias": True}
    statistics = recorded(pipe, "eb-cache", 4, **params)
    made = fit(pipe, make("eb-cache", params), statistics, SETUP)
    assert made.params["table"] == tuple(int(row.argmax()) for row in statistics.sums["votes"])
    assert set(made.params["table"]) != {0} and made.params["table_order"] == "sampling"
    assert made.fix.divisor == 0.97 and made.fix.bias is True


@pytest.mark.parametrize("method", METHODS)
def test_text_pipelines_are_calibrated_from_prompts(method, tmp_path):
    pipe, setup = text_pipeline(), settings_of(conditions=("a cat", "two dogs"), guidance_scale=4.0)
    made = calibrate(pipe, method, 3, setup, out=tmp_path, **SOME[method])
    assert pipe.drawn == ["a cat", "two dogs", "a cat"] or method == "eb-cache"
    assert made.provenance["setup"]["conditions"] == ["a cat", "two dogs"]
    reference = plain_draw(pipe, setup, [5])
    with dittocache.enable(pipe, tmp_path) as cache:
        assert tiny.relative(plain_draw(pipe, setup, [5]), reference) > 1e-6
        assert cache.report().compute_fraction < 1


# ---- the command ----------------------------------------------------------------------------------------------------
@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("eoc", ["-p", "theta=0.1", "-p", "precision=bfloat16"]),
        ("goc", ["-p", "limit=-1", "-p", "reuse_steps=(1,3)"]),
        ("icc", ["-p", "rank={'fc1': 8}"]),
        ("eb-cache", ["-p", "delta_high=0.5", "-p", "noise_bias=true"]),
    ],
)
def test_calibrate_writes_a_recipe_that_sample_takes(command, method, more, tmp_path):
    arguments = ["calibrate", method, "--samples", 2, "--steps", 4, "--out", "out", *more]
    found = json.loads(command(*arguments, "--json").stdout)
    assert found["provenance"]["samples"] == 2 and found["recipe"].startswith(method)
    first = (tmp_path / "out" / "statistics.safetensors").read_bytes()
    text = command(*arguments).stdout  # a second time: all is there
    assert "2 samples" in text and "peak of the process" in text and "MiB" in text and "'out'" in text
    assert (tmp_path / "out" / "statistics.safetensors").read_bytes() == first
    drawn = json.loads(command("sample", "--labels", "A", "--steps", 4, "--method", "out", "--json").stdout)
    assert drawn["report"]["recipe"].startswith(method) and drawn["report"]["compute_fraction"] < 1
    error = command("sample", "--labels", "A", "--steps", 5, "--method", "out", code=2).stderr
    assert error.count("\n") == 1 and "made for 4 steps" in error


def test_shards_of_the_command_are_merged(command, tmp_path):
    base = ["calibrate", "goc", "--steps", 4, "--samples", 3, "--condition", "1", "--condition", "20", "--json"]
    command(*base, "--out", "whole")
    for n in (1, 2):
        command(*base, "--shard", f"{n}/2", "--out", f"part{n}")
    assert Statistics.load(tmp_path / "part1").samples == (0, 2)
    found = json.loads(command(*base, "--merge", "part2", "--merge", "part1", "--out", "merged").stdout)
    assert found["provenance"]["samples"] == 3 and found["provenance"]["memory"]["statistics"] > 0
    close(Statistics.load(tmp_path / "merged").sums, Statistics.load(tmp_path / "whole").sums)
    command(*base, "--merge", "part1", "--merge", "part2", "--out", "merged")
    error = command(*base, "--merge", "part1", "--merge", "part1", "--out", "twice", code=2).stderr
    assert "sample 0 is in these statistics already" in error and not (tmp_path / "twice").exists()


def test_parameters_need_no_folder(command):
    for method in METHODS:
        text = command("calibrate", method, "--parameters").stdout
        known = CALIBRATORS[method].parameters()
        assert all(name in text for name in known)
        found = json.loads(command("calibrate", method, "--parameters", "--json").stdout)
        assert set(found) == set(known) and all(entry["help"] for entry in found.values())


def test_help_is_readable(command):
    text = command("calibrate", "--help").stdout
    for word in ("eoc, goc, icc or eb-cache", "--shard", "--merge", "--parameters", "Examples"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope", "--out", "out"], f"'nope' is not calibrated; these are: {KNOWN}"),
        (["eoc"], "--out is missing"),
        (["eoc", "--out", "out", "-p", "speed=2"], "calibrating eoc has no parameter 'speed'; known: interval"),
        (["eoc", "--out", "out", "-p", "interval=x"], "interval must be a whole number, 1 or more; got 'x'"),
        (["eoc", "--out", "out", "-p", "interval"], "a parameter is NAME=VALUE, not 'interval'"),
        (["eoc", "--out", "out", "--merge", "nowhere"], "'nowhere' holds no statistics"),
        (["eoc", "--out", "out", "--merge", "full"], "'full' holds no statistics"),
        (["eoc", "--out", "out", "--merge", "full", "--shard", "1/2"], "give one of them"),
        (["eoc", "--out", "full"], "'full' exists and holds something else: choose another folder"),
        (["eoc", "--out", "full/thesis.txt"], "cannot be a folder"),
        (["eoc", "--out", "out", "--shard", "half"], "a shard is given as NUMBER/OF, such as 1/4; got 'half'"),
        (["eoc", "--out", "out", "--shard", "3/3", "--samples", "2"], "shard 3/3 of 2 samples is empty"),
        (["eoc", "--out", "out", "--samples", "0"], "samples must be a whole number, 1 or more; got 0"),
        (["eoc", "--out", "out", "--steps", "1"], "the schedule reuses nothing in 1 steps"),
        (["eoc", "--out", "out", "--condition", "99"], "class_labels contains 99"),
        (["eoc", "--out", "out", "--guidance", "nan"], "guidance_scale must be a number that is finite"),
        (["eoc", "--out", "out", "--model", "nope"], "unknown bundled model 'nope'"),
        (["eoc", "--out", "out", "--model", "full"], "'full' holds no pipeline: model_index.json is missing"),
        (["icc", "--out", "out", "-p", "rank=1000"], "rank is 1000, but"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(command, arguments, message, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    result = command("calibrate", *arguments, code=2)
    assert result.stdout == "" and result.stderr.startswith("Error: ") and message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_the_command_takes_a_saved_pipeline(command, bundled_pipe, tmp_path):
    bundled_pipe.save_pretrained(tmp_path / "model")
    command("calibrate", "goc", "--samples", 1, "--steps", 3, "--model", "model", "--out", "out")
    assert dittocache.Recipe.from_pretrained(tmp_path / "out").method == "goc"


# ---- choices by trial, and the default rank -------------------------------------------------------------------------
def test_goc_s_positions_by_trial_are_those_that_bring_trials_closer(pipe):
    setup = Setup(num_steps=8)
    found = calibrate(pipe, "goc", 4, setup, eta=1.2, judge="trial", trial_samples=4, limit=-1.0)
    trial = Trial(pipe, setup, range(4))

    def error(steps):
        return trial.error(dittocache.recipe("goc", eta=1.2, correct_steps=sorted(steps)))

    kept, best = set(), error(set())
    for step in (3, 5, 7):
        if error({*kept, step}) < best:
            kept, best = {*kept, step}, error({*kept, step})
    assert set(found.fill.positions) == kept
    assert error(kept) <= error({3, 5, 7})


def test_icc_s_default_rank_is_a_ninth_of_the_layer_s(pipe):
    found = calibrate(pipe, "icc", 0, Setup(num_steps=4), factors="svd")
    for entry in dittocache.describe(pipe.transformer).linears:
        full = min(entry.module.weight.shape)
        assert found.fill.factors[f"{entry.site.name}/A"].shape[1] == max(1, round(full / 9))


def test_eoc_s_statistics_depend_on_what_the_schedule_is_made_of_and_on_nothing_else():
    logits = torch.full((5, 6), -9.0)
    routed = make("eoc", {"router_logits": logits, "threshold": 0.9}).settings()
    assert routed != make("eoc", {"router_logits": logits, "threshold": 0.1}).settings()
    assert routed != make("eoc", {"router_logits": -logits, "threshold": 0.9}).settings()
    assert routed == make("eoc", {"router_logits": logits, "threshold": 0.9, "interval": 5, "theta": 1.0}).settings()
    listed = make("eoc", {"reuse_steps": (1, 3)}).settings()
    assert listed == make("eoc", {"reuse_steps": [1, 3], "threshold": 0.5, "interval": 4}).settings()
    assert make("eoc", {}).settings() == make("eoc", {"threshold": 0.5, "judge": "trial"}).settings() != listed
