"""Runs never see each other: threads, tasks, several pipelines over one transformer, requests that are interleaved."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import io
import json
import socket
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from pipelines import CASES, run

import dittocache
from dittocache import Recipe
from dittocache.when import Every

METHODS = {
    "fora": {"interval": 3},
    "toca": {"selector": "random", "ratio": 0.3, "ratio_schedule": "constant"},
    "duca": {"selector": "value-norm", "interval": 4, "ratio": 0.3, "ratio_schedule": "constant"},
}
# fills that change what a run keeps, over data that all of them share
FILLS = ["eoc", "goc", "icc"]
THREADS = 4
STEPS = 8


def in_threads(function, count=THREADS):
    """Results of function(0), function(1), ..., all begun at the same moment."""
    barrier = threading.Barrier(count)

    def work(n):
        barrier.wait()
        return function(n)

    with ThreadPoolExecutor(count) as pool:
        return [f.result(timeout=60) for f in [pool.submit(work, n) for n in range(count)]]


# ---- threads --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize("method", METHODS)
def test_threads_over_one_transformer_with_a_scheduler_each(method, name):
    model = tiny.build(name)
    params = METHODS[method] | (
        {"selector": "random", "spatial_bonus": None} if name == "flux" and method != "fora" else {}
    )
    schedulers = [DDIMScheduler() for _ in range(THREADS)]
    caches = [dittocache.enable(model, method, scheduler=s, **params) for s in schedulers]
    assert all(cache.enabled for cache in caches)

    def job(n):
        return [tiny.sample(model, schedulers[n], STEPS + n, seed=10 * n + r, batch=1 + n % 2) for r in range(3)]

    serial = [job(n) for n in range(THREADS)]
    threaded = in_threads(job)
    for n in range(THREADS):
        assert all(torch.equal(a, b) for a, b in zip(threaded[n], serial[n], strict=True)), f"thread {n}"
        assert caches[n].trace.compute_fraction < 0.8 and len(caches[n].trace.steps) == STEPS + n
        caches[n].disable()
    assert not tiny.traces_of_cache(model)


def params_of(method, model):
    return METHODS.get(method) or tiny.data_for(method, model, STEPS + THREADS, scale=1.0)


@pytest.mark.parametrize("method", [*METHODS, *FILLS])
def test_threads_over_one_cache_with_explicit_runs(method):
    model = tiny.dit()
    with dittocache.enable(model, method, **params_of(method, model)) as cache:

        def job(n):
            return [tiny.sample_explicit(model, cache, STEPS + n, seed=10 * n + r) for r in range(3)]

        serial = [job(n) for n in range(THREADS)]
        threaded = in_threads(job)
    for n in range(THREADS):
        assert all(torch.equal(a, b) for a, b in zip(threaded[n], serial[n], strict=True)), f"thread {n}"


def test_threads_that_begin_on_an_unmeasured_model():
    """The very first forwards run at the same time; every one of them is right, and FLOPs are measured all the same."""
    model = tiny.dit()
    expected = [tiny.sample(model, steps=1, seed=n) for n in range(THREADS)]
    with dittocache.enable(model, "fora") as cache:
        got = in_threads(lambda n: tiny.sample_explicit(model, cache, 5, seed=n))
        assert len(got) == len(expected)
        trace = cache.trace
        tiny.sample_explicit(model, cache, 5)
        assert (
            trace.flops_full == cache.trace.flops_full == 5 * tiny.count_flops(lambda: tiny.sample(tiny.dit(), steps=1))
        )


def test_threads_that_enable_and_disable_while_another_samples():
    model = tiny.dit()
    steady = DDIMScheduler()
    cache = dittocache.enable(model, "fora", scheduler=steady)
    expected = tiny.sample(model, steady, STEPS)
    plain = tiny.sample(tiny.dit(), None, STEPS)

    def job(n):
        out = []
        for _ in range(6):
            if n == 0:
                out.append(torch.equal(tiny.sample(model, steady, STEPS), expected))
            else:
                scheduler = DDIMScheduler()
                with dittocache.enable(model, "fora", interval=1, scheduler=scheduler):
                    out.append(torch.equal(tiny.sample(model, scheduler, STEPS), plain))
        return out

    with pytest.warns(UserWarning, match="skipped nothing"):
        assert all(all(out) for out in in_threads(job))
    cache.disable()
    assert not tiny.traces_of_cache(model)


def test_a_new_thread_is_outside_of_every_run():
    """A forward in another thread belongs to no run of this one."""
    model, scheduler = tiny.dit(), DDIMScheduler()
    inputs = tiny.step(model, 0, seed=7)
    expected = tiny.call(model, inputs)
    with dittocache.enable(model, "fora", interval=8, scheduler=scheduler) as cache, torch.no_grad():
        scheduler.set_timesteps(8)
        tiny.call(model, tiny.step(model, 0))
        scheduler.step(torch.zeros(2, 4, 8, 8), scheduler.timesteps[0], torch.zeros(2, 4, 8, 8))
        with pytest.warns(UserWarning, match="outside of any run"):
            output = in_threads(lambda n: tiny.call(model, inputs).detach(), 1)[0]
        assert torch.equal(output, expected)
        assert len(cache.trace.steps) == 1


# ---- several caches on one transformer ------------------------------------------------------------------------------
def two_pipelines():
    first = tiny.pipeline()
    return first, tiny.pipeline(transformer=first.transformer)


def test_two_pipelines_over_one_transformer_with_different_recipes():
    first, second = two_pipelines()
    recipes = [("fora", METHODS["fora"]), ("duca", METHODS["duca"])]
    alone = []
    for pipe, (method, params) in zip((first, second), recipes, strict=True):
        with dittocache.enable(pipe, method, **params) as cache:
            alone.append((tiny.draw(pipe, STEPS), cache.trace))
    caches = [dittocache.enable(p, m, **params) for p, (m, params) in zip((first, second), recipes, strict=True)]
    for order in ((0, 1), (1, 0), (0, 0), (1, 1)):
        for n in order:
            assert torch.equal(tiny.draw((first, second)[n], STEPS), alone[n][0])
            assert caches[n].trace == alone[n][1]
    for cache in caches:
        cache.disable()
    assert not tiny.traces_of_cache(first.transformer)


@pytest.mark.parametrize("first", ["icc", "toca"])
def test_a_cache_of_single_layers_beside_one_that_scores_tokens(first):
    """The hooks on the linear layers run inside of the attention whose projections are listened to."""
    model, schedulers = tiny.dit(), {"icc": DDIMScheduler(), "toca": DDIMScheduler()}
    params = {"icc": tiny.data_for("icc", model), "toca": {"ratio": 0.3, "ratio_schedule": "constant"}}
    alone = {}
    for method in params:
        with dittocache.enable(model, method, scheduler=schedulers[method], **params[method]) as cache:
            alone[method] = tiny.sample(model, schedulers[method], STEPS), cache.report().compute_fraction
    order = [first, *(set(params) - {first})]
    caches = {m: dittocache.enable(model, m, scheduler=schedulers[m], **params[m]) for m in order}
    for method in (*order, *order):
        assert torch.equal(tiny.sample(model, schedulers[method], STEPS), alone[method][0])
        assert caches[method].report().compute_fraction == pytest.approx(alone[method][1])
    for cache in caches.values():
        cache.disable()
    assert not tiny.traces_of_cache(model)


@pytest.mark.parametrize("off", [0, 1])
def test_two_pipelines_over_one_transformer_with_one_disabled(off):
    pipes = two_pipelines()
    plain = tiny.draw(pipes[off], STEPS)
    caches = [dittocache.enable(pipe, "fora") for pipe in pipes]
    cached = tiny.draw(pipes[1 - off], STEPS)
    caches[off].disable()
    assert type(pipes[off].scheduler) is DDIMScheduler and type(pipes[1 - off].scheduler) is not DDIMScheduler
    with pytest.warns(UserWarning, match="outside of any run"):
        assert torch.equal(tiny.draw(pipes[off], STEPS), plain)
    assert torch.equal(tiny.draw(pipes[1 - off], STEPS), cached)
    assert not torch.equal(cached, plain) and caches[1 - off].trace.compute_fraction < 0.8
    caches[1 - off].disable()
    assert torch.equal(tiny.draw(pipes[1 - off], STEPS), plain)
    assert not tiny.traces_of_cache(pipes[0].transformer)


def test_a_pipeline_interrupted_does_not_disturb_another_over_the_same_transformer():
    first, second = two_pipelines()
    for pipe in (first, second):
        dittocache.enable(pipe, "fora")
    expected = tiny.draw(second, STEPS)

    def stop(pipe, k, t, inputs):
        if k == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        tiny.draw(first, STEPS, seed=50, callback_on_step_end=stop)
    assert torch.equal(tiny.draw(second, STEPS), expected)


def test_a_pipeline_inside_a_pipeline():
    """A callback that draws with another pipeline over the same transformer: both as if alone."""
    first, second = two_pipelines()
    for pipe in (first, second):
        dittocache.enable(pipe, "fora")
    expected = tiny.draw(first, STEPS), tiny.draw(second, STEPS, seed=60)
    inner = []

    def nested(pipe, k, t, inputs):
        if k == 3:
            inner.append(tiny.draw(second, STEPS, seed=60))
        return {}

    assert torch.equal(tiny.draw(first, STEPS, callback_on_step_end=nested), expected[0])
    assert torch.equal(inner[0], expected[1])


def test_a_sibling_sharing_transformer_and_scheduler():
    """An image-to-image sibling, say: whether cached or not, its runs are its own, before and after the other's."""
    first = tiny.pipeline()
    sibling = tiny.pipeline(transformer=first.transformer, scheduler=first.scheduler)
    fresh = tiny.pipeline()
    with dittocache.enable(fresh, "fora"):
        expected = [tiny.draw(fresh, steps, seed=s) for steps, s in ((6, 3), (8, 40))]
    cache = dittocache.enable(first, "fora")
    for _ in range(2):
        assert torch.equal(tiny.draw(first, 6, seed=3), expected[0])
        assert torch.equal(tiny.draw(sibling, 8, seed=40), expected[1])
    cache.disable()
    assert type(sibling.scheduler) is DDIMScheduler and not tiny.traces_of_cache(first.transformer)


