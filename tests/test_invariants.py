"""What must always hold, over every method and every model: design, section 4."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler

import dittocache
from dittocache import Plan, hooks

MODELS = ["dit", "pixart", "flux", "uvit", "glyphs"]
SELECTORS = ["attention", "value-norm", "random", "similarity", "norm", "compress", "straight"]
# a share of tokens that leaves something to select even on 7 of them
SHARE = {"ratio": 0.3, "ratio_schedule": "constant"}
METHODS = {
    "fora": ("fora", {"interval": 3}),
    "fora-start": ("fora", {"interval": 2, "anchor": "start"}),
    **{f"toca-{s}": ("toca", {"selector": s, **SHARE}) for s in SELECTORS},
    **{f"duca-{s}": ("duca", {"selector": s, "interval": 4, **SHARE}) for s in SELECTORS},
    "toca-default": ("toca", {}),
    "toca-once-a-step": ("toca", {"per_block_kind": False, "selector": "random", **SHARE}),
    "toca-shared-halves": ("toca", {"share_guidance_indices": True, "selector": "value-norm", **SHARE}),
    "toca-no-extras": ("toca", {"soft_weight": 0.0, "spatial_bonus": None, "selector": "random", **SHARE}),
    "toca-ratio0": ("toca", {"ratio": 0.0, "selector": "random"}),
    "duca-ratio0": ("duca", {"ratio": 0.0, "interval": 4, "selector": "random"}),
    "taylorseer": ("taylorseer", {}),
    "taylorseer-lite": ("taylorseer", {"lite": True, "order": 2, "interval": 3, "schedule": "diffusers"}),
    "magcache": ("magcache", tiny.data_for("magcache")),
    "dpcache": ("dpcache", lambda model, steps: tiny.data_for("dpcache", model, steps)),
    "lemica": ("lemica", lambda model, steps: tiny.data_for("lemica", model, steps)),
    "teacache": ("teacache", {"threshold": 2.0}),
    "fbcache": ("fbcache", {"threshold": 1.2}),
    "dicache": ("dicache", {"threshold": 2.0, "retention": 0.1}),
}
# what the numbers of steps and the model decide: parameters as functions of both
CORRECTED = {
    "l2c": ("l2c", lambda model, steps: tiny.data_for("l2c", model, steps) | {"threshold": 0.7}),
    "l2c-outer": ("l2c", lambda m, steps: tiny.data_for("l2c", m, steps) | {"threshold": 0.8, "rows": "outer"}),
    "eoc": ("eoc", lambda model, steps: tiny.data_for("eoc", model, steps)),
    "eoc-held-back": ("eoc", lambda m, steps: tiny.data_for("eoc", m, steps) | {"write_back": False, "interval": 3}),
    "goc": ("goc", {}),
    "goc-computed-only": ("goc", {"interval": 3, "computed_only": True}),
    "goc-correct-steps": ("goc", {"correct_steps": (3, 5), "interval": 3}),
    "goc-l2c": (
        "goc",
        lambda m, steps: tiny.data_for("l2c", m, steps) | {"base": "l2c", "threshold": 0.8},
    ),
    "icc": ("icc", lambda model, steps: tiny.data_for("icc", model)),
    "icc-3": ("icc", lambda model, steps: tiny.data_for("icc", model) | {"period": 3}),
    "icc-reuse": ("icc", {"factors": "reuse"}),
    "eb-cache": ("eb-cache", {"interval": 2}),
    "eb-cache-mixed": ("eb-cache", lambda m, steps: {"table": ((0, 1, 2, 3) * 9)[:steps]}),
    "eb-cache-index": ("eb-cache", lambda m, steps: {"table": ((0, 1, 2, 3) * 9)[:steps], "table_order": "index"}),
}
TRAINED_FOR_STEPS = {"l2c", "l2c-outer", "goc-l2c", "eb-cache-mixed", "eb-cache-index", "dpcache", "lemica"}
METHODS |= CORRECTED


# the bundled model is larger: one of each sort there
LARGE = {"fora", "toca-attention", "toca-value-norm", "toca-random", "toca-default", "duca-attention", "duca-ratio0"}
LARGE |= {"l2c", "goc", "icc"}
PAIRS = [(m, name) for m, name in itertools.product(MODELS, METHODS) if m != "glyphs" or name in LARGE]
# one of each sort, for the tests about runs rather than about numbers
SOME = [(m, name) for m in ("dit", "pixart", "flux") for name in ("fora", "toca-value-norm", "duca-random")]
SOME += [("uvit", "fora"), ("uvit", "duca-random")]
SOME += [(m, name) for m in ("dit", "flux", "uvit") for name in ("l2c", "eoc", "goc-computed-only", "icc", "eb-cache")]
SOME += [("pixart", name) for name in ("goc", "icc", "eb-cache-mixed", "goc-l2c")]
SOME += [(m, name) for m in ("dit", "flux", "uvit") for name in ("taylorseer", "magcache", "dpcache", "lemica")]
SOME += [(m, name) for m in ("dit", "flux", "uvit") for name in ("teacache", "fbcache", "dicache")]
STEPS = 10


@pytest.fixture(scope="module")
def built():
    return {name: tiny.build(name) for name in MODELS}


@pytest.fixture
def models(built):
    """The models by name; what a failed test leaves on them is taken off, so that it fails alone."""
    yield built
    for model in built.values():
        for cache in hooks.caches_on(model):
            cache.disable()
        for module in model.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


def enable(target, name, steps=STEPS, **kwargs):
    method, params = METHODS[name]
    if callable(params):
        params = params(getattr(target, "transformer", target), steps)
    return dittocache.enable(target, method, **params, **kwargs)


# ---- frozen input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_frozen_input_is_exact_and_really_skips(models, name, method):
    model = models[name]
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    linears = method in ("icc", "icc-3")
    with tiny.Counter(model, linears) as full:
        tiny.call(model, tiny.step(model, 0))
    with enable(model, method) as cache:
        with tiny.Counter(model, linears) as counter:
            outputs = tiny.predictions(model, cache, STEPS, frozen=True)
        trace = cache.trace
    for k, output in enumerate(outputs):
        assert tiny.relative(output, expected) < 1e-5, f"step {k}"
    # compute was really skipped, counted on the layers themselves, and the trace tells the truth about it
    # (of FLUX's single-stream blocks, only steps that reuse everything are reused, and no single linear layer)
    assert 0 < counter.total < (0.9 if name == "flux" and method in CORRECTED else 0.8) * STEPS * full.total
    done = trace.table.sum(0)
    for site, share in zip(trace.sites, done, strict=True):
        if site in counter.calls:
            assert counter.tokens()[site] == pytest.approx(share * full.tokens()[site], abs=1e-6), site
    assert not tiny.traces_of_cache(model)


@pytest.mark.parametrize("guidance", ["batched", "separate"])
@pytest.mark.parametrize(("name", "method"), SOME)
def test_frozen_input_under_guidance(models, name, method, guidance):
    """The branches never see each other's features: on frozen inputs their exact combination comes out."""
    model = models[name]
    x = tiny.latents(model)
    with torch.no_grad():
        expected = tiny.predict(model, x, 700, guidance)
        with enable(model, method) as cache, cache.run(STEPS):
            for k in range(STEPS):
                cache.step(k)
                assert tiny.relative(tiny.predict(model, x, 700, guidance), expected) < 1e-5, f"step {k}"
            trace = cache.trace
    assert trace.compute_fraction < (0.95 if method in CORRECTED else 0.8)
    assert trace.meta["branches"] == (2 if guidance == "separate" else 1)


