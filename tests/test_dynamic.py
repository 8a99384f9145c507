"""TeaCache, First Block Cache and DiCache: their rules in plain Python, alone and in batches, and what goes wrong."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import Tensor, nn

import dittocache
from dittocache import Recipe, hooks, recipe
from dittocache.calibrate import Setup, calibrate, make, merged, record, shard
from dittocache.calibrate.teacache import _by_sample
from dittocache.fill import Aligned, Entry
from dittocache.fill.base import At
from dittocache.hooks import Call
from dittocache.methods.teacache import POLYNOMIALS, Model
from dittocache.plan import COMPUTE, OPEN, Site
from dittocache.samples import Samples
from dittocache.when import Every, HeadChange, Look, ProbeChange, SignalChange, Table

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped nothing")
STEPS = 12
PACES = (0.02, 0.12, 0.4)  # of three samples

# thresholds at which the three samples are decided about differently
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacache": ("teacache", {"threshold": 0.25}),
    "teacache-polynomial": ("teacache", {"threshold": 0.5, "coefficients": (-2.0, 3.0, -1.5, 2.0, -0.01)}),
    "fbcache": ("fbcache", {"threshold": 0.2}),
    "fbcache-taylor": ("fbcache", {"threshold": 0.2, "order": 1, "warmup_steps": 3, "downsample_factor": 2}),
    "dicache": ("dicache", {"threshold": 0.25, "retention": 0.1}),
    "dicache-difference": ("dicache", {"threshold": 0.05, "error": "difference", "probe_depth": 2, "retention": 0.0}),
}
MODELS = ("dit", "pixart", "flux", "uvit")


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    return {name: tiny.build(name) for name in MODELS}


@pytest.fixture
def models(built: dict[str, nn.Module]) -> Any:
    """The models by name; what a failed test leaves on them is taken off, so that it fails alone."""
    yield built
    for model in built.values():
        for cache in hooks.caches_on(model):
            cache.disable()


# ---- inputs and runs ------------------------------------------------------------------------------------------------
def drift(model: nn.Module) -> Tensor:
    """Latents [STEPS, 3, ...]: the first sample hardly moves, the second does, the third moves a lot."""
    start = tiny.latents(model, 3, seed=1)
    generator = torch.Generator().manual_seed(2)
    pace = torch.tensor(PACES).view(1, 3, *[1] * (start.ndim - 1))
    return start + (pace * torch.randn(STEPS, *start.shape, generator=generator)).cumsum(0)


def forward(model: nn.Module, x: Tensor, k: int, rows: slice, guidance: str = "none", pace: int = 0) -> Tensor:
    """The prediction for some of the three samples, `pace` timesteps a step; of guidance, the sum of both halves."""
    yes, no = ({n: t[rows] for n, t in tiny.condition(model, 3, seed).items()} for seed in (0, -1))
    time = 950 - pace * k
    if guidance == "batched":
        both = {name: torch.cat([yes[name], no[name]]) for name in yes}
        return tiny.call(model, tiny.inputs(model, torch.cat([x[rows]] * 2), time, both)).unflatten(0, (2, -1)).sum(0)
    given = [yes] if guidance == "none" else [yes, no]
    return torch.stack([tiny.call(model, tiny.inputs(model, x[rows], time, one)) for one in given]).sum(0)


@torch.no_grad()
def outputs(
    model: nn.Module, chosen: Recipe | None, rows: slice = slice(None), guidance: str = "none", pace: int = 0
) -> tuple[Tensor, Any]:
    """Predictions [steps, samples, ...] on drifting inputs, and the trace; None: the plain model."""
    x, steps = drift(model), STEPS
    if chosen is None:
        return torch.stack([forward(model, x[k], k, rows, guidance, pace) for k in range(steps)]), None
    found = []
    with dittocache.enable(model, chosen) as cache, cache.run(steps):
        for k in range(steps):
            cache.step(k)
            found.append(forward(model, x[k], k, rows, guidance, pace))
    return torch.stack(found), cache.trace


def made(name: str, **params: Any) -> Recipe:
    method, own = METHODS[name]
    return recipe(method, **{**own, **params})


# ---- frozen input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "guidance"), [*((name, "none") for name in MODELS), ("dit", "batched"), ("dit", "separate")]
)
def test_frozen_input_is_exact_and_really_skipped(models: Any, name: str, method: str, guidance: str) -> None:
    model = models[name]
    x = tiny.latents(model)
    with torch.no_grad():
        expected = tiny.predict(model, x, 700, guidance)
        with tiny.Counter(model) as full:
            tiny.predict(model, x, 700, guidance)
        with dittocache.enable(model, made(method)) as cache, cache.run(STEPS), tiny.Counter(model) as counter:
            for k in range(STEPS):
                cache.step(k)
                assert tiny.relative(tiny.predict(model, x, 700, guidance), expected) < 1e-5, f"step {k}"
    done = cache.trace.table[:, -1].sum()
    assert 1 <= done <= 4
    # the first blocks were computed in every step if they are the head, all others only where the trace says so
    head = cache.recipe.when.head
    order = {entry.site.name: entry.site.order for entry in cache.description.entries}
    trunk = [block.name for block in cache.description.blocks]
    in_head = {trunk.index(block.name) for block in cache.description.blocks if _position(cache, block) < head}
    counted = 0
    for site, tokens in counter.tokens().items():
        if site in order:
            steps = STEPS if order[site] in in_head else done
            column = cache.trace.sites.index(
                next(e.site.stack for e in cache.description.entries if e.site.name == site)
            )
            steps = max(steps, cache.trace.table[:, column].sum())  # stacks that are all head
            assert tokens == steps * full.tokens()[site], site
            counted += 1
    assert counted > 2
    assert not tiny.traces_of_cache(model)


def _position(cache: Any, block: Any) -> int:
    """The block's place in the order of execution; all stacks of these models are main ones."""
    return [one.name for one in cache.description.blocks].index(block.name)