def test_enabling_a_sibling_replaces_the_cache_on_their_scheduler():
    first = tiny.pipeline()
    sibling = tiny.pipeline(transformer=first.transformer, scheduler=first.scheduler)
    old = dittocache.enable(first, "fora")
    new = dittocache.enable(sibling, "toca", **METHODS["toca"])
    tiny.draw(sibling, 6)
    assert new.trace.compute_fraction < 1
    new.disable()
    old.disable()
    assert type(first.scheduler) is DDIMScheduler and not tiny.traces_of_cache(first.transformer)
    assert type(first) is type(sibling) is type(tiny.pipeline())


def test_two_pipelines_of_one_class_do_not_touch_each_other():
    """Not the class but the object is watched."""
    on, off = tiny.pipeline(0), tiny.pipeline(1)
    plain = tiny.draw(off)
    cache = dittocache.enable(on, "fora")
    assert torch.equal(tiny.draw(off), plain) and type(off) is not type(on)
    other = dittocache.enable(off, "fora")
    cache.disable()
    assert not torch.equal(tiny.draw(off), plain)
    other.disable()
    assert torch.equal(tiny.draw(off), plain)


# ---- processes ------------------------------------------------------------------------------------------------------
def rank(n, port, file):
    """One process of a group: its own number of steps and pictures, plain blocks and sharded ones."""
    dist = torch.distributed
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=n, world_size=2)
    case, drawn = CASES["flux"], {}
    for method, params in RANKS.items():
        with dittocache.enable(pipe := case.build(0), method, **params) as cache:
            drawn[method] = run(case, pipe, steps=5 + 2 * n, seed=10 * n), cache.trace.table
    from torch.distributed.fsdp import fully_shard

    for block in (pipe := case.build(0)).transformer.transformer_blocks:
        fully_shard(block)
    fully_shard(pipe.transformer)
    with dittocache.enable(pipe, "fora", **RANKS["fora"]) as cache:  # whose blocks are gathered by all ranks together
        drawn["sharded"] = run(case, pipe, steps=5, seed=10 * n), cache.trace.table
    torch.save(drawn, f"{file}.{n}")
    dist.destroy_process_group()