@pytest.mark.parametrize("method", ["fora", "toca-attention", "duca-value-norm"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_frozen_input_at_other_batch_sizes(models, method, batch):
    model = models["dit"]
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True, batch=batch)
    with enable(model, method) as cache:
        for output in tiny.predictions(model, cache, 6, frozen=True, batch=batch):
            assert tiny.relative(output, expected) < 1e-5


# ---- everything computed --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["none", "fora", "ones", "ones-by-trace"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:dittocache")
def test_all_compute_plan_is_the_untouched_model_bit_for_bit(models, name, how):
    model = models[name]
    plain = tiny.predictions(model, None, 4)
    sites = [site.name for site in dittocache.describe(model).sites if site.kind != "stack"]
    if how == "none":
        cache = dittocache.enable(model, "none")
    elif how == "fora":
        cache = dittocache.enable(model, "fora", interval=1)
    elif how == "ones":
        cache = dittocache.enable(model, Plan(np.ones((4, len(sites))), tuple(sites)))
    else:
        with dittocache.enable(model, "none") as first:
            tiny.predictions(model, first, 4)
        cache = dittocache.enable(model, first.trace)
    with cache:
        cached = tiny.predictions(model, cache, 4)
        assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))
        assert cache.trace.compute_fraction == 1.0
        assert (cache.trace.table == 1).all() and cache.report().ideal_speedup == 1.0