# ---- alone and in a batch -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", ["none", "batched", "separate"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_alone_equals_in_a_batch(models: Any, name: str, method: str, guidance: str) -> None:
    model, chosen = models[name], made(method)
    together, trace = outputs(model, chosen, guidance=guidance)
    table = trace.table[:, -1]
    assert ((table > 0) & (table < 1)).any(), "some samples must be computed beside skipped ones"
    assert (together - outputs(model, None, guidance=guidance)[0]).abs().max() > 1e-3
    shares = []
    for n in range(3):
        alone, own = outputs(model, chosen, slice(n, n + 1), guidance)
        torch.testing.assert_close(together[:, n : n + 1], alone, rtol=1e-4, atol=1e-5)
        shares.append(own.table[:, -1])
    # two guidance branches are decided about apart, so that a step may be computed in one of them
    np.testing.assert_allclose(table, np.mean(shares, axis=0), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_decision_for_a_batch_does_depend_on_it(models: Any, method: str) -> None:
    model, chosen = models["dit"], made(method, batch="batch")
    together, trace = outputs(model, chosen)
    assert set(trace.table[:, -1]) == {0, 1}
    alone, _ = outputs(model, chosen, slice(0, 1))
    assert (together[:, :1] - alone).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_halves_of_guidance_are_decided_as_one(models: Any, method: str) -> None:
    """With one sample there is one decision, whatever its two rows would want apart."""
    _, trace = outputs(models["dit"], made(method), slice(1, 2), "batched")
    assert set(trace.table[:, -1]) == {0, 1}


# ---- the rules in plain Python --------------------------------------------------------------------------------------
class Recorded(typing.NamedTuple):
    """An uncached run of one sample over tiny DiT or PixArt: lists over the steps."""

    modulated: list[Tensor]  # input of the first attention
    embedding: list[Tensor]  # what the first block is given
    states: list[list[Tensor]]  # before block 0, after it, after block 1, ...


@torch.no_grad()
def recorded(model: nn.Module, n: int, guidance: str = "none", pace: int = 0) -> Recorded:
    found, blocks = Recorded([], [], []), list(model.transformer_blocks)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.states.append([args[0].clone()])
        found.embedding.append(kwargs["timestep"].clone())

    def attend(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.modulated.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[0].attn1.register_forward_pre_hook(attend, with_kwargs=True),
    ]
    handles += [block.register_forward_hook(lambda m, a, out: found.states[-1].append(out.clone())) for block in blocks]
    outputs(model, None, slice(n, n + 1), guidance, pace)
    for handle in handles:
        handle.remove()
    return found


def relative_change(a: Tensor, b: Tensor) -> float:
    return float(np.abs(a.numpy() - b.numpy()).mean() / np.abs(b.numpy()).mean())


def teacache_rule(
    signal: list[Tensor], threshold: float, coefficients: Any, first_full: int = 1, last_full: bool = True
) -> list[bool]:
    computed, total = [], 0.0
    for k in range(len(signal)):
        if k < first_full or (last_full and k == len(signal) - 1):
            total = 0.0
            computed.append(True)
            continue
        total += float(np.poly1d(coefficients)(relative_change(signal[k], signal[k - 1])))
        if total < threshold:
            computed.append(False)
        else:
            total = 0.0
            computed.append(True)
    return computed


TEACACHE: list[dict[str, Any]] = [
    {"threshold": 0.3},
    {"threshold": 0.25, "first_full": 4, "last_full": False},
    {"threshold": 0.3, "coefficients": (0.0, 0.0, 4.0, 0.5, -0.005)},
    {"threshold": 0.4, "coefficients": (-30.0, 12.0, -1.0, 0.0, 0.15)},
    {"threshold": 0.1, "coefficients": (0.0, 0.0, 0.0, 5.0, -1.1)},  # falls below 0, and is not clamped
    {"threshold": 0.3, "model": "flux"},
]


@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("params", TEACACHE, ids=str)
def test_teacache_follows_its_rule(models: Any, params: dict[str, Any], n: int) -> None:
    polynomial = params.get("coefficients") or (POLYNOMIALS[params["model"]] if "model" in params else (1.0, 0.0))
    rule = {name: value for name, value in params.items() if name not in ("coefficients", "model")}
    expected = teacache_rule(recorded(models["dit"], n).modulated, coefficients=polynomial, **rule)
    _, trace = outputs(models["dit"], recipe("teacache", **params), slice(n, n + 1))
    assert trace.table[:, 0].tolist() == [float(one) for one in expected]


def masks(model: nn.Module, chosen: Recipe) -> tuple[tuple[float, ...], ...]:
    """Computed steps of every sample, alone."""
    return tuple(tuple(outputs(model, chosen, slice(n, n + 1))[1].table[:, 0]) for n in range(3))


def test_teacache_rules_are_told_apart(models: Any) -> None:
    """The cases above differ, also from what they would be with a clamp, and skip and compute between the ends."""
    found = [masks(models["dit"], recipe("teacache", **params)) for params in TEACACHE]
    assert len(set(found)) == len(found)
    assert all(0 < sum(mask[1:-1]) < STEPS - 2 for mask in (*found[0][1:], found[4][2]))
    assert found[1][1][-1] == 0, "the last step is not forced there"
    signal = recorded(models["dit"], 2).modulated
    changes = [relative_change(a, b) for a, b in zip(signal[1:], signal[:-1], strict=True)]
    assert min(changes) < 0.22 < max(changes), "the polynomial above takes both signs"
    total, clamped = 0.0, [1.0]
    for x in changes:
        total += max(5 * x - 1.1, 0)
        clamped.append(float(total >= 0.1))
        total = 0.0 if total >= 0.1 else total
    assert (*clamped[:-1], 1.0) != found[4][2]


@pytest.mark.parametrize("guidance", ["none", "batched"])
def test_teacache_by_the_embedding(models: Any, guidance: str) -> None:
    """The time is the same for all samples, and so is the decision; 4 of 950 steps at a time, the halves together."""
    signal = recorded(models["pixart"], 2, guidance, 4).embedding
    steps = [relative_change(a, b) for a, b in zip(signal[1:], signal[:-1], strict=True)]
    params = {"threshold": 3.5 * float(np.mean(steps)), "indicator": "embedding"}
    expected = teacache_rule(signal, params["threshold"], (1.0, 0.0))
    assert 0 < sum(expected[1:-1]) < STEPS - 2
    for rows in (slice(2, 3), slice(None)):
        _, trace = outputs(models["pixart"], recipe("teacache", **params), rows, guidance, 4)
        assert trace.table[:, 0].tolist() == [float(one) for one in expected]


def fbcache_rule(states: list[list[Tensor]], threshold: float, warmup: int = 0, stride: int = 1) -> list[bool]:
    computed: list[bool] = []
    reference = torch.zeros(0)
    for k, state in enumerate(states):
        added = (state[1] - state[0])[..., ::stride]
        skip = k > 0 and k >= warmup and relative_change(added, reference) < threshold
        computed.append(not skip)
        if not skip:
            reference = added
    return computed


def dicache_rule(
    states: list[list[Tensor]], threshold: float, retention: float, depth: int = 1, **variant: Any
) -> list[bool]:
    total, computed, steps = 0.0, [], len(states)
    for k in range(steps):
        early = k <= int(retention * steps) if variant.get("inclusive", True) else k < int(retention * steps)
        if k == 0 or early or (variant.get("last", True) and k == steps - 1):
            total = 0.0
            computed.append(True)
            continue
        dy = relative_change(states[k][depth], states[k - 1][depth])
        dx = relative_change(states[k][0], states[k - 1][0])
        total += abs(dy - dx) if variant.get("error") == "difference" else dy
        skip = total < threshold if variant.get("strict", True) else total <= threshold
        if not skip:
            total = 0.0
        computed.append(not skip)
    return computed


RULES: list[tuple[str, dict[str, Any], Callable[[Any], list[bool]]]] = [
    ("fbcache", {"threshold": 0.3}, lambda s: fbcache_rule(s, 0.3)),
    ("fbcache", {"threshold": 0.15, "warmup_steps": 4}, lambda s: fbcache_rule(s, 0.15, 4)),
    ("fbcache", {"threshold": 0.3, "downsample_factor": 3}, lambda s: fbcache_rule(s, 0.3, stride=3)),
    ("fbcache", {"threshold": 0.3, "order": 1}, lambda s: fbcache_rule(s, 0.3)),
    ("dicache", {"threshold": 0.4, "retention": 0.2}, lambda s: dicache_rule(s, 0.4, 0.2)),
    (
        "dicache",
        {"threshold": 0.5, "retention": 0.2, "warmup_inclusive": False, "strict": False, "last_step_full": False},
        lambda s: dicache_rule(s, 0.5, 0.2, inclusive=False, strict=False, last=False),
    ),
    (
        "dicache",
        {"threshold": 0.04, "retention": 0.0, "error": "difference"},
        lambda s: dicache_rule(s, 0.04, 0.0, error="difference"),
    ),
    (
        "dicache",
        {"threshold": 0.3, "retention": 0.0, "probe_depth": 2, "max_gain": 2.0},
        lambda s: dicache_rule(s, 0.3, 0.0, 2),
    ),
]


def filled(method: str, params: dict[str, Any], states: list[list[Tensor]], computed: list[bool]) -> list[Tensor]:
    """What leaves the last block of every step, by the spec's formulas."""
    head = params.get("probe_depth", 1)
    entry = 1 if method == "fbcache" else 0
    residuals = [state[-1] - state[entry] for state in states]
    probes = [state[head] - state[0] for state in states]
    found, full = [], []
    for k, state in enumerate(states):
        if computed[k]:
            full.append(k)
            found.append(state[-1])
            continue
        change, (newest, *older) = residuals[full[-1]], full[::-1]
        if method == "dicache" and older:
            before = older[0]
            g = np.abs((probes[k] - probes[before]).numpy()).mean()
            g /= np.abs((probes[newest] - probes[before]).numpy()).mean()
            g = float(np.clip(g, 1, params.get("max_gain", 1.5)))
            change = residuals[before] + g * (change - residuals[before])
        if params.get("order") and older and newest > 1:
            change = change + (change - residuals[older[0]]) * (k - newest) / (newest - older[0])
        found.append(state[entry] + change)
    return found


@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize(("method", "params", "rule"), RULES, ids=[f"{m}-{p}" for m, p, _ in RULES])
def test_the_rule_and_what_it_fills(models: Any, method: str, params: dict[str, Any], rule: Any, n: int) -> None:
    model = models["dit"]
    states = recorded(model, n).states
    computed = rule(states)
    left: list[Tensor] = []
    handle = model.norm_out.register_forward_pre_hook(lambda m, args: left.append(args[0].clone()))
    _, trace = outputs(model, recipe(method, **params), slice(n, n + 1))
    handle.remove()
    assert trace.table[:, 0].tolist() == [float(one) for one in computed]
    for k, (got, want) in enumerate(zip(left, filled(method, params, states, computed), strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text, k=k: f"step {k}: {text}")


def test_the_rules_are_told_apart(models: Any) -> None:
    """The cases above differ (a forecast does not change decisions), and skip and compute between the ends."""
    states = [recorded(models["dit"], n).states for n in range(3)]
    found = [tuple(tuple(rule(one)) for one in states) for _, _, rule in RULES]
    assert len(set(found)) == len(found) - 1
    assert all(any(0 < sum(mask[1:-1]) < STEPS - 2 for mask in samples) for samples in found)


def look(step: int, entered: float, left: float, forced: bool = False, steps: int = 10) -> Look:
    """A look at one sample with one value."""
    site = Site("blocks", "stack", "blocks", 0, 3, 0)
    return Look(step, steps, site, torch.full((1, 1, 1), entered), torch.full((1, 1, 1), left), forced)


@pytest.mark.parametrize("strict", [True, False])
def test_a_sum_equal_to_the_threshold(strict: bool) -> None:
    """Changes of 1/4 and 1/4 are exactly 1/2: computed if strict, skipped if not."""
    when, memory = ProbeChange(0.5, retention=0.0, strict=strict), dict[str, Any]()
    assert when.decide(look(0, 1, 1.0, forced=True), memory) == COMPUTE
    assert not when.decide(look(1, 1, 1.25), memory)
    assert bool(when.decide(look(2, 1, 1.5625), memory)) is strict
    when2, memory2 = SignalChange(0.5), dict[str, Any]()
    when2.decide(look(0, 1, 1.0, forced=True), memory2)
    assert not when2.decide(look(1, 1, 1.25), memory2) and when2.decide(look(2, 1, 1.5625), memory2)
    when3, memory3 = HeadChange(0.5), dict[str, Any]()
    when3.decide(look(0, 0, 1.0, forced=True), memory3)
    assert not when3.decide(look(1, 0, 1.25), memory3) and when3.decide(look(2, 0, 1.5), memory3)


@pytest.mark.parametrize("when", [SignalChange(0.5), HeadChange(0.5), ProbeChange(0.5, retention=0.0)])
def test_what_is_not_a_number_is_computed(when: Any) -> None:
    memory: dict[str, Any] = {}
    when.decide(look(0, 0, 1.0, forced=True), memory)
    assert when.decide(look(1, 0, float("nan")), memory)
    assert when.decide(look(2, 0, 1.0), memory), "the change from what is not a number is none, either"
    assert not when.decide(look(3, 0, 1.0), memory)


@pytest.mark.parametrize("when", [SignalChange(0.5), ProbeChange(0.5, retention=0.0)])
def test_a_forced_step_begins_anew(when: Any) -> None:
    """Also where it comes in the middle, with inputs of another shape."""
    memory: dict[str, Any] = {}
    when.decide(look(0, 1, 1.0, forced=True), memory)
    assert not when.decide(look(1, 1, 1.25), memory)
    assert when.decide(look(2, 1, 4.0, forced=True), memory) == COMPUTE
    assert not when.decide(look(3, 1, 5.0), memory) and when.decide(look(4, 1, 6.25), memory)


@pytest.mark.parametrize("when", [SignalChange(0.5), HeadChange(0.5), ProbeChange(0.5, retention=0.0)])
def test_what_was_looked_at_may_be_changed_in_place(when: Any) -> None:
    memory, first = dict[str, Any](), look(0, 0.5, 1.0, forced=True)
    when.decide(first, memory)
    for stream in (first.state, first.signal):
        stream.mul_(7)
    assert not when.decide(look(1, 0.5, 1.0), memory)


def test_nothing_that_stays_nothing_has_not_changed() -> None:
    """A first block whose gate is closed adds 0 in every step."""
    when, memory = HeadChange(0.1), dict[str, Any]()
    when.decide(look(0, 1, 1.0, forced=True), memory)
    assert not when.decide(look(1, 2, 2.0), memory) and when.decide(look(2, 2, 2.5), memory)


# ---- the fill -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("now", "gain"), [(2.1, 1.0), (3.2, 1.1), (9.0, 1.5)])
def test_aligned_between_its_limits(now: float, gain: float) -> None:
    fill, entry, site = Aligned(), Entry(), Site("blocks", "stack", "blocks", 0, 3, 0)
    value = torch.tensor([[[1.0, 3.0]]])

    def at(step: int, probe: float) -> At:
        return At(step, 9, site, torch.full((1, 1, 1), probe))

    fill.keep(entry, (value,), at(0, 1.0))
    assert torch.equal(fill.fill(entry, at(1, 5.0))[0], value), "one output is held"
    fill.keep(entry, (2 * value,), at(2, 3.0))
    torch.testing.assert_close(fill.fill(entry, at(3, now))[0], value + gain * value)
    fill.keep(entry, (4 * value,), at(4, 4.0))
    assert len(entry.values) == 2 and entry.steps == [4, 2]


def test_aligned_gains_are_those_of_the_samples() -> None:
    fill, entry, site = Aligned(9.0), Entry(), Site("blocks", "stack", "blocks", 0, 3, 0)
    ones = torch.ones(4, 1, 1)  # two samples, the halves of guidance one after the other
    for step, value in enumerate((0.0, 1.0)):
        fill.keep(entry, (value * ones,), At(step, 9, site, value * ones, samples=Samples(2, 2)))
    probe = torch.tensor([2.0, 4.0, 4.0, 4.0]).view(4, 1, 1)
    (out,) = fill.fill(entry, At(2, 9, site, probe, samples=Samples(2, 2)))
    assert out.flatten().tolist() == [3.0, 4.0, 3.0, 4.0]
    (out,) = fill.fill(entry, At(2, 9, site, probe, samples=Samples(2, 2, True)))
    assert out.flatten().tolist() == [3.5] * 4


# ---- limits of the threshold ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_threshold_zero_computes_all(models: Any, name: str, method: str) -> None:
    """Bit for bit the model itself, with what is remembered for the decisions; coefficients leave 0 as it is."""
    model = models[name]
    params = {"coefficients": None} if "polynomial" in method else {}
    cached, trace = outputs(model, made(method, threshold=0.0, **params))
    assert torch.equal(cached, outputs(model, None)[0])
    assert (trace.table == 1).all() and trace.compute_fraction == 1


@pytest.mark.parametrize(
    ("method", "full"),
    [
        (("teacache", {"first_full": 3}), {0, 1, 2, STEPS - 1}),
        (("teacache", {"last_full": False}), {0}),
        (("fbcache", {}), {0}),
        (("fbcache", {"warmup_steps": 3}), {0, 1, 2}),
        (("dicache", {"retention": 0.25}), {0, 1, 2, 3, STEPS - 1}),
        (("dicache", {"retention": 0.25, "warmup_inclusive": False, "last_step_full": False}), {0, 1, 2}),
        (("dicache", {"retention": 0.0, "warmup_inclusive": False, "last_step_full": False}), {0}),
        (("dicache", {"retention": 1.0}), set(range(STEPS))),
    ],
    ids=str,
)
def test_a_huge_threshold_skips_all_that_is_allowed(models: Any, method: Any, full: set[int]) -> None:
    name, params = method
    _, trace = outputs(models["flux"], recipe(name, threshold=1e9, **params))
    assert [k for k in range(STEPS) if trace.table[k].all()] == sorted(full)
    assert not trace.table[[k for k in range(STEPS) if k not in full]].any()


# ---- runs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_another_shape_inside_of_a_run_is_computed(models: Any, name: str, method: str) -> None:
    """Two steps of another batch size, then back: nothing of the other size is used."""
    model, sizes = models[name], [2, 2, 2, 3, 3, 2, 2]
    with torch.no_grad(), dittocache.enable(model, made(method, threshold=1e9)) as cache, cache.run(len(sizes) + 9):
        for k, batch in enumerate(sizes):
            cache.step(k)
            got = tiny.call(model, tiny.step(model, k, batch=batch))
            plain = cache.trace.table[k].all()
            if k in (0, 3, 5):
                assert plain
                cache_free = tiny.build(name)
                assert torch.equal(got, tiny.call(cache_free, tiny.step(cache_free, k, batch=batch)))
        if "warmup_steps" not in METHODS[method][1] and "retention" not in METHODS[method][1]:
            assert not cache.trace.table[[1, 2, 4, 6], -1].any()


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_leaves_nothing_behind(models: Any, method: str, at: int) -> None:
    model, scheduler = models["dit"], DDIMScheduler()

    def stop(k: int) -> None:
        if k == at:
            raise Stop

    with dittocache.enable(model, made(method, threshold=2.0), scheduler=scheduler) as cache:
        undisturbed = tiny.sample(model, scheduler, STEPS)
        trace = cache.trace
        with pytest.raises(Stop):
            tiny.sample(model, scheduler, STEPS, seed=90, before=stop)
        assert torch.equal(tiny.sample(model, scheduler, STEPS), undisturbed)
        assert cache.trace == trace and trace.compute_fraction < 0.95


def test_a_block_that_is_left_in_the_middle_leaves_nothing_behind(models: Any) -> None:
    """TeaCache raises inside of the first block; an error of the model's own there comes out as it is."""
    model = models["dit"]
    plain = outputs(model, None)[0]

    def fail(module: nn.Module, args: Any) -> None:
        raise Stop

    with dittocache.enable(model, made("teacache", threshold=1e9)) as cache, cache.run(STEPS), torch.no_grad():
        for k in range(3):
            cache.step(k)
            forward(model, drift(model)[k], k, slice(None))
        handle = model.transformer_blocks[0].norm1.register_forward_pre_hook(fail)
        cache.step(3)
        with pytest.raises(Stop):
            forward(model, drift(model)[3], 3, slice(None))
        handle.remove()
    assert not tiny.traces_of_cache(model) and torch.equal(outputs(model, None)[0], plain)


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_counted_and_let_go(models: Any, method: str) -> None:
    model = models["dit"]
    with dittocache.enable(model, made(method, threshold=2.0)) as cache:
        tiny.predictions(model, cache, STEPS)
        assert cache.report().bytes_peak >= 2 * 2 * 16 * 16 * 4  # the change and a reference, 2 x 16 tokens x 16
        assert cache._last is not None and not cache._last.entries


# ---- models that change their streams in place ----------------------------------------------------------------------
class InPlace(BasicTransformerBlock):
    """Writes its result into what it was given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.copy_(super().forward(hidden_states, *args, **kwargs))


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference"])
@pytest.mark.parametrize("which", ["all", "first", "last"])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_work_in_place(method: str, which: str, inference: bool) -> None:
    """Equal to a twin out of place; without inference mode that is learned in the first step of the first run."""
    twin, model = tiny.dit(), tiny.dit()
    for n, block in enumerate(model.transformer_blocks):
        if which == "all" or n == {"first": 0, "last": 2}[which]:
            block.__class__ = InPlace
    mode = torch.inference_mode if inference else torch.no_grad

    def run(one: nn.Module, cache: Any) -> tuple[Tensor, Any]:
        x = drift(one)
        with mode(), cache.run(STEPS):
            out = []
            for k in range(STEPS):
                cache.step(k)
                out.append(forward(one, x[k], k, slice(None)))
            return torch.stack(out).clone(), cache.trace

    with dittocache.enable(twin, made(method)) as a, dittocache.enable(model, made(method)) as b:
        expected, trace = run(twin, a)
        first, _ = run(model, b)
        assert torch.equal(first[0], expected[0])
        second, own = run(model, b)
        assert np.array_equal(own.table, trace.table) and 0 < trace.table[1:].mean() < 1
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)
    plain = outputs(model, None)[0]
    worst = max(tiny.relative(got, want) for got, want in zip(first, plain, strict=True))
    limit = max(tiny.relative(got, want) for got, want in zip(expected, plain, strict=True))
    assert worst < 3 * limit, "what is wrong would be far off"


class InPlaceFlux(FluxTransformerBlock):
    """Writes its result into what it was given."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        text, image = super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        return encoder_hidden_states.copy_(text), hidden_states.copy_(image)


@pytest.mark.parametrize(("method", "params"), [("fbcache", {}), ("dicache", {"retention": 0.0})])
@torch.no_grad()
def test_a_head_that_works_in_place_spoils_the_first_step(method: str, params: dict[str, Any]) -> None:
    """Its change is not known then, and no stack keeps anything to go with it."""
    model = tiny.flux()
    model.transformer_blocks[0].__class__ = InPlaceFlux
    with dittocache.enable(model, recipe(method, threshold=1e9, **params)) as cache, cache.run(STEPS) as run:
        for k in range(3):
            cache.step(k)
            tiny.call(model, tiny.step(model, k))
            kept = [bool(entry.values) for entry in run.entries.values()]
            assert kept == [True, True] if k else not any(kept)
            assert cache.trace.table[k].tolist() == [float(k < 2)] * 2


# ---- numbers of a report --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["teacache", "fbcache", "dicache"])
def test_flops_are_those_that_are_run(models: Any, method: str) -> None:
    """The head is always spent. The modulation that TeaCache runs in a skipped step is not booked."""
    model = models["flux"]
    norms = [model.transformer_blocks[0].norm1.linear, model.transformer_blocks[0].norm1_context.linear]
    with dittocache.enable(model, recipe(method, threshold=1e9)) as cache:
        tiny.predictions(model, cache, STEPS)
        report, skipped = cache.report(), STEPS - cache.trace.table[:, 0].sum()
        with cache.run(STEPS), torch.no_grad():
            spent = 0
            for k in range(STEPS):
                cache.step(k)
                given = tiny.step(model, k, STEPS)
                spent += tiny.count_flops(lambda given=given: tiny.call(model, given))
    extra = skipped * sum(2 * 2 * n.in_features * n.out_features for n in norms) if method == "teacache" else 0
    plain = tiny.count_flops(lambda: tiny.call(model, tiny.step(model, 0)))
    assert report.flops_full == pytest.approx(STEPS * plain, rel=1e-6)
    assert report.flops_done == pytest.approx(spent - extra, rel=1e-6)
    assert report.compute_fraction < 0.7


def test_a_probe_over_a_whole_stack_and_more() -> None:
    """FLUX's dual-stream blocks are the probe: computed in every step, and the costs are known all the same."""
    for depth, dual in ((1, 0.0), (2, 1.0), (3, 1.0)):
        model = tiny.flux()  # nothing was measured before
        with dittocache.enable(model, recipe("dicache", threshold=1e9, retention=0.0, probe_depth=depth)) as cache:
            tiny.predictions(model, cache, STEPS)
            trace, full = cache.trace, cache.report().flops_full
        assert trace.table[1:-1].mean(0).tolist() == [dual, 0.0]
        assert full > 0 and 0 < trace.compute_fraction < 1


# ---- what goes wrong ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("teacache", {"threshold": -1}, r"threshold must be a number at least 0; got -1"),
        ("teacache", {"model": "sdxl"}, r"model must be one of flux, .*wan-ret; got 'sdxl'"),
        ("teacache", {"coefficients": (1, 2)}, r"coefficients must be a list of 5 numbers; got \(1, 2\)"),
        ("teacache", {"coefficients": (1, 2, 3, 4, float("nan"))}, r"every entry of coefficients must be a number"),
        (
            "teacache",
            {"model": "flux", "coefficients": (1,) * 5},
            r"a model or coefficients, not both; got model='flux'",
        ),
        ("teacache", {"indicator": "latents"}, r"indicator must be one of modulated, embedding; got 'latents'"),
        ("teacache", {"first_full": 0}, r"first_full must be a whole number, 1 or more; got 0"),
        ("teacache", {"batch": "all"}, r"batch must be one of sample, batch; got 'all'"),
        ("fbcache", {"threshold": "high"}, r"threshold must be a number at least 0; got 'high'"),
        ("fbcache", {"downsample_factor": 0}, r"downsample_factor must be a whole number, 1 or more; got 0"),
        ("fbcache", {"order": 0}, r"order must be a whole number, 1 or more; got 0"),
        ("fbcache", {"warmup_steps": -1}, r"warmup_steps must be a whole number, 0 or more; got -1"),
        ("dicache", {"error": "delta"}, r"error must be one of probe, difference; got 'delta'"),
        ("dicache", {"retention": 2}, r"retention must be a number between 0 and 1; got 2"),
        ("dicache", {"probe_depth": 0}, r"probe_depth must be a whole number, 1 or more; got 0"),
        ("dicache", {"max_gain": 0.5}, r"max_gain must be a number at least 1; got 0.5"),
        ("dicache", {"probe_depth": 3}, r"the first 3 blocks are always computed, but the model has 3 in its stacks"),
    ],
)
def test_bad_parameters(models: Any, method: str, params: dict[str, Any], message: str) -> None:
    model = models["dit"]
    with pytest.raises(ValueError, match=message) as e:
        dittocache.enable(model, method, **params)
    assert "\n" not in str(e.value) and not tiny.traces_of_cache(model)