RANKS = {"fora": {"interval": 2}, "teacache": {"threshold": 0.3, "indicator": "modulated"}}


@pytest.mark.slow
def test_ranks_of_a_process_group(tmp_path):
    """Nothing is shared: every process decides on its own, and none waits for another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank, (port, str(tmp_path / "drawn")), nprocs=2)
    case = CASES["flux"]
    for n in range(2):
        drawn = torch.load(tmp_path / f"drawn.{n}", weights_only=False)
        for method, params in RANKS.items():
            with dittocache.enable(pipe := case.build(0), method, **params) as cache:
                assert torch.equal(drawn[method][0], run(case, pipe, steps=5 + 2 * n, seed=10 * n))
                assert (drawn[method][1] == cache.trace.table).all() and cache.trace.table.mean() < 0.9
        with dittocache.enable(pipe := case.build(0), "fora", **RANKS["fora"]) as cache:
            assert alike(drawn["sharded"][0], run(case, pipe, steps=5, seed=10 * n))
            assert (drawn["sharded"][1] == cache.trace.table).all()


# ---- interleaved runs -----------------------------------------------------------------------------------------------
def forwards(model, run, k, steps, seed):
    with torch.no_grad(), run:
        run.step(k)
        return tiny.call(model, tiny.step(model, k, steps, seed=seed))


@pytest.mark.parametrize("method", [*METHODS, *FILLS])
def test_runs_swapped_in_and_out_equal_uninterleaved_ones(method):
    model = tiny.dit()
    with dittocache.enable(model, method, **params_of(method, model)) as cache:
        lengths = [6, 8, 7]
        alone = [tiny.predictions(model, cache, steps, seed=n) for n, steps in enumerate(lengths)]
        traces = []
        for n, steps in enumerate(lengths):
            tiny.predictions(model, cache, steps, seed=n)
            traces.append(cache.trace)
        runs = [cache.run(steps) for steps in lengths]
        for k in range(max(lengths)):
            for n, run in enumerate(runs):
                if k < lengths[n]:
                    output = forwards(model, run, k, lengths[n], n)
                    assert torch.equal(output, alone[n][k]), f"run {n}, step {k}"
        assert [run.trace() for run in runs] == traces


def test_runs_nested_in_each_other():
    """Leaving the inner run puts the outer one back."""
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache:
        alone = [tiny.predictions(model, cache, 5, seed=n) for n in range(2)]
        outer, inner = cache.run(5), cache.run(5)
        with torch.no_grad(), outer:
            for k in range(5):
                cache.step(k)
                assert torch.equal(tiny.call(model, tiny.step(model, k, 5, seed=0)), alone[0][k])
                with inner:
                    cache.step(k)
                    assert torch.equal(tiny.call(model, tiny.step(model, k, 5, seed=1)), alone[1][k])


def test_generators_that_take_turns():
    """`run.step` names its run: the next forward is that run's, whoever else is at work in this thread."""
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache:
        alone = [tiny.predictions(model, cache, 5, seed=n) for n in range(2)]

        def sampler(seed):
            with cache.run(5) as run:
                for k in range(5):
                    run.step(k)
                    with torch.no_grad():
                        output = tiny.call(model, tiny.step(model, k, 5, seed=seed))
                    yield output

        for k, pair in enumerate(zip(sampler(0), sampler(1), strict=True)):
            for n in range(2):
                assert torch.equal(pair[n], alone[n][k]), f"generator {n}, step {k}"