@pytest.mark.parametrize("method", ["none", "fora"])
@pytest.mark.filterwarnings("ignore:dittocache")
def test_all_compute_pipeline_is_the_untouched_one(bundled_pipe, method):
    plain = tiny.draw(bundled_pipe, 4)
    with dittocache.enable(bundled_pipe, method, **({"interval": 1} if method == "fora" else {})):
        assert torch.equal(tiny.draw(bundled_pipe, 4), plain)


# ---- taking it off --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), SOME)
def test_disable_restores_the_model(models, name, method):
    model = models[name]
    before, plain = tiny.fingerprint(model), tiny.sample(model)
    cache = enable(model, method, steps=7)
    assert not torch.equal(tiny.sample_explicit(model, cache), plain)
    cache.disable()
    assert tiny.fingerprint(model) == before and not tiny.traces_of_cache(model)
    assert torch.equal(tiny.sample(model), plain)
    cache.disable()  # twice does no harm
    dittocache.disable(model)
    assert torch.equal(tiny.sample(model), plain)


@pytest.mark.parametrize("method", ["fora", "toca-attention", "duca-value-norm"])
def test_disable_restores_the_pipeline(pipe, method):
    before, cls, scheduler_cls = tiny.fingerprint(pipe), type(pipe), type(pipe.scheduler)
    plain = tiny.draw(pipe)
    enable(pipe, method)
    assert not torch.equal(tiny.draw(pipe), plain)
    dittocache.disable(pipe)
    assert tiny.fingerprint(pipe) == before and not tiny.traces_of_cache(pipe.transformer)
    assert type(pipe) is cls and type(pipe.scheduler) is scheduler_cls
    assert torch.equal(tiny.draw(pipe), plain)


def test_disable_restores_the_bundled_pipeline(bundled_pipe):
    before, plain = tiny.fingerprint(bundled_pipe), tiny.draw(bundled_pipe, 5)
    for method in ("fora", "toca-attention", "duca-attention"):
        with enable(bundled_pipe, method) as cache:
            assert not torch.equal(tiny.draw(bundled_pipe, 5), plain)
            assert cache.trace.compute_fraction < 0.9
        assert tiny.fingerprint(bundled_pipe) == before
    assert torch.equal(tiny.draw(bundled_pipe, 5), plain)


def test_disabled_in_the_middle_of_a_run_goes_on_uncached(pipe):
    cache = dittocache.enable(pipe, "fora", interval=6, anchor="start")

    def stop(pipe, k, t, inputs):
        if k == 2:
            cache.disable()
        return {}

    with tiny.Counter(pipe.transformer) as counter:
        tiny.draw(pipe, 6, callback_on_step_end=stop)
    assert counter.calls["transformer_blocks.0.ff"] == [16] * 4  # step 0, then 3, 4, 5
    assert not tiny.traces_of_cache(pipe.transformer)


def test_enabling_again_replaces(pipe):
    first = enable(pipe, "fora")
    with_fora = tiny.draw(pipe)
    second = enable(pipe, "toca-attention")
    assert not first.enabled and second.enabled
    assert not torch.equal(tiny.draw(pipe), with_fora)
    enable(pipe, "fora")
    assert torch.equal(tiny.draw(pipe), with_fora)
    dittocache.disable(pipe)
    assert not tiny.traces_of_cache(pipe.transformer)


# ---- nothing leaks from run to run ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), [("dit", "toca-compress"), ("pixart", "toca-attention"), *SOME])
def test_two_runs_in_a_row_are_equal(models, name, method):
    model = models[name]
    scheduler = DDIMScheduler()
    with enable(model, method, scheduler=scheduler) as cache:
        first = tiny.sample(model, scheduler, STEPS)
        trace = cache.trace
        assert torch.equal(tiny.sample(model, scheduler, STEPS), first)
        assert cache.trace == trace and trace.compute_fraction < (0.95 if method in CORRECTED else 0.8)


