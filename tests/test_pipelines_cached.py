"""Every tiny real pipeline under a cache: the clock, guidance branches, what a run leaves behind, interruptions.

What the cache says is held against what forward hooks see of the denoisers, in plain runs and in cached ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.hooks import LayerSkipConfig
from pipelines import CASES, Case, images, run
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._pytree import tree_leaves as leaves

import dittocache
from dittocache import Recipe
from dittocache.when import Every

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # old calls of NumPy in diffusers' schedulers
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

STEPS = 5
FORA = {"recipe": "fora", "interval": 2}
SPANS = {
    "stack": Recipe(where="stack", keeps="change", when=Every(2)),
    "model": Recipe(where="model", when=Every(2)),
}
# models that `where="stack"` cannot serve: their blocks belong to resolutions, each of a list of its own
STACKLESS = {"sd", "sdxl", "sd-img2img", "sdxl-inpaint", "instruct-pix2pix"}
SINGLE = {"wan-vace", "skyreels-v2-df"}  # one video at a time; what they say to two: test_pipelines_videos.py
PIECES = {"skyreels-v2-df-long": 2}  # runs of a call: every piece of the video is denoised from noise
# text as their denoisers are given it
TEXT = ("encoder_hidden_states", "class_labels", "cap_feats")
# other ways to call a model that is here already: what `make test` leaves to `make test-all`, but for the first test
VARIANTS = {
    *("pixart-sigma", "sd3-inpaint", "flux-inpaint", "flux-fill", "flux-control", "flux2-klein-inpaint"),
    *("qwen-image-inpaint", "chroma-img2img", "z-image-img2img", "z-image-inpaint", "sana-sprint-img2img"),
    *("sd-img2img", "sdxl-inpaint", "cogvideox-dpm", "cogvideox-v2v", "wan-v2v", "wan-2.2-i2v", "wan-2.2-ti2v"),
    *("skyreels-v2", "skyreels-v2-df", "ltx2", "ltx2-stg", "sana-video", "stable-audio"),
}
every = pytest.mark.parametrize("name", list(CASES))
quiet = pytest.mark.filterwarnings("error:dittocache:UserWarning")  # a run that goes well says nothing


def most(names: Any) -> Any:
    """A parameter for all of these cases, the variants slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in names]
    )


class Seen(NamedTuple):
    """One call of a denoiser: which of them, copies of its inputs, and what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def rows(self) -> int:
        return len(self.args[0] if self.args else self.kwargs.get("hidden_states", self.kwargs.get("sample")))

    @property
    def branch(self) -> Any:
        """What tells guidance branches apart, whatever their order: the text, the number of rows, and flags."""
        text = next((self.kwargs[name] for name in TEXT if name in self.kwargs), self.args[2:3])
        flags = [(k, v) for k, v in self.kwargs.items() if all(type(one) in (bool, int) for one in leaves(v))]
        return self.rows, [t.tolist() for t in leaves(text)], flags


def first(output: Any) -> Tensor:
    """The prediction among what a denoiser returns."""
    while not isinstance(output, Tensor):
        output = torch.stack(output) if isinstance(output, list) else output[0]
    return output


def denoisers(case: Case, pipe: Any) -> list[nn.Module]:
    found = [getattr(pipe, name, None) for name in (case.denoiser, f"{case.denoiser}_2")]
    return [module for module in found if module is not None]


@contextlib.contextmanager
def seen(case: Case, pipe: Any) -> Iterator[list[Seen]]:
    """Calls of the denoisers within."""
    calls: list[Seen] = []

    def copy(value: Any) -> Any:
        return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Seen(module, copy(args), copy(kwargs), first(output).clone()))

    handles = [module.register_forward_hook(see, with_kwargs=True) for module in denoisers(case, pipe)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def steps_of(calls: list[Seen]) -> list[int]:
    """The denoising step of every call: each begins with the same branch."""
    return [int(k) - 1 for k in np.cumsum([call.branch == calls[0].branch for call in calls])]


def state(pipe: Any) -> dict[str, Any]:
    """Everything that a cache may touch."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found: dict[str, Any] = {name: tiny.fingerprint(part) for name, part in parts.items()}
    found |= {"classes": (id(type(pipe)), id(type(pipe.scheduler))), "config": dict(pipe.scheduler.config)}
    found["registries"] = {
        f"{name}.{key}": tuple(module._diffusers_hook.hooks)
        for name, part in parts.items()
        for key, module in part.named_modules()
        if hasattr(module, "_diffusers_hook")
    }
    return found


