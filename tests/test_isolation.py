"""Runs never see each other: threads, tasks, several pipelines over one transformer, requests that are interleaved."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

import dittocache

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