@pytest.mark.parametrize("method", ["fora", "toca-random", "duca-value-norm", "goc", "l2c", "icc", "eb-cache"])
def test_two_pictures_in_a_row_are_equal(bundled_pipe, method):
    with enable(bundled_pipe, method, steps=6):
        first = tiny.draw(bundled_pipe, 6)
        assert torch.equal(tiny.draw(bundled_pipe, 6), first)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("method", ["fora", "toca-attention", "duca-random", "eoc", "goc", "icc", "l2c"])
def test_interrupted_by_a_callback(pipe, method, at):
    def stop(pipe, k, t, inputs):
        if k == at:
            raise Stop
        return {}

    with enable(pipe, method, steps=6):
        undisturbed = tiny.draw(pipe, 6)
        with pytest.raises(Stop):
            tiny.draw(pipe, 6, seed=90, callback_on_step_end=stop)
        assert torch.equal(tiny.draw(pipe, 6), undisturbed)


@pytest.mark.parametrize(("name", "method"), SOME)
def test_interrupted_in_the_loop(models, name, method):
    model, scheduler = models[name], DDIMScheduler()

    def stop(k):
        if k == 4:
            raise Stop

    with enable(model, method, steps=7, scheduler=scheduler):
        undisturbed = tiny.sample(model, scheduler)
        with pytest.raises(Stop):
            tiny.sample(model, scheduler, seed=90, before=stop)
        assert torch.equal(tiny.sample(model, scheduler), undisturbed)


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize(("name", "method"), SOME)
def test_interrupted_inside_the_forward(models, name, method, at):
    model, scheduler = models[name], DDIMScheduler()
    last = model.norm if name == "uvit" else model.norm_out
    count = itertools.count()

    def fail(module, args):
        if next(count) == at:
            raise Stop

    with enable(model, method, steps=7, scheduler=scheduler):
        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            tiny.sample(model, scheduler, seed=90)
        handle.remove()
        again = tiny.sample(model, scheduler)
    with enable(model, method, steps=7, scheduler=scheduler):
        assert torch.equal(tiny.sample(model, scheduler), again)


def test_interrupted_explicit_run(models):
    model = models["dit"]
    with enable(model, "toca-attention") as cache:
        undisturbed = tiny.sample_explicit(model, cache)
        with pytest.raises(Stop), cache.run(7):
            for k in range(7):
                cache.step(k)
                tiny.call(model, tiny.step(model, k, seed=90))
                if k == 4:
                    raise Stop
        assert torch.equal(tiny.sample_explicit(model, cache), undisturbed)


def test_an_interrupted_run_does_not_complain_of_having_skipped_nothing(pipe):
    def stop(pipe, k, t, inputs):
        raise Stop

    with dittocache.enable(pipe, "fora"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Stop):
            tiny.draw(pipe, 6, callback_on_step_end=stop)


@pytest.mark.parametrize(("name", "method"), [pair for pair in SOME if pair[1] not in TRAINED_FOR_STEPS])
@pytest.mark.filterwarnings("ignore:dittocache")
def test_other_shapes_batches_and_step_counts_afterwards(models, name, method):
    """Runs of other sizes one after another equal those of a cache that has seen nothing else."""
    model, scheduler = models[name], DDIMScheduler()
    settings = [
        {"steps": 6},
        {"steps": 6, "batch": 1},
        {"steps": 5},
        {"steps": 6, "batch": 3},
        {"steps": 7, "guidance": "batched"},
        # U-ViT has one size, and a trend is for one
        *([] if name == "uvit" or method == "eoc" else [{"steps": 6, "size": 6 if name == "flux" else 12}]),
        {"steps": 7, "guidance": "separate"},
        {"steps": 6},
        {"steps": 1},
        {"steps": 6, "seed": 4},
    ]
    fresh = []
    for setting in settings:
        with enable(model, method, scheduler=scheduler):
            fresh.append(tiny.sample(model, scheduler, **setting))
    with enable(model, method, scheduler=scheduler):
        for setting, expected in zip(settings, fresh, strict=True):
            assert torch.equal(tiny.sample(model, scheduler, **setting), expected), setting


WITHIN = ["fora", "toca-attention", "duca-random", "toca-random", "toca-value-norm"]