@pytest.mark.parametrize("clock", ["explicit", "scheduler"])
def test_tasks_that_take_turns(clock):
    """Tasks of one event loop have contexts of their own."""
    model = tiny.dit()
    schedulers = [DDIMScheduler() for _ in range(3)]
    caches = [dittocache.enable(model, "fora", scheduler=s) for s in (schedulers if clock == "scheduler" else [None])]
    alone = [tiny.sample(model, schedulers[n], 6, seed=n) for n in range(3)] if clock == "scheduler" else None
    alone = alone or [tiny.sample_explicit(model, caches[0], 6, seed=n) for n in range(3)]

    async def task(n):
        scheduler, x = schedulers[n], tiny.latents(model, 2, n)
        run = caches[0].run(6) if clock == "explicit" else None
        if run is not None:
            run.__enter__()
        scheduler.set_timesteps(6)
        for k, t in enumerate(scheduler.timesteps):
            if run is not None:
                run.step(k)
            await asyncio.sleep(0)
            with torch.no_grad():
                x = scheduler.step(tiny.predict(model, x, t, seed=n), t, x).prev_sample
            await asyncio.sleep(0)
        return x

    async def main():
        return await asyncio.gather(*(task(n) for n in range(3)))

    for got, expected in zip(asyncio.run(main()), alone, strict=True):
        assert torch.equal(got, expected)


# ---- memory ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["pipeline", "transformer"])
def test_a_cached_model_that_is_dropped_is_freed(target):
    pipe = tiny.pipeline()
    cache = dittocache.enable(pipe if target == "pipeline" else pipe.transformer, "fora", scheduler=pipe.scheduler)
    tiny.draw(pipe)
    alive = [weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(pipe.scheduler)]
    del pipe, cache
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


def test_features_are_let_go_at_the_end_of_a_run(pipe):
    kept = []

    def look(pipe, k, t, inputs):
        kept.extend(weakref.ref(t) for e in cache._last.entries.values() for value in e.values for t in value)
        return {}

    with dittocache.enable(pipe, "fora") as cache:
        tiny.draw(pipe, callback_on_step_end=look)
        gc.collect()
        assert len(kept) > 6 and not any(ref() is not None for ref in kept)
        assert cache.report().bytes_peak > 0


