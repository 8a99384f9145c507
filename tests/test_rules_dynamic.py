"""The rules of TeaCache, First Block Cache, DiCache, MagCache and PAB written out once more, over random parameters.

The first three are run over FLUX, whose blocks are in two lists and carry a stream of text: the trunk is walked by
hand, with one decision for the batch, as their authors' programs for it do. The schedules of MagCache and PAB are made
of numbers alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import factorial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp
from torch import Tensor, nn

import dittocache
from dittocache.methods.teacache import POLYNOMIALS
from dittocache.plan import Site
from dittocache.when import Broadcast, RatioBudget

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped nothing")
STEPS = (1, 2, 9, 14, 14, 14)
SEEDS = range(12)


class Reference:
    """A run over FLUX, one guidance branch: `rule` says what leaves the last block, `computed` what was computed."""

    def __init__(self, model: Any, steps: int, params: dict[str, Any]) -> None:
        self.model, self.steps, self.params, self.k = model, steps, params, -1
        self.computed: list[bool] = []
        self.total = 0.0
        self.last: Any = None  # what the next step is compared with
        self.full: list[tuple[int, Tensor, Tensor]] = []  # steps that were computed: k, residual, probe
        self.ladder: list[Tensor] = []

    def __call__(self, x: Tensor, time: float, given: dict[str, Tensor]) -> Tensor:
        self.k += 1
        model, all_given = self.model, tiny.inputs(self.model, x, time, given)
        state = model.x_embedder(x), model.context_embedder(given["encoder_hidden_states"])
        self.temb = model.time_text_embed(all_given["timestep"] * 1000, given["pooled_projections"])
        self.rotary = model.pos_embed(torch.cat([all_given["txt_ids"], all_given["img_ids"]]))
        return model.proj_out(model.norm_out(self.rule(*state), self.temb))

    def blocks(self, h: Tensor, text: Tensor, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        for block in [*self.model.transformer_blocks, *self.model.single_transformer_blocks][first:last]:
            text, h = block(hidden_states=h, encoder_hidden_states=text, temb=self.temb, image_rotary_emb=self.rotary)
        return h, text

    def rule(self, h: Tensor, text: Tensor) -> Tensor:
        raise NotImplementedError

    def below(self, error: float, strict: bool = True) -> bool:
        """Adds up; forgets it where it is not below the threshold."""
        self.total += error
        below = self.total < self.params["threshold"] or (not strict and self.total == self.params["threshold"])
        self.total = self.total if below else 0.0
        return below


def change(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


class TeaCache(Reference):
    def rule(self, h: Tensor, text: Tensor) -> Tensor:
        modulated = self.model.transformer_blocks[0].norm1(h, emb=self.temb)[0]
        early, late = self.k < self.params.get("first_full", 1), self.k == self.steps - 1
        if early or (late and self.params.get("last_full", True)):
            self.total, skip = 0.0, False
        else:
            skip = self.below(float(np.poly1d(self.params["coefficients"])(change(modulated, self.last))))
        self.last = modulated
        self.computed.append(not skip)
        if not skip:
            self.full = [(self.k, self.blocks(h, text)[0] - h, h)]
        return h + self.full[-1][1]


class FirstBlock(Reference):
    def rule(self, h: Tensor, text: Tensor) -> Tensor:
        first, first_text = self.blocks(h, text, 0, 1)
        added, order = (first - h)[..., :: self.params["downsample_factor"]], self.params["order"]
        skip = self.k >= max(1, self.params["warmup_steps"]) and change(added, self.last) < self.params["threshold"]
        self.computed.append(not skip)
        if skip:
            since = self.k - self.full[-1][0]
            return first + sum(rung * since**j / factorial(j) for j, rung in enumerate(self.ladder))
        self.last = added
        rungs = [self.blocks(first, first_text, 1)[0] - first]
        for j in range(min(order or 0, len(self.ladder)) if self.k > 1 else 0):
            rungs.append((rungs[j] - self.ladder[j]) / (self.k - self.full[-1][0]))
        self.ladder = rungs
        self.full = [(self.k, rungs[0], first)]
        return first + rungs[0]


class DiCache(Reference):
    def rule(self, h: Tensor, text: Tensor) -> Tensor:
        p = self.params
        probed, probed_text = self.blocks(h, text, 0, p["probe_depth"])
        early = int(p["retention"] * self.steps) + (1 if p["warmup_inclusive"] else 0)
        if self.k < max(1, early) or (p["last_step_full"] and self.k == self.steps - 1):
            self.total, skip = 0.0, False
        else:
            error = change(probed, self.last[1])
            error = abs(error - change(h, self.last[0])) if p["error"] == "difference" else error
            skip = self.below(error, p["strict"])
        self.last, probe = (h, probed), probed - h
        self.computed.append(not skip)
        if not skip:
            self.full.append((self.k, self.blocks(probed, probed_text, p["probe_depth"])[0] - h, probe))
        newest = self.full[-1]
        if not skip or len(self.full) == 1:
            return h + newest[1]
        before = self.full[-2]
        gain = float((probe - before[2]).abs().mean() / (newest[2] - before[2]).abs().mean())
        return h + before[1] + float(np.clip(gain, 1, p["max_gain"])) * (newest[1] - before[1])


def of_teacache(r: random.Random) -> dict[str, Any]:
    polynomials = [(0.0, 0.0, 0.0, 1.0, 0.0), (-20.0, 9.0, -2.0, 1.5, r.uniform(-0.05, 0.05)), POLYNOMIALS["flux"]]
    first_full, last_full = r.choice([1, 1, 3]), r.random() < 0.7
    return {
        "threshold": r.uniform(0.1, 0.9),
        "coefficients": r.choice(polynomials),
        "first_full": first_full,
        "last_full": last_full,
    }


def of_first_block(r: random.Random) -> dict[str, Any]:
    return {
        "threshold": r.uniform(0.15, 0.9),
        "warmup_steps": r.choice([0, 0, 1, 2, 4]),
        "downsample_factor": r.choice([1, 2, 5]),
        "order": r.choice([None, 1, 2, 3]),
    }


def of_dicache(r: random.Random) -> dict[str, Any]:
    error = r.choice(["probe", "difference"])
    return {
        "threshold": r.uniform(0.1, 0.8) / (1 if error == "probe" else 4),
        "error": error,
        "probe_depth": 1,
        "retention": r.choice([0.0, 0.07, 0.1, 0.2, 0.29, 0.5]),
        "warmup_inclusive": r.random() < 0.5,
        "strict": r.random() < 0.5,
        "last_step_full": r.random() < 0.5,
        "max_gain": r.choice([1.0, 1.5, 2.0]),
    }


RULES: dict[str, tuple[type[Reference], Callable[[random.Random], dict[str, Any]]]] = {
    "teacache": (TeaCache, of_teacache),
    "fbcache": (FirstBlock, of_first_block),
    "dicache": (DiCache, of_dicache),
}


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return tiny.flux()


def noise(model: nn.Module, steps: int, seed: int) -> Tensor:
    """Latents [steps, 2, ...] that wander at a pace of their own in every step."""
    generator = torch.Generator().manual_seed(seed)
    pace = 0.02 + 0.25 * torch.rand(steps, generator=generator)
    moves = torch.randn(steps, *tiny.latents(model).shape, generator=generator)
    return tiny.latents(model, seed=seed) + (pace.view(-1, 1, 1, 1) * moves).cumsum(0)


@torch.no_grad()
def compared(model: nn.Module, method: str, seed: int) -> np.ndarray:
    """One random recipe against its reference, without guidance or with guidance in two calls: what was computed."""
    r = random.Random(seed)
    reference, drawn = RULES[method]
    steps, params, latents = r.choice(STEPS), drawn(r), noise(model, STEPS[-1], seed)
    prompts = [tiny.condition(model, seed=branch) for branch in ([0, -1] if r.random() < 0.3 else [0])]
    references = [reference(model, steps, params) for _ in prompts]
    times = [990 - 9 * k for k in range(steps)]
    wanted = [
        [one(x, t, prompt) for one, prompt in zip(references, prompts, strict=True)]
        for x, t in zip(latents, times, strict=False)
    ]
    with dittocache.enable(model, method, batch="batch", **params) as cache, cache.run(steps):
        for k, theirs in enumerate(wanted):
            cache.step(k)
            for prompt, right in zip(prompts, theirs, strict=True):
                found = tiny.call(model, tiny.inputs(model, latents[k], times[k], prompt))
                assert tiny.relative(found, right) < 1e-5, f"step {k} of {steps}: {params}"
    masks = np.array([one.computed for one in references], dtype=float)
    np.testing.assert_array_equal(cache.trace.table[:, -1], masks.mean(0), err_msg=str(params))
    return masks


@pytest.mark.parametrize("method", RULES)
def test_over_flux(flux: nn.Module, method: str) -> None:
    """Also that the draws are of use: most long runs skip and compute between their ends, branches differ somewhere."""
    masks = [compared(flux, method, seed) for seed in SEEDS]
    shares = [one[:, 1:-1].mean() for one in masks if one.shape[1] > 2]
    assert sum(0 < share < 1 for share in shares) > len(shares) / 2
    assert any((one != one[0]).any() for one in masks)


# ---- numbers alone --------------------------------------------------------------------------------------------------
SPATIAL = Site("blocks.0.attn", "attention", "blocks", 0, 1, 0)
CROSS = Site("blocks.0.cross_attn", "cross-attention", "blocks", 0, 1, 0)
SITES = (SPATIAL, Site("temporal_blocks.0.attn", "attention", "temporal_blocks", 0, 1, 0), CROSS)


def by_ratios(ratios: list[float], steps: int, threshold: float, max_skip: int, retention: float) -> list[bool]:
    """MagCache in torch's arithmetic, which ties depend on."""
    table = torch.tensor(ratios)
    table = table if len(table) == steps else nearest_interp(table, steps)
    computed = []
    product: Any = 1.0
    error, count = product - 1.0, 0
    for k in range(steps):
        skip = False
        if k >= int(retention * steps + 0.5):
            product, count = product * table[k], count + 1
            error += abs(1.0 - product)
            skip = k > 0 and bool(error <= threshold) and count <= max_skip
            if not skip:
                product, error, count = 1.0, 0.0, 0
        computed.append(not skip)
    return computed