class Plain(NamedTuple):
    pipe: Any
    drawn: Tensor
    branches: int  # most forwards of a step
    table: np.ndarray  # share of the forwards of every step that `Every(2)` computes


@functools.cache
def plain(name: str) -> Plain:
    """A pipeline built and called once; all tests share it, and leave it as it was."""
    case, pipe = CASES[name], CASES[name].build(0)
    with seen(case, pipe) as calls:
        drawn = run(case, pipe, steps=STEPS)
    marks = steps_of(calls)
    steps = (marks[-1] + 1) // PIECES.get(name, 1)
    last = marks.index(marks[-1] + 1 - steps)  # where the last run begins
    computed: list[list[bool]] = [[] for _ in range(steps)]
    known: list[Any] = []
    for k, call in zip(marks[last:], calls[last:]):
        features = call.branch, call.module
        # what nothing is kept of is computed, too
        computed[k - marks[last]].append(every_second(steps)[k - marks[last]] or features not in known)
        known.append(features)
    branches = max(len(row) for row in computed)
    return Plain(pipe, drawn, branches, np.array([np.mean(row) for row in computed]))


def every_second(steps: int) -> np.ndarray:
    """Every second step, counted from the last, and the first."""
    k = np.arange(steps)
    return (k == 0) | ((steps - 1 - k) % 2 == 0)


def check(name: str, cache: Any, drawn: Tensor) -> None:
    """A run of `Every(2)` did what it says."""
    trace, expected = cache.trace, plain(name)
    steps = len(expected.table)
    assert trace.steps == tuple(range(steps)) and trace.meta["num_steps"] == steps
    assert trace.meta["branches"] == expected.branches
    whole = [j for j, site in enumerate(trace.sites) if not (name == "sd3-skip-layers" and ".1." in site)]
    assert whole and (trace.table[:, whole] == expected.table[:, None]).all()
    assert 0.25 <= 1 - trace.table.mean() < 0.6 and trace.compute_fraction < 1
    assert drawn.isfinite().all() and tiny.relative(drawn, expected.drawn) > 1e-6


@every
@quiet
def test_reuses_every_second_step_and_leaves_nothing_behind(name: str) -> None:
    case, (pipe, drawn, *_) = CASES[name], plain(name)
    before = state(pipe)
    with dittocache.enable(pipe, **FORA) as cache:
        cached = run(case, pipe, steps=STEPS)
        check(name, cache, cached)
        trace = cache.trace
        assert torch.equal(run(case, pipe, steps=STEPS), cached)
        assert cache.trace == trace
    assert same(state(pipe), before)
    assert torch.equal(run(case, pipe, steps=STEPS), drawn)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return bool(a == b)


@quiet
@most(CASES)
@pytest.mark.parametrize("where", SPANS)
def test_reuses_spans(name: str, where: str) -> None:
    case, pipe = CASES[name], plain(name).pipe
    if where == "stack" and name in STACKLESS:
        with pytest.raises(ValueError, match=r"where='stack' matches no site of UNet2DConditionModel; it has: .*block"):
            dittocache.enable(pipe, SPANS[where])
        return
    with dittocache.enable(pipe, SPANS[where]) as cache:
        check(name, cache, run(case, pipe, steps=STEPS))


@most(CASES)
@pytest.mark.filterwarnings("ignore:dittocache.*skipped nothing")
def test_a_plan_that_computes_all_is_the_plain_pipeline(name: str) -> None:
    case, (pipe, drawn, *_) = CASES[name], plain(name)
    with dittocache.enable(pipe, Recipe(where="module", when=Every(1))) as cache:
        assert torch.equal(run(case, pipe, steps=STEPS), drawn)
        assert cache.trace.compute_fraction == 1 and (cache.trace.table == 1).all()


@most(CASES)
def test_an_interrupted_run_leaves_nothing_to_the_next(name: str) -> None:
    """Which has another number of pictures and of steps, and another size."""
    case, pipe = CASES[name], plain(name).pipe
    other = {"steps": 3, "batch": 1 if name in SINGLE else 2, "size": case.other_size, "seed": 7}
    with dittocache.enable(pipe, **FORA):
        clean = run(case, pipe, **other)
    with dittocache.enable(pipe, **FORA) as cache:
        calls = []

        def stop(module: nn.Module, args: Any) -> None:
            calls.append(module)
            if len(calls) > plain(name).branches:
                raise KeyboardInterrupt

        with case.model(pipe).register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            run(case, pipe, steps=STEPS)
        assert torch.equal(run(case, pipe, **other), clean)
        assert len(cache.trace.steps) < STEPS + 5