# ---- real pipelines over one transformer ----------------------------------------------------------------------------
# Every second step counted from the first: 3 of 5 are computed. Not all models have stacks, or linear layers to reuse.
RECIPES = {
    "module": Recipe(where="module", when=Every(2)),
    "linear": Recipe(where="linear", when=Every(2)),
    "stack": Recipe(where="stack", keeps="change", when=Every(2)),
    "model": Recipe(where="model", when=Every(2)),
}
draw = functools.partial(run, steps=5)


@pytest.mark.parametrize("name", ["sd3", "flux-cfg", "wan"])
def test_threads_of_pipelines_over_one_transformer(name):
    """Each with a scheduler of its own, and another number of steps."""
    case, first = CASES[name], CASES[name].build(0)
    pipes = [first, *(case.build(0) for _ in range(THREADS - 1))]
    for pipe in pipes:
        pipe.transformer = first.transformer
    caches = [dittocache.enable(pipe, "fora", interval=2 + n % 2) for n, pipe in enumerate(pipes)]

    def job(n):
        return [run(case, pipes[n], steps=4 + n, seed=10 * n + r) for r in range(2)], caches[n].trace

    serial = [job(n) for n in range(THREADS)]
    threaded = in_threads(job)
    for n in range(THREADS):
        assert all(torch.equal(a, b) for a, b in zip(threaded[n][0], serial[n][0], strict=True)), f"thread {n}"
        assert threaded[n][1] == serial[n][1] and len(serial[n][1].steps) == 4 + n
        caches[n].disable()


def test_text_to_image_and_image_to_image_of_the_same_parts():
    """As diffusers makes the one of the other; one is called from the other's callback."""
    text, image = CASES["flux"], CASES["flux-img2img"]
    first = image.build(0)
    siblings = {
        "text": (text, diffusers.FluxPipeline.from_pipe(first)),
        "image": (image, diffusers.FluxImg2ImgPipeline.from_pipe(first)),
    }
    for _, pipe in siblings.values():
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(first.scheduler.config)
    (text, drawer), (image, painter) = siblings.values()
    plain = draw(text, drawer), draw(image, painter)
    recipes = {"text": RECIPES["module"], "image": RECIPES["stack"]}
    alone = {}
    for kind, (case, pipe) in siblings.items():
        with dittocache.enable(pipe, recipes[kind]) as cache:
            alone[kind] = draw(case, pipe), cache.trace
    caches = {kind: dittocache.enable(pipe, recipes[kind]) for kind, (case, pipe) in siblings.items()}
    inner = []

    def nested(pipe, k, t, inputs):
        if k == 1:
            inner.append(draw(image, painter))
        return {}

    assert torch.equal(draw(text, drawer, callback_on_step_end=nested), alone["text"][0])
    assert torch.equal(inner[0], alone["image"][0])
    assert {kind: cache.trace for kind, cache in caches.items()} == {kind: trace for kind, (_, trace) in alone.items()}
    third = diffusers.FluxImg2ImgPipeline.from_pipe(drawer)  # of a cached one: it looks at the types of the parts
    assert third.transformer is first.transformer and type(third) is diffusers.FluxImg2ImgPipeline
    for cache in caches.values():
        cache.disable()
    assert torch.equal(draw(text, drawer), plain[0]) and torch.equal(draw(image, painter), plain[1])


# ---- what others do to a model --------------------------------------------------------------------------------------
def offload_model(pipe, folder):
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipe, folder):
    """What `enable_sequential_cpu_offload` calls; weights are on the meta device but while a layer is called."""
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, torch.device("cpu"))


def offload_groups(pipe, folder, kind, **more):
    """To files, so that weights that were not brought back are garbage."""
    here = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=here, offload_device=here, offload_type=kind, offload_to_disk_path=str(folder), **more
    )


def cast_layerwise(pipe, folder):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def fuse_projections(pipe, folder):
    pipe.transformer.fuse_qkv_projections()


def choose_backend(pipe, folder):
    pipe.transformer.set_attention_backend("_native_math")


def quantise(pipe, folder):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())


def adapt(pipe, folder):
    peft = pytest.importorskip("peft")
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False), "style")
    adapters = [p for name, p in pipe.transformer.named_parameters() if "lora_" in name]
    for n, p in enumerate(adapters):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(n))


def parametrise(pipe, folder):
    """As libraries do that train with quantised or normed weights; the modules get another class."""
    for module in (pipe.transformer.transformer_blocks[1].attn.to_q, pipe.transformer.transformer_blocks[1].ff.net[2]):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Tanh())