@pytest.mark.parametrize("method", WITHIN + ["eoc", "goc", "goc-computed-only", "goc-correct-steps", "icc", "eb-cache"])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 1), (2, 3)])
def test_a_batch_that_changes_within_a_run(models, method, sizes):
    """Guidance switched off half-way, say: what is kept no longer fits and is computed anew."""
    model = models["dit"]
    batches = [sizes[0]] * 5 + [sizes[1]] * 5
    with enable(model, method) as cache, torch.no_grad(), cache.run(10):
        for k, batch in enumerate(batches):
            cache.step(k)
            output = tiny.call(model, tiny.step(model, 0, batch=batch))
            assert tiny.relative(output, tiny.call(tiny.dit(), tiny.step(model, 0, batch=batch))) < 1e-5, f"step {k}"


def test_a_precision_that_changes_within_a_run(models):
    model = tiny.dit()
    with dittocache.enable(model, "fora", interval=6, anchor="start") as cache, torch.no_grad(), cache.run(6):
        for k in range(6):
            cache.step(k)
            given = tiny.step(model, 0)
            if k >= 3:
                model.to(torch.float64)
                given["hidden_states"] = given["hidden_states"].double()
            assert tiny.call(model, given).dtype == given["hidden_states"].dtype


def test_batched_guidance_equals_separate_guidance(models):
    """With one selection per branch, it does not matter how the branches reach the model."""
    pairs = [("dit", "fora"), ("pixart", "toca-value-norm"), ("flux", "fora"), ("dit", "duca-attention")]
    pairs += [(m, name) for m in ("dit", "uvit") for name in ("l2c", "goc", "icc", "eb-cache-mixed", "eoc")]
    for name, method in [*pairs, ("pixart", "icc"), ("flux", "icc"), ("flux", "goc"), ("flux", "eb-cache-index")]:
        model, scheduler = models[name], DDIMScheduler()
        with enable(model, method, steps=9, scheduler=scheduler):
            batched = tiny.sample(model, scheduler, 9, guidance="batched")
            separate = tiny.sample(model, scheduler, 9, guidance="separate")
        assert tiny.relative(separate, batched) < 1e-4


def test_a_picture_does_not_depend_on_its_neighbours(models):
    """Static methods decide nothing over the batch."""
    model, scheduler = models["dit"], DDIMScheduler()
    for method in ("fora", "toca-attention", "toca-value-norm", "l2c", "goc-computed-only", "icc", "eoc"):
        with enable(model, method, steps=8, scheduler=scheduler) as cache, torch.no_grad():
            together = tiny.predictions(model, cache, 8, batch=3)
            for n in range(3):
                with cache.run(8):
                    for k in range(8):
                        cache.step(k)
                        given = tiny.step(model, k, 8, 3)
                        one = {key: v[n : n + 1] if torch.is_tensor(v) else v for key, v in given.items()}
                        assert tiny.relative(tiny.call(model, one), together[k][n : n + 1]) < 1e-5


# ---- loud -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "params", "steps"), [("fora", {"interval": 1}, 5), ("fora", {"interval": 3}, 1)])
def test_a_recipe_that_skipped_nothing_warns(pipe, method, params, steps):
    with dittocache.enable(pipe, method, **params) as cache:
        with pytest.warns(UserWarning, match="skipped nothing"):
            tiny.draw(pipe, steps)
        assert any("skipped nothing" in w for w in cache.report().warnings)


@pytest.mark.parametrize("method", ["fora", "toca-attention", "duca-attention"])
def test_a_recipe_that_works_does_not_warn(bundled_pipe, method):
    with enable(bundled_pipe, method) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.draw(bundled_pipe, 8)
        assert cache.report().warnings == ()


def test_report_tells_what_happened(bundled_pipe):
    with enable(bundled_pipe, "fora") as cache:
        tiny.draw(bundled_pipe, 7)
    report = cache.report()  # the last run is still told of after the cache is off
    assert (
        report.compute_fraction == cache.trace.compute_fraction == pytest.approx(report.flops_done / report.flops_full)
    )
    assert report.ideal_speedup == pytest.approx(1 / report.compute_fraction) and report.ideal_speedup > 1.5
    assert set(report.to_dict()) >= {
        "compute_fraction",
        "ideal_speedup",
        "flops_full",
        "flops_done",
        "bytes_peak",
        "warnings",
    }
    assert "fora" in str(report) and report.steps == 7
    assert report.kinds == {"attention": pytest.approx(3 / 7), "feed-forward": pytest.approx(3 / 7)}