# ---- guidance branches ----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def perturbed(case: Case, pipe: Any) -> Iterator[None]:
    """The attention processors of perturbed-attention guidance, which are there in a call only."""
    if not case.name.endswith("-pag"):
        yield
        return
    processors = dict(case.model(pipe).attn_processors)
    pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=True)
    yield
    case.model(pipe).set_attn_processor(processors)


def replayed(cache: Any, calls: list[tuple[Seen, int]], length: int) -> None:
    """Every branch on its own, in a run of its own: what comes out is what came out."""
    branches: list[Any] = []
    for branch in ((call.module, call.branch) for call, _ in calls):
        if branch in branches:
            continue
        branches.append(branch)
        with torch.no_grad(), cache.run(length):
            for call, k in calls:
                if (call.module, call.branch) == branch:
                    cache.step(k)
                    assert torch.equal(first(call.module(*call.args, **call.kwargs)), call.output), f"step {k}"


@most(CASES)
@quiet
def test_no_branch_sees_anothers_features(name: str) -> None:
    case, pipe = CASES[name], plain(name).pipe
    with dittocache.enable(pipe, **FORA) as cache, perturbed(case, pipe):
        with seen(case, pipe) as calls:
            run(case, pipe, steps=STEPS)
        marks, length = steps_of(calls), len(cache.trace.steps)
        for start in range(0, marks[-1], length):
            piece = [(call, k - start) for call, k in zip(calls, marks) if start <= k < start + length]
            replayed(cache, piece, length)


def part(name: str | int, value: Any, n: int, rows: int) -> Any:
    """Row n of an argument, if it has rows: a tensor, a list of one for each row or of several, or a dictionary."""
    if isinstance(value, dict):
        return {key: part(key, one, n, rows) for key, one in value.items()}
    if isinstance(value, list):
        return value[n : n + 1] if isinstance(name, int) else [part(name, one, n, rows) for one in value]
    if not isinstance(value, Tensor) or not value.ndim or len(value) < rows:
        return value
    # AnimateDiff's text is repeated for every frame
    return value.chunk(rows)[n] if len(value) == rows or name == "encoder_hidden_states" else value


BATCHED = [name for name, case in CASES.items() if case.guidance == "batched" and not name.endswith("-pag")]


@most(BATCHED)
@quiet
def test_no_row_of_batched_guidance_sees_anothers_features(name: str) -> None:
    case, pipe = CASES[name], plain(name).pipe
    with dittocache.enable(pipe, **FORA) as cache:
        with seen(case, pipe) as calls:
            run(case, pipe, steps=STEPS)
        kept = [(call, k) for call, k in zip(calls, steps_of(calls)) if call.branch == calls[0].branch]
        rows = calls[0].rows
        assert rows == case.branches
        for n in range(rows):
            with torch.no_grad(), cache.run(kept[-1][1] + 1):
                for call, k in kept:
                    cache.step(k)
                    args = [part(j, value, n, rows) for j, value in enumerate(call.args)]
                    kwargs = part("", call.kwargs, n, rows)
                    output = first(call.module(*args, **kwargs))
                    assert tiny.relative(output, call.output[n : n + 1]) < 1e-5, f"row {n}, step {k}"


GUIDED = [name for name, case in CASES.items() if case.scale is not None and case.branches == 2]


@most(GUIDED)
@quiet
def test_without_guidance_steps_are_counted_by_ones(name: str) -> None:
    """On the same pipeline with the same cache, before and after runs with guidance."""
    case, pipe = CASES[name], plain(name).pipe
    alone = {case.scale: 1.0}
    with seen(case, pipe) as calls:
        run(case, pipe, steps=STEPS, **alone)
    forwards = len(calls) // PIECES.get(name, 1)
    with dittocache.enable(pipe, **FORA) as cache:
        first = run(case, pipe, steps=STEPS, **alone)
        trace = cache.trace
        assert trace.steps == tuple(range(forwards)) and trace.meta["branches"] == 1
        computed = every_second(forwards)
        if len(denoisers(case, pipe)) > 1:  # each computes its own first step
            computed = trace.table[:, 0] > 0
            assert every_second(forwards).sum() <= computed.sum() < forwards
        assert (trace.table == computed[:, None]).all()
        run(case, pipe, steps=STEPS)
        assert cache.trace.meta["branches"] == plain(name).branches
        assert torch.equal(run(case, pipe, steps=STEPS, **alone), first) and cache.trace == trace