def compile_blocks(pipe, folder):
    pipe.transformer.compile_repeated_blocks(backend="eager")


CHANGES = {
    "offload-model": (offload_model, ("flux", "pixart-alpha")),
    "offload-sequentially": (offload_sequentially, ("flux", "pixart-alpha")),
    "offload-blocks": (
        functools.partial(offload_groups, kind="block_level", num_blocks_per_group=1),
        ("flux", "pixart-alpha"),
    ),
    "offload-leaves": (functools.partial(offload_groups, kind="leaf_level"), ("flux", "pixart-alpha")),
    "cast-layerwise": (cast_layerwise, ("flux", "wan")),
    "fuse-projections": (fuse_projections, ("flux", "wan")),
    "choose-backend": (choose_backend, ("flux", "wan")),
    "quantise": (quantise, ("dit", "wan")),
    "adapt": (adapt, ("flux", "wan")),
    "parametrise": (parametrise, ("flux",)),
    "compile-blocks": (compile_blocks, ("wan",)),
}
# those that change what the model computes
REAL = {"cast-layerwise", "quantise", "adapt", "parametrise"}


@pytest.fixture(scope="module")
def built():
    """Pipelines as they are made, and what they draw, for tests that change copies of them."""
    pipes = {}
    for name in ("dit", "flux", "pixart-alpha", "wan"):
        pipe = CASES[name].build(0)
        pipes[name] = pipe, draw(CASES[name], pipe)
    return pipes


def alike(a, b):
    """Weights that were moved may lie otherwise in memory, and sums come out in another order."""
    return tiny.relative(a, b) < 1e-5


PAIRS = [
    pytest.param(change, name, marks=pytest.mark.slow if change == "compile-blocks" else ())
    for change, (_, names) in CHANGES.items()
    for name in names
]


@pytest.mark.parametrize("where", ["module", "linear", "stack"])
@pytest.mark.parametrize("change, name", PAIRS)
def test_a_model_that_others_change_before_and_while_a_cache_is_on(change, name, where, built, tmp_path):
    """The cache gives the same in either order; what is left when it goes is the changed model."""
    make, case = CHANGES[change][0], CASES[name]
    early, late, only = (copy.deepcopy(built[name][0]) for _ in range(3))
    for pipe in (early, late, only):
        pipe.set_progress_bar_config(disable=True)
    make(only, tmp_path / "only")
    plain = draw(case, only)
    assert (change in REAL) != alike(plain, built[name][1])
    with dittocache.enable(late, RECIPES[where]) as cache:
        unchanged = draw(case, late)
        make(late, tmp_path / "late")
        drawn = draw(case, late)
        if where != "linear" or change != "fuse-projections":  # whose single layers are not called
            assert cache.trace.steps == tuple(range(5)) and cache.trace.table.mean() == pytest.approx(0.6)
        assert torch.equal(draw(case, late), drawn)
        if change not in REAL:
            assert alike(drawn, unchanged)
    assert not alike(drawn, plain) and alike(draw(case, late), plain)
    make(early, tmp_path / "early")
    before = draw(case, early)
    with dittocache.enable(early, RECIPES[where]):
        assert alike(draw(case, early), drawn)
    assert torch.equal(draw(case, early), before)


UNDONE = {
    "offload-model": lambda pipe: pipe.remove_all_hooks(),
    "offload-sequentially": lambda pipe: pipe.remove_all_hooks(),
    "fuse-projections": lambda pipe: pipe.transformer.unfuse_qkv_projections(),
    "adapt": lambda pipe: pipe.transformer.delete_adapters("style"),
}


@pytest.mark.parametrize("order", ["before", "while"])
@pytest.mark.parametrize("change", UNDONE)
def test_a_change_that_is_undone_while_a_cache_is_on(change, order, built, tmp_path):
    """The cache is neither lost nor in the way, and the model ends as it began."""
    make, undo, case = CHANGES[change][0], UNDONE[change], CASES["flux"]
    pipe = copy.deepcopy(built["flux"][0])
    pipe.set_progress_bar_config(disable=True)
    for where in ("module", "linear"):
        with dittocache.enable(pipe, RECIPES[where]):
            cached = draw(case, pipe)
        if order == "before":
            make(pipe, tmp_path)
        with dittocache.enable(pipe, RECIPES[where]) as cache:
            if order == "while":
                make(pipe, tmp_path)
            draw(case, pipe)
            undo(pipe)
            assert alike(draw(case, pipe), cached)
            assert cache.trace.steps == tuple(range(5)) and cache.trace.table.mean() < 0.7
        assert alike(draw(case, pipe), built["flux"][1])