@pytest.mark.parametrize("when", [SignalChange(), HeadChange(), ProbeChange()])
@pytest.mark.parametrize("where", ["module", "block"])
def test_only_stacks_are_decided_about(models: Any, when: Any, where: str) -> None:
    with pytest.raises(ValueError, match=rf"{type(when).__name__} decides about whole stacks: where must be stack or"):
        dittocache.enable(models["dit"], Recipe(when=when, where=where))
    assert not tiny.traces_of_cache(models["dit"])


def test_aligned_needs_a_probe(models: Any) -> None:
    chosen = Recipe(when=Every(3), where="stack", keeps="change", fill=Aligned())
    message = "aligned fills go by inputs, and 'transformer_blocks' has none"
    with dittocache.enable(models["dit"], chosen) as cache, pytest.raises(ValueError, match=message):
        tiny.predictions(models["dit"], cache, 2)


def test_a_model_without_a_time_embedding_in_its_blocks(models: Any) -> None:
    model, message = models["uvit"], r"by the time embedding, but \S+ \(UViTBlock\) is given none: use indicator="
    with dittocache.enable(model, "teacache", indicator="embedding") as cache:  # noqa: SIM117
        with pytest.raises(RuntimeError, match=message) as e:
            tiny.predictions(model, cache, 2)
    assert "\n" not in str(e.value) and not tiny.traces_of_cache(model)