# ---- guiders: objects that say which branches there are, and change the network for some of them --------------------
SKIPPED = {"indices": [1], "fqn": "transformer_blocks"}
GUIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "perturbed attention": (
        "PerturbedAttentionGuidance",
        {"perturbed_guidance_layers": [1], "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 0.8},
    ),
    "skipped layers": (
        "SkipLayerGuidance",
        {
            "skip_layer_config": LayerSkipConfig(**SKIPPED),
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.8,
        },
    ),
    "smoothed energy": ("SmoothedEnergyGuidance", {"seg_guidance_layers": [1]}),
    "a weaker self": ("AutoGuidance", {"auto_guidance_config": LayerSkipConfig(**SKIPPED)}),
    "only in the first half": ("ClassifierFreeGuidance", {"stop": 0.5}),
    "only in the second half": ("ClassifierFreeGuidance", {"start": 0.5}),
}


@pytest.mark.parametrize("how", GUIDERS)
@quiet
def test_guiders(how: str) -> None:
    """Up to three branches, of which two have the same text: each is what it is in a run of its own."""
    case, pipe = CASES["hunyuan-image"], CASES["hunyuan-image"].build(0)
    cls, own = GUIDERS[how]
    pipe.guider = getattr(diffusers.guiders, cls)(guidance_scale=3.0, **own)
    drawn = run(case, pipe, steps=8)
    names: list[str] = []
    with dittocache.enable(pipe, "fora", interval=3) as cache:
        context = pipe.transformer.cache_context
        pipe.transformer.cache_context = lambda name: names.append(name) or context(name)
        with seen(case, pipe) as calls, counted(pipe, calls) as ends:
            cached = run(case, pipe, steps=8)
        del pipe.transformer.cache_context
        assert len(names) == len(calls) and cache.trace.steps == tuple(range(8)) and cache.trace.table.mean() < 0.8
        assert cache.trace.meta["branches"] == len(set(names)) and tiny.relative(cached, drawn) > 1e-4
        marks = [sum(n >= end for end in ends) for n in range(len(calls))]
        for name in dict.fromkeys(names):
            mine = [(call, k) for call, k, of in zip(calls, marks, names) if of == name]
            with changed(pipe, name), torch.no_grad(), cache.run(8):
                for call, k in mine:
                    cache.step(k)
                    assert torch.equal(first(call.module(*call.args, **call.kwargs)), call.output), f"{name}, step {k}"
    assert torch.equal(run(case, pipe, steps=8), drawn)


@contextlib.contextmanager
def changed(pipe: Any, branch: str) -> Iterator[None]:
    """The network as the guider has it for a branch."""
    guider = pipe.guider
    guider._enabled, guider._step, guider._num_inference_steps = True, 2, 8
    guider._count_prepared = 0
    for prepared in dict.fromkeys(guider._input_predictions):
        guider.prepare_models(pipe.transformer)
        if prepared == branch:
            yield
        guider.cleanup_models(pipe.transformer)


# ---- guidance that changes on the way -------------------------------------------------------------------------------
@contextlib.contextmanager
def counted(pipe: Any, calls: list[Seen]) -> Iterator[list[int]]:
    """How many calls were seen when the scheduler made each of its steps."""
    ends: list[int] = []
    take = pipe.scheduler.step

    @functools.wraps(take)
    def step(*args: Any, **kwargs: Any) -> Any:
        ends.append(len(calls))
        return take(*args, **kwargs)

    pipe.scheduler.step = step
    try:
        yield ends
    finally:
        del pipe.scheduler.step