@pytest.mark.parametrize("where", ["module", "linear"])
def test_lora_of_a_pipeline_comes_and_goes_while_a_cache_is_on(where, built):
    """Loaded, scaled, merged, taken out again: every picture is that of a cache that is put on then."""
    peft = pytest.importorskip("peft")
    case, trained = CASES["flux"], copy.deepcopy(built["flux"][0])
    adapt(trained, None)
    weights = peft.get_peft_model_state_dict(trained.transformer, adapter_name="style")
    weights = {f"transformer.{key}": value.clone() for key, value in weights.items()}
    pipe, fresh = (copy.deepcopy(built["flux"][0]) for _ in range(2))
    changes = {
        "loaded": lambda pipe: pipe.load_lora_weights(dict(weights), adapter_name="style"),
        "scaled": lambda pipe: pipe.set_adapters(["style"], [0.5]),
        "merged": lambda pipe: pipe.fuse_lora(),
        "parted": lambda pipe: pipe.unfuse_lora(),
        "unloaded": lambda pipe: pipe.unload_lora_weights(),
    }
    for one in (pipe, fresh):
        one.set_progress_bar_config(disable=True)
    drawn = {}
    with dittocache.enable(pipe, RECIPES[where]) as cache:
        drawn["before"] = draw(case, pipe)
        for name, change in changes.items():
            change(pipe)
            drawn[name] = draw(case, pipe)
            assert cache.trace.steps == tuple(range(5)) and cache.trace.table.mean() < 0.7, name
    for name, change in changes.items():
        change(fresh)
        with dittocache.enable(fresh, RECIPES[where]):
            assert alike(draw(case, fresh), drawn[name]), name
    assert not alike(drawn["loaded"], drawn["before"]) and not alike(drawn["scaled"], drawn["loaded"])
    # of single layers, those of the model are kept and the adapters' own are not
    assert where == "linear" or alike(drawn["merged"], drawn["scaled"])
    assert alike(drawn["unloaded"], drawn["before"])
    assert alike(draw(case, pipe), built["flux"][1])


def test_a_transformer_that_was_replaced_is_not_cached_and_says_so():
    """On, but without effect: one line, and the run is the plain one."""
    case, pipe, other = CASES["sd3"], CASES["sd3"].build(0), CASES["sd3"].build(1)
    before, plain = pipe.transformer, draw(CASES["sd3"], other)
    with dittocache.enable(pipe, RECIPES["module"]) as cache:
        cached = draw(case, pipe)
        pipe.transformer = other.transformer
        with pytest.warns(
            UserWarning, match=r"dittocache: .*StableDiffusion3Pipeline did not call.*enable again"
        ) as seen:
            assert torch.equal(draw(case, pipe), plain)
        assert len([w for w in seen if "dittocache" in str(w.message)]) == 1
        pipe.transformer = before
        assert torch.equal(draw(case, pipe), cached)
        pipe.transformer = other.transformer
        with dittocache.enable(pipe, RECIPES["module"]) as again:
            draw(case, pipe)
            assert not cache.enabled and again.trace.table.mean() < 0.7
    assert not tiny.traces_of_cache(before) and not tiny.traces_of_cache(other.transformer)


@pytest.mark.slow
def test_a_compiled_module_around_the_transformer(built):
    """`torch.compile(pipe.transformer)` is another module around it: the hooks inside work on."""
    case, pipe = CASES["flux"], copy.deepcopy(built["flux"][0])
    pipe.set_progress_bar_config(disable=True)
    with dittocache.enable(pipe, RECIPES["stack"]):
        cached = draw(case, pipe)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with dittocache.enable(pipe, RECIPES["stack"]) as cache:
        assert alike(draw(case, pipe), cached) and cache.trace.table.mean() < 0.7
    assert alike(draw(case, pipe), built["flux"][1])


def test_enabled_in_the_middle_of_a_run():
    """The rest of that run is computed, which is said; the next one is cached."""
    case, pipe = CASES["flux"], CASES["flux"].build(0)
    plain, caches = draw(case, pipe), []

    def on(pipe, k, t, inputs):
        if k == 1:
            caches.append(dittocache.enable(pipe, RECIPES["module"]))
        return {}

    with pytest.warns(UserWarning, match="outside of any run was computed without caching"):
        assert torch.equal(draw(case, pipe, callback_on_step_end=on), plain)
    cached = draw(case, pipe)
    assert caches[0].trace.table.mean() < 0.7 and not alike(cached, plain)
    caches[0].disable()
    assert torch.equal(draw(case, pipe), plain)