def test_ratios_with_ties() -> None:
    r, skipped = random.Random(0), 0
    for _ in range(600):
        steps = r.choice([1, 2, 5, 10, 20, 28])
        length = r.choice([steps, steps, 1, 7, 28])
        moves = [r.choice([0.0, 0.01, -0.01, 0.02, -0.03, 0.0625]) if r.random() < 0.7 else r.gauss(0, 0.05)]
        moves += [r.choice([0.0, 0.01, -0.01, 0.02, -0.03, 0.0625]) for _ in range(length - 1)]
        ratios = [1 + move for move in moves]
        threshold, max_skip = r.choice([0.0, 0.01, 0.03, 0.06, 0.0625, 0.12, 1.0]), r.choice([0, 1, 3, 5, 30])
        retention = r.choice([0.0, 0.1, 0.125, 0.2, 0.25, 0.29, 0.58, 1.0])
        when = RatioBudget(tuple(ratios), threshold, max_skip, retention)
        expected = by_ratios(ratios, steps, threshold, max_skip, retention)
        assert (when.table(steps, [SPATIAL])[:, 0] == 1).tolist() == expected, (steps, when)
        skipped += steps - sum(expected)
    assert skipped > 1000


def test_ratios_for_any_number_of_steps() -> None:
    for length in range(1, 40):
        ratios = torch.arange(1, length + 1.0)
        for steps in (n for n in range(1, 40) if n != length):
            expected = nearest_interp(ratios, steps).tolist()
            assert RatioBudget(tuple(ratios.tolist())).at(steps).tolist() == expected, (length, steps)


def test_flux_comes_with_its_ratios() -> None:
    published = dittocache.methods()["magcache"].settings["FLUX.1, ratios of 28 steps"]
    np.testing.assert_array_equal(np.float32(published["ratios"]), FLUX_MAG_RATIOS.numpy())


def test_broadcast_at_random() -> None:
    """A count of calls that never starts anew, and a range without its ends."""
    r = random.Random(1)
    for _ in range(200):
        steps = r.choice([1, 2, 10, 20, 31])
        times = [round(1000 * (1 - k / steps) ** r.choice([1, 2]), 3) for k in range(steps)]
        rules = [(r.choice([None, 1, 2, 3, 7]), tuple(sorted(r.sample([0, *times, 1000], 2)))) for _ in SITES]
        when = Broadcast(*(value for rule in rules for value in rule))  # type: ignore[arg-type]
        table = when.timed(times).table(steps, SITES)
        for column, (interval, (low, high)) in zip(table.T, rules, strict=True):
            held, expected = False, []
            for k, t in enumerate(times):
                expected.append(interval is None or not held or not low < t < high or k % interval == 0)
                held = True
            assert (column == 1).tolist() == expected, (times, interval, low, high)