def off(pipe: Any, k: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Guidance is switched off after the third step, as the documentation of diffusers shows."""
    if k == 2:
        pipe._guidance_scale = 0.0
        given = {name: value.chunk(2)[1] for name, value in given.items()}
    return given


def another_prompt(pipe: Any, k: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.flip(1) for name, value in given.items()} if k == 2 else given


CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "only in the first half": ("lumina2", {"cfg_trunc_ratio": 0.5}),
    "batched, only at first": ("z-image", {"cfg_truncation": 0.5}),
    "without some layers in between": ("sd3-skip-layers", {}),
    "switched off": ("wan", {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": []}),
    "switched off between two transformers": (
        "wan-2.2",
        {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": []},
    ),
    "batched, switched off": (
        "sd3",
        {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"]},
    ),
    "another prompt": (
        "wan",
        {"callback_on_step_end": another_prompt, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ),
    "batched, another prompt": (
        "sd3",
        {"callback_on_step_end": another_prompt, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ),
}


@pytest.mark.parametrize("how", CHANGING)
def test_guidance_that_changes_on_the_way(how: str) -> None:
    name, own = CHANGING[how]
    case, pipe = CASES[name], plain(name).pipe
    steps = 8
    with dittocache.enable(pipe, "fora", interval=3) as cache:
        with seen(case, pipe) as calls, counted(pipe, calls) as ends:
            run(case, pipe, steps=steps, **own)
        assert cache.trace.steps == tuple(range(steps)) == tuple(range(len(ends)))
        marks = [sum(n >= end for end in ends) for n in range(len(calls))]
        assert len({marks.count(k) for k in marks}) > 1 or len({call.rows for call in calls}) > 1 or "prompt" in how
        assert cache.trace.table.mean() < 0.8
        replayed(cache, list(zip(calls, marks)), steps)


# ---- steps ----------------------------------------------------------------------------------------------------------
def ddim(pipe: Any) -> Any:
    return diffusers.DDIMScheduler.from_config(pipe.scheduler.config)


PARTS: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "the first half": ("sdxl", None, {"denoising_end": 0.5}, 4),
    "the first half, a scheduler that counts no steps": ("sdxl", ddim, {"denoising_end": 0.5}, 4),
    "the end": ("sd3-img2img", None, {"strength": 0.5}, 4),
    "the end, a scheduler that counts no steps": ("sd-img2img", ddim, {"strength": 0.5}, 4),
    "the end, from the first of two equal timesteps": ("sd-img2img", None, {"strength": 0.9}, 8),
    "the end, from the second of two equal timesteps": ("sd-img2img", None, {"strength": 0.75}, 7),
    "all but the last timestep": ("sana-sprint", None, {}, 8),
    "frames that begin one after another": ("skyreels-v2-df-async", None, {}, 8 + 2 * 2),
    "the last of two rounds": ("animatediff", None, {}, 8),
}


@pytest.mark.parametrize("how", PARTS)
@quiet
def test_the_steps_that_are_made_are_the_run(how: str) -> None:
    """However many timesteps the scheduler has: the schedule is that of the steps of this call, to the last."""
    name, scheduler, own, steps = PARTS[how]
    case, pipe = CASES[name], plain(name).pipe
    before = pipe.scheduler
    if how == "the last of two rounds":
        pipe.enable_free_init(num_iters=2)
    pipe.scheduler = scheduler(pipe) if scheduler else before
    with dittocache.enable(pipe, **FORA) as cache:
        drawn = run(case, pipe, steps=8, **own)
        trace, timesteps = cache.trace, [float(t) for t in pipe.scheduler.timesteps]
    assert trace.steps == tuple(range(steps)) and trace.meta["num_steps"] == steps
    assert (trace.table == every_second(steps)[:, None]).all()
    if "frames" not in how:
        assert trace.meta["timesteps"] == (timesteps[-steps:] if "the end" in how else timesteps[:steps])
    with dittocache.enable(pipe, trace):
        assert torch.equal(run(case, pipe, steps=8, **own), drawn)
    pipe.scheduler = before
    if how == "the last of two rounds":
        pipe.disable_free_init()


@pytest.mark.parametrize("name", images.SOLVERS)
@quiet
def test_solvers(name: str) -> None:
    """The network is called once for every timestep, 2 n - 1 of them for solvers of second order."""
    case = images.SOLVERS[name]
    pipe = plain(name.split("/")[0]).pipe
    before, pipe.scheduler = pipe.scheduler, case.build(0).scheduler
    with dittocache.enable(pipe, **FORA) as cache, seen(case, pipe) as calls:
        cached = run(case, pipe, steps=STEPS)
        count, trace = len(calls), cache.trace
        assert torch.equal(run(case, pipe, steps=STEPS), cached) and cache.trace == trace
    pipe.scheduler = before
    assert count == len(trace.steps) == trace.meta["num_steps"] >= STEPS
    assert (trace.table == every_second(count)[:, None]).all()


STOPPABLE = ("sd3", "flux-cfg", "wan-2.2", "ltx2-all", "cosmos", "skyreels-v2-df", "skyreels-v2-df-long")


@pytest.mark.parametrize("name", STOPPABLE)
@quiet
def test_a_pipeline_that_is_told_to_stop(name: str) -> None:
    """Its loop goes on without forwards; what was done is the trace, and the next run is as any."""
    case, pipe = CASES[name], plain(name).pipe

    def stop(pipe: Any, k: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = k == 1
        return given

    with dittocache.enable(pipe, **FORA) as cache:
        whole = run(case, pipe, steps=STEPS)
        trace = cache.trace
        stopped = run(case, pipe, steps=STEPS, callback_on_step_end=stop)
        assert cache.trace.steps == (0, 1) and cache.trace.table[1].max() == 0
        assert stopped.isfinite().all() and not torch.equal(stopped, whole)
        assert torch.equal(run(case, pipe, steps=STEPS), whole) and cache.trace == trace