@pytest.mark.parametrize("where", ["module", "stack", "model"])
@pytest.mark.parametrize("order", ["before", "while"])
def test_forward_hooks_see_every_step(where, order, built):
    """Those of the model and its blocks, with what the blocks hand on, computed or not."""
    pipe, _ = built["wan"]
    case, model = CASES["wan"], pipe.transformer
    with dittocache.enable(pipe, RECIPES[where]):
        expected = draw(case, pipe)
    watched = {"model": model, "first": model.blocks[0], "last": model.blocks[-1]}
    calls = {name: [] for name in watched}
    cache = dittocache.enable(pipe, RECIPES[where]) if order == "while" else None
    handles = []
    for name, module in watched.items():
        see = lambda module, args, output, name=name: calls[name].append(tuple(output[0].shape))  # noqa: E731
        handles.append(module.register_forward_hook(see))
    cache = cache or dittocache.enable(pipe, RECIPES[where])
    assert torch.equal(draw(case, pipe), expected)
    cache.disable()
    for handle in handles:
        handle.remove()
    forwards = 2 * 5  # of two branches
    assert len(calls["model"]) == forwards and len(set(calls["model"])) == 1
    computed = 2 * 3 if where == "model" else forwards
    assert len(calls["first"]) == len(calls["last"]) == computed and len(set(calls["first"] + calls["last"])) == 1


# ---- copies ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["module", "linear"])
@pytest.mark.parametrize("name", ["dit", "flux", "wan-2.2"])
def test_copies_of_a_cached_pipeline_are_uncached_and_work(name, where):
    case, pipe = CASES[name], CASES[name].build(0)
    plain = draw(case, pipe)
    before = tiny.fingerprint(pipe.transformer)
    with dittocache.enable(pipe, RECIPES[where]) as cache:
        cached = draw(case, pipe)
        twin = copy.deepcopy(pipe)
        buffer = io.BytesIO()
        torch.save(pipe.transformer, buffer)
        buffer.seek(0)
        transformers = [
            twin.transformer,
            copy.deepcopy(pipe.transformer),
            torch.load(buffer, weights_only=False),
        ]
        assert all(tiny.fingerprint(transformer) == before for transformer in transformers)
        assert type(twin) is type(CASES[name].build(0)) and type(twin.scheduler) is type(CASES[name].build(0).scheduler)
        twin.set_progress_bar_config(disable=True)
        run_before = cache.trace
        for transformer in transformers:
            twin.transformer = transformer
            assert torch.equal(draw(case, twin), plain)
        assert cache.trace == run_before
        for p in twin.transformer.parameters():
            p.data.zero_()
        assert torch.equal(draw(case, pipe), cached)
        with dittocache.enable(transformers[0], RECIPES[where], scheduler=twin.scheduler):
            twin.transformer = transformers[0]
            assert name == "wan-2.2" or torch.equal(draw(case, twin), cached)
        assert torch.equal(draw(case, pipe), cached)


def test_copying_in_the_middle_of_a_run(built):
    pipe, plain = built["flux"]
    copies = []

    def copying(pipe, k, t, inputs):
        copies.append(copy.deepcopy(pipe))
        return {}

    with dittocache.enable(pipe, RECIPES["module"]):
        cached = draw(CASES["flux"], pipe)
        assert torch.equal(draw(CASES["flux"], pipe, callback_on_step_end=copying), cached)
    for twin in copies[::2]:
        twin.set_progress_bar_config(disable=True)
        assert alike(draw(CASES["flux"], twin), plain)


@pytest.mark.parametrize("name", ["sd3", "wan-2.2"])
def test_a_cached_pipeline_is_saved_under_plain_names(name, tmp_path):
    case, pipe = CASES[name], CASES[name].build(0)
    plain = draw(case, pipe)
    pipe.save_pretrained(tmp_path / "plain")
    with dittocache.enable(pipe, RECIPES["linear"]):
        draw(case, pipe)
        pipe.save_pretrained(tmp_path / "cached")
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    assert files == {p.relative_to(tmp_path / "cached") for p in (tmp_path / "cached").rglob("*") if p.is_file()}
    for file in files:
        assert (tmp_path / "cached" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    index = json.loads((tmp_path / "cached" / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    for part in ("transformer", "scheduler"):
        cls = type(getattr(pipe, part))
        setattr(pipe, part, cls.from_pretrained(tmp_path / "cached" / part))
        assert type(getattr(pipe, part)) is cls
    assert torch.equal(draw(case, pipe), plain)