class FeedForwardOnly(nn.Module):
    """Three blocks without attention: tokens in, tokens out."""

    def __init__(self) -> None:
        super().__init__()

        class Only(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

            def forward(self, hidden_states: Tensor) -> Tensor:
                return hidden_states + self.ff(hidden_states)

        self.blocks = nn.ModuleList([Only() for _ in range(3)])
        tiny.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_a_first_block_without_attention_is_noted_and_computed() -> None:
    model, x = FeedForwardOnly(), torch.randn(2, 5, 8)
    expected = model(x)
    with pytest.warns(UserWarning) as told, dittocache.enable(model, "teacache", threshold=1e9) as cache, cache.run(3):
        for k in range(3):
            cache.step(k)
            assert torch.equal(model(x), expected)
    assert "blocks.0 has no attention whose input could be looked at: all is computed" in str(told[0].message)
    assert (cache.trace.table == 1).all()


class Grows(FeedForwardOnly):
    """Its first block hands on fewer tokens than it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x[:, :3])
        return x


@pytest.mark.parametrize("method", ["fbcache", "dicache"])
def test_a_head_that_cannot_be_compared(method: str) -> None:
    model = Grows()
    with dittocache.enable(model, method) as cache, cache.run(3), torch.no_grad():
        cache.step(0)
        with pytest.raises(RuntimeError, match=r"the first 1 blocks make \[2, 3, 8\] of \[2, 5, 8\]"):
            model(torch.randn(2, 5, 8))


# ---- recipes --------------------------------------------------------------------------------------------------------
def test_models_of_the_table() -> None:
    assert set(typing.get_args(Model)) == set(POLYNOMIALS) and {len(p) for p in POLYNOMIALS.values()} == {5}
    assert recipe("teacache", model="cogvideox-2b").when.signal == "embedding"
    assert recipe("teacache", model="wan-ret").when.signal == "embedding"
    assert recipe("teacache", model="flux").when.signal == "modulated"
    assert recipe("teacache", model="flux", indicator="embedding").when.signal == "embedding"
    # a polynomial that is known to lie between these on a part of its range (TeaCache's spec, section 3)
    flux = np.poly1d(POLYNOMIALS["flux"])(np.linspace(0, 0.12, 50))
    assert flux.min() > 0.17 and flux.max() < 0.27


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_read_back(models: Any, method: str, tmp_path: Any) -> None:
    chosen = made(method)
    chosen.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again == chosen and again.with_params(threshold=0.7) == made(method, threshold=0.7)
    assert torch.equal(outputs(models["dit"], again)[0], outputs(models["dit"], chosen)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_replayed(models: Any, name: str, method: str) -> None:
    """Of one sample; with the same fill, where the change is that of the blocks after the same head."""
    chosen = made(method)
    cached, trace = outputs(models[name], chosen, slice(1, 2))
    replay = Recipe(Table(trace), chosen.where, fill=chosen.fill, keeps=chosen.keeps)
    again, own = outputs(models[name], replay, slice(1, 2))
    assert torch.equal(again, cached) and np.array_equal(own.table, trace.table)


# ---- calibration of TeaCache ----------------------------------------------------------------------------------------
SETUP = Setup(num_steps=8, guidance_scale=1.5, seed=50, conditions=(3, 7, 1))


@torch.no_grad()
def points(pipe: Any, sample: int, indicator: str) -> tuple[list[float], list[float]]:
    """Changes of the first block's input and of the prediction over an uncached run of one sample, by plain hooks."""
    signals: list[Tensor] = []
    outs: list[Tensor] = []
    block = pipe.transformer.transformer_blocks[0]

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        chosen = kwargs["timestep"] if indicator == "embedding" else args[0] if args else kwargs["hidden_states"]
        signals.append(chosen.float().clone())

    watched = block if indicator == "embedding" else block.attn1
    handles = [
        watched.register_forward_pre_hook(see, with_kwargs=True),
        pipe.transformer.register_forward_hook(lambda m, a, out: outs.append(out[0][:, :1].clone())),
    ]
    pipe(
        [SETUP.conditions[sample]],
        num_inference_steps=SETUP.num_steps,
        guidance_scale=SETUP.guidance_scale,
        generator=[SETUP.generator(sample)],
        output_type="pt",
    )
    for handle in handles:
        handle.remove()
    return tuple([relative_change(a, b) for a, b in zip(x[1:], x[:-1], strict=True)] for x in (signals, outs))  # type: ignore[return-value]


@pytest.mark.parametrize("indicator", ["modulated", "embedding"])
def test_calibrated_coefficients_are_those_of_a_plain_fit(indicator: str) -> None:
    pipe = tiny.pipeline()
    x, y = np.concatenate([points(pipe, j, indicator) for j in range(3)], axis=1)
    found = calibrate(pipe, "teacache", 3, SETUP, batch=2, indicator=indicator, threshold=0.4)
    when = found.when
    assert isinstance(when, SignalChange) and (when.threshold, when.signal) == (0.4, indicator)
    want = np.polyfit(x, y, 4)
    at = np.linspace(x.min(), x.max(), 20)
    np.testing.assert_allclose(np.poly1d(when.coefficients)(at), np.poly1d(want)(at), rtol=1e-3)
    assert set(found.made_for) == {"model", "weights", "scheduler", "timesteps"}
    assert not tiny.traces_of_cache(pipe.transformer)
    with dittocache.enable(pipe, found) as cache:
        tiny.draw(pipe, SETUP.num_steps)
        assert len(cache.trace.steps) == SETUP.num_steps


def test_shards_of_teacache_add_up(tmp_path: Any) -> None:
    pipe, calibrator = tiny.pipeline(), make("teacache", {})
    whole = record(pipe, calibrator, 3, SETUP, batch=3)
    for n in (1, 2):
        record(pipe, calibrator, shard(3, f"{n}/2"), SETUP, out=tmp_path / str(n), batch=1)
    found = merged(pipe, calibrator, [tmp_path / "1", tmp_path / "2"], SETUP)
    alone = calibrate(pipe, "teacache", 3, SETUP)
    assert found.when.coefficients == pytest.approx(alone.when.coefficients, rel=1e-2)  # type: ignore[attr-defined]
    for name, sums in record(pipe, calibrator, 3, SETUP, batch=1).sums.items():
        torch.testing.assert_close(sums, whole.sums[name], rtol=1e-4, atol=1e-7)


def test_calibration_refuses_what_it_cannot_fit() -> None:
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match=r"a polynomial of degree 4 needs 5 different changes, but 4 steps gave 3"):
        calibrate(pipe, "teacache", 1, Setup(num_steps=4, conditions=(1,)))
    with pytest.raises(ValueError, match=r"3 samples drawn at once cannot be told apart.*draw one at a time"):
        calibrate(pipe, "teacache", 3, Setup(num_steps=8, conditions=(1, 2, 3), shared_noise=True))
    assert calibrate(pipe, "teacache", 3, Setup(num_steps=8, conditions=(1, 2, 3), shared_noise=True), batch=1)
    assert not tiny.traces_of_cache(pipe.transformer)


def test_predicted_variances_do_not_count() -> None:
    """Of guidance's halves one after the other, the rows of a sample come together."""
    output = torch.arange(8.0).reshape(4, 2, 1, 1)  # 2 samples, each with noise and variance
    found = _by_sample(Call((torch.zeros(4, 1, 1, 1),), {}, output), 2)
    assert found.tolist() == [[[0.0], [4.0]], [[2.0], [6.0]]]


def test_open_everywhere() -> None:
    """What is decided at run time is open in the plan."""
    site = Site("blocks", "stack", "blocks", 2, 3, 2)
    for when in (SignalChange(), HeadChange(), ProbeChange()):
        assert (when.table(5, [site]) == OPEN).all()
