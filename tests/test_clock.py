"""Where a run stands: schedulers of every sort, explicit runs, and what observing a scheduler must not change."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings

import diffusers
import pytest
import tiny
import torch
from diffusers import DDIMScheduler

import dittocache

FF = "transformer_blocks.0.ff"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # schedulers use numpy in old ways
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpm2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm-single": (diffusers.DPMSolverSinglestepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "flow-heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
}


def scheduler_of(name):
    cls, config = SCHEDULERS[name]
    return cls(**config)


# ---- schedulers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", ["none", "separate"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_network_evaluation_is_a_step(name, guidance):
    """T is the number of evaluations per branch, 2 n - 1 for second-order solvers, and the schedule follows it."""
    model, scheduler = tiny.dit(), scheduler_of(name)
    scheduler.set_timesteps(6)
    evaluations = len(scheduler.timesteps)
    if name in ("heun", "flow-heun"):
        assert evaluations > 6
    with dittocache.enable(model, "fora", interval=3, scheduler=scheduler) as cache, tiny.Counter(model) as counter:
        torch.manual_seed(0)  # ancestral noise
        tiny.sample(model, scheduler, 6, guidance=guidance)
        trace = cache.trace
    expected = [k == 0 or (evaluations - 1 - k) % 3 == 0 for k in range(evaluations)]
    assert trace.steps == tuple(range(evaluations))
    assert (trace.table[:, 0] == expected).all() and (trace.table[:, 0] == trace.table.T).all()
    assert len(counter.calls[FF]) == sum(expected) * (2 if guidance == "separate" else 1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_observing_a_scheduler_changes_nothing_in_it(name):
    model = tiny.dit()
    torch.manual_seed(0)
    plain = tiny.sample(model, scheduler_of(name), 5)
    scheduler = scheduler_of(name)
    cls = type(scheduler)
    with dittocache.enable(model, "none", scheduler=scheduler), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dittocache")
        torch.manual_seed(0)
        assert torch.equal(tiny.sample(model, scheduler, 5), plain)
        assert isinstance(scheduler, cls)
    assert type(scheduler) is cls


def test_a_run_begins_at_set_timesteps():
    """Even in the middle of another: what was kept is forgotten."""
    model, scheduler = tiny.dit(), DDIMScheduler()
    with (
        dittocache.enable(model, "fora", interval=8, anchor="start", scheduler=scheduler),
        torch.no_grad(),
        tiny.Counter(model) as counter,
    ):
        scheduler.set_timesteps(8)
        for k in range(3):
            prediction = tiny.call(model, tiny.step(model, k))
            scheduler.step(prediction, scheduler.timesteps[k], torch.zeros_like(prediction))
        assert len(counter.calls[FF]) == 1
        scheduler.set_timesteps(8)
        other = tiny.step(model, 0, seed=9)
        output = tiny.call(model, other)
        assert len(counter.calls[FF]) == 2
    assert torch.equal(output, tiny.call(model, other))


def test_image_to_image_runs_begin_in_the_middle():
    """The steps of a run that starts late are counted from its own first step, which is computed."""
    model = tiny.dit()
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with dittocache.enable(model, "fora", interval=4, scheduler=flow) as cache, torch.no_grad():
        with tiny.Counter(model) as counter:
            flow.set_timesteps(10)
            flow.set_begin_index(4)
            x = tiny.latents(model)
            for t in flow.timesteps[4:]:
                x = flow.step(tiny.predict(model, x, t), t, x, return_dict=False)[0]
        assert len(counter.calls[FF]) == 3  # k = 0, 1, 5 of 6
        assert cache.trace.steps == tuple(range(6)) and cache.trace.meta["num_steps"] == 6


def test_runs_that_begin_in_the_middle_without_saying_so():
    """Schedulers without a begin index are asked to scale the first input; the first timestep tells."""
    model, ddim = tiny.dit(), DDIMScheduler()
    with dittocache.enable(model, "fora", interval=4, scheduler=ddim) as cache, torch.no_grad():
        for start in (4, 0):  # nothing of a run that began late is left to the next
            ddim.set_timesteps(10)
            x = tiny.latents(model)
            for t in ddim.timesteps[start:]:
                x = ddim.step(tiny.predict(model, ddim.scale_model_input(x, t), t), t, x, return_dict=False)[0]
            trace = cache.trace
            assert trace.steps == tuple(range(10 - start)) and trace.meta["num_steps"] == 10 - start
            assert trace.meta["timesteps"] == ddim.timesteps[start:].tolist()


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm2m"])
def test_a_scheduler_that_is_stepped_twice_counts_once(name):
    """To preview the picture, say: a step lasts until the next forward."""
    model, scheduler = tiny.dit(), scheduler_of(name)
    with dittocache.enable(model, "fora", interval=2, scheduler=scheduler) as cache, torch.no_grad():
        scheduler.set_timesteps(6)
        x = tiny.latents(model)
        for t in scheduler.timesteps:
            prediction = tiny.predict(model, scheduler.scale_model_input(x, t), t, "separate")
            copy.deepcopy(scheduler).step(prediction, t, x)  # not this one's: nobody listens
            x = scheduler.step(prediction, t, x).prev_sample
            if name == "ddim":
                scheduler.step(prediction, t, x)
        assert cache.trace.steps == tuple(range(6)) and cache.trace.meta["branches"] == 2
        assert cache.trace.table[:, 0].tolist() == [1, 1, 0, 1, 0, 1]


def test_timesteps_are_in_the_trace():
    model, scheduler = tiny.dit(), DDIMScheduler()
    with dittocache.enable(model, "fora", scheduler=scheduler) as cache:
        tiny.sample(model, scheduler, 5)
        assert cache.trace.meta["timesteps"] == scheduler.timesteps.tolist()
        with cache.run(3, timesteps=[900, 500, 100]) as run:
            for k in range(3):
                run.step(k)
                tiny.call(model, tiny.step(model, k))
        assert cache.trace.meta["timesteps"] == [900.0, 500.0, 100.0]


@pytest.mark.filterwarnings("ignore:dittocache")
def test_more_forwards_than_announced_are_computed_in_full_with_a_warning():
    model, scheduler = tiny.dit(), DDIMScheduler()
    with dittocache.enable(model, "fora", interval=3, scheduler=scheduler), torch.no_grad():
        tiny.sample(model, scheduler, 4)
        with tiny.Counter(model) as counter:
            with pytest.warns(UserWarning, match=r"without caching|computed in full"):
                late = tiny.call(model, tiny.step(model, 5))
            tiny.call(model, tiny.step(model, 6))
    assert counter.calls[FF] == [16, 16]
    assert torch.equal(late, tiny.call(model, tiny.step(model, 5)))


# ---- the pipeline's scheduler ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dpm2m", "unipc", "heun", "euler"])
def test_scheduler_swapped_after_enable(pipe, name):
    before = pipe.scheduler
    with dittocache.enable(pipe, "fora", interval=3) as cache:
        tiny.draw(pipe, 6)
        pipe.scheduler = SCHEDULERS[name][0].from_config(pipe.scheduler.config)
        swapped = tiny.draw(pipe, 6)
        evaluations = len(pipe.scheduler.timesteps)
        assert cache.trace.steps == tuple(range(evaluations)) and cache.trace.compute_fraction < 0.8
        assert type(before) is DDIMScheduler  # no longer watched
    assert type(pipe.scheduler) is SCHEDULERS[name][0]
    with dittocache.enable(pipe, "fora", interval=3):
        assert torch.equal(tiny.draw(pipe, 6), swapped)


def test_a_scheduler_made_of_a_watched_ones_class(pipe):
    """`type(s).from_config(s.config)`, as pipelines do, gives a scheduler of the plain sort that works and saves."""
    with dittocache.enable(pipe, "fora", interval=3) as cache:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert tiny.draw(pipe, 6).isfinite().all() and cache.trace.compute_fraction < 0.8
    assert type(pipe.scheduler) is DDIMScheduler


@pytest.mark.parametrize("name", ["ddim", "dpm2m", "unipc", "heun", "flow-euler"])
def test_copies_and_pickles_of_a_watched_scheduler_are_plain(name):
    model, scheduler = tiny.dit(), scheduler_of(name)
    cls = type(scheduler)
    with dittocache.enable(model, "fora", scheduler=scheduler) as cache:
        scheduler.set_timesteps(4)
        copies = [copy.copy(scheduler), copy.deepcopy(scheduler)]
        copies += [pickle.loads(pickle.dumps(scheduler, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)]
        run = cache._last
        for other in copies:
            assert type(other) is cls and other.config == scheduler.config
            assert torch.equal(other.timesteps, scheduler.timesteps)
            other.set_timesteps(3)  # nobody listens
            assert len(other.timesteps) != len(scheduler.timesteps)
        assert cache._last is run
        assert type(scheduler) is not cls  # the original is still watched
    assert type(scheduler) is cls


def test_signatures_and_names_are_unchanged(pipe):
    """Pipelines look at signatures to see what a scheduler takes; users look at names."""

    def seen():
        s = pipe.scheduler
        return (
            [inspect.signature(f) for f in (s.step, s.set_timesteps, pipe.__call__, type(pipe).__call__)],
            [inspect.getdoc(f) for f in (s.step, s.set_timesteps, pipe.__call__)],
            [(type(o).__name__, type(o).__qualname__, type(o).__module__) for o in (s, pipe)],
            list(inspect.signature(pipe.transformer.forward).parameters),
            list(inspect.signature(pipe.transformer.transformer_blocks[0].forward).parameters),
            str(s),
            repr(pipe.transformer),
        )

    before = seen()
    with dittocache.enable(pipe, "toca"):
        assert seen() == before
        assert set(inspect.signature(pipe.scheduler.step).parameters) >= {"eta", "generator"}
    assert seen() == before


def test_save_pretrained_while_on_writes_the_own_class_names(pipe, tmp_path):
    plain = tiny.draw(pipe, 4)
    with dittocache.enable(pipe, "fora"):
        pipe.save_pretrained(tmp_path / "pipe")
        pipe.scheduler.save_pretrained(tmp_path / "scheduler")
        pipe.transformer.save_pretrained(tmp_path / "transformer")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == "GlyphsPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    for folder in ("pipe/scheduler", "scheduler"):
        config = json.loads((tmp_path / folder / "scheduler_config.json").read_text())
        assert config["_class_name"] == "DDIMScheduler"
    assert type(DDIMScheduler.from_pretrained(tmp_path / "scheduler")) is DDIMScheduler
    loaded = type(pipe).from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.draw(loaded, 4), plain)
    assert not tiny.traces_of_cache(loaded.transformer)
    again = type(pipe.transformer).from_pretrained(tmp_path / "transformer", low_cpu_mem_usage=False)
    assert again.state_dict().keys() == pipe.transformer.state_dict().keys()


def test_state_dict_is_unchanged_while_on(model):
    before = list(model.state_dict())
    with dittocache.enable(model, "fora"):
        assert list(model.state_dict()) == before


# ---- explicit runs --------------------------------------------------------------------------------------------------
def test_explicit_run_equals_the_scheduler_clock(model):
    for guidance in ("none", "batched", "separate"):
        scheduler = DDIMScheduler()
        with dittocache.enable(model, "fora", scheduler=scheduler):
            watched = tiny.sample(model, scheduler, guidance=guidance)
        with dittocache.enable(model, "fora") as cache:
            assert torch.equal(tiny.sample_explicit(model, cache, guidance=guidance), watched)


def test_explicit_run_inside_a_watched_one(pipe):
    """A raw loop over a pipeline's transformer with the clock set by hand, and the pipeline's own scheduler too."""
    with (
        dittocache.enable(pipe, "fora", interval=3) as cache,
        torch.no_grad(),
        tiny.Counter(pipe.transformer) as counter,
    ):
        x = tiny.latents(pipe.transformer)
        pipe.scheduler.set_timesteps(7)
        with cache.run(7) as run:
            for k, t in enumerate(pipe.scheduler.timesteps):
                run.step(k)
                x = pipe.scheduler.step(tiny.predict(pipe.transformer, x, t), t, x).prev_sample
    assert counter.calls[FF] == [16] * 3 and cache.trace.steps == tuple(range(7))


def test_branches_by_number():
    """The branch may be named, in any order; each keeps its own features."""
    model = tiny.pixart()
    yes, no = (tiny.inputs(model, tiny.latents(model), 500, tiny.condition(model, 2, s)) for s in (0, -1))
    with torch.no_grad(), dittocache.enable(model, "fora", interval=9, anchor="start") as cache, cache.run(4):
        expected = tiny.call(tiny.pixart(), yes), tiny.call(tiny.pixart(), no)
        for k, order in enumerate([(0, 1), (1, 0), (1,), (0, 1)]):
            for branch in order:
                cache.step(k, branch=branch)
                assert tiny.relative(tiny.call(model, (yes, no)[branch]), expected[branch]) < 1e-5
        assert cache.trace.meta["branches"] == 2 and (cache.trace.table[1:] == 0).all()


# which branches are called at steps 0 to 5: the conditional (0), the unconditional (-1), that of another prompt (1);
# and how often in all a branch begins anew: a prompt that is new takes the place of one not used in the last step
ORDERS = {
    "one joins, and goes first": ([(0,), (0,), (-1, 0), (-1, 0), (-1, 0), (-1, 0)], 2),
    "one leaves, another comes": ([(0, -1), (0, -1), (-1,), (-1, 1), (1, -1), (0, 1)], 4),
    "every other step": ([(0, -1), (0,), (-1, 0), (0,), (0, -1), (0,)], 2),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("how", ORDERS)
def test_branches_are_told_apart_by_what_they_are_conditioned_on(how, fresh):
    """Not by their order, which may change on the way. Inputs do not, so each goes on to give what it gave first.

    Some loops hand on the same text in every step, others a `fresh` tensor.
    """
    model, scheduler = tiny.pixart(), DDIMScheduler()
    orders, computed = ORDERS[how]
    conditions = {branch: tiny.condition(model, 2, branch) for branch in (0, -1, 1)}
    x = tiny.latents(model)
    plain = {b: tiny.call(model, tiny.inputs(model, x, 500, given)).detach() for b, given in conditions.items()}
    with torch.no_grad(), dittocache.enable(model, "fora", interval=9, anchor="start", scheduler=scheduler):
        scheduler.set_timesteps(6)
        with tiny.Counter(model) as counter:
            for t, order in zip(scheduler.timesteps, orders, strict=True):
                for branch in order:
                    given = conditions[branch]
                    given = {name: value.clone() for name, value in given.items()} if fresh else given
                    output = tiny.call(model, tiny.inputs(model, x, 500, given))
                    assert tiny.relative(output, plain[branch]) < 1e-5
                scheduler.step(output, t, x)
    assert len(counter.calls[FF]) == computed


def test_one_text_for_several_branches():
    """Perturbed guidance: the branches of a step that have the same prompt are told apart by their order."""
    model, scheduler = tiny.pixart(), DDIMScheduler()
    given, inputs = tiny.condition(model, 2, 0), [tiny.latents(model, 2, n) for n in range(3)]
    plain = [tiny.call(model, tiny.inputs(model, x, 500, given)).detach() for x in inputs]
    with torch.no_grad(), dittocache.enable(model, "fora", interval=9, anchor="start", scheduler=scheduler) as cache:
        scheduler.set_timesteps(4)
        for t, count in zip(scheduler.timesteps, (3, 1, 2, 3), strict=True):
            for x, expected in zip(inputs[:count], plain):
                output = tiny.call(model, tiny.inputs(model, x, 500, given))
                assert tiny.relative(output, expected) < 1e-5
            scheduler.step(output, t, x)
        assert (cache.trace.table[1:] == 0).all()


@pytest.mark.filterwarnings("ignore:dittocache.*skipped nothing")
def test_text_that_changes_with_every_step_does_not_pile_up():
    """Features of other texts would be wrong, so each is computed; those of older ones are let go."""
    model, scheduler = tiny.pixart(), DDIMScheduler()
    held = []  # the texts live on
    with torch.no_grad(), dittocache.enable(model, "fora", scheduler=scheduler) as cache:
        bytes_of = []
        for texts in (2, 10):
            scheduler.set_timesteps(10)
            for k, t in enumerate(scheduler.timesteps):
                held.append(tiny.condition(model, 2, min(k, texts - 1)))
                output = tiny.call(model, tiny.inputs(model, tiny.latents(model), t, held[-1]))
                scheduler.step(output, t, tiny.latents(model))
            bytes_of.append(cache.report().bytes_peak)
        assert cache.trace.compute_fraction == 1
    assert bytes_of[1] == bytes_of[0]


@pytest.mark.parametrize("bad", [-1, 4, 1.0, 1.5, True, "1", None, float("nan")])
def test_step_out_of_range(bad):
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache, cache.run(4):
        with pytest.raises(ValueError, match=r"step.*0 to 3") as e:
            cache.step(bad)
        assert "\n" not in str(e.value) and repr(bad) in str(e.value)


def test_steps_do_not_go_backwards():
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache, cache.run(4):
        cache.step(2)
        cache.step(2)
        with pytest.raises(ValueError, match="step 1 comes before step 2"):
            cache.step(1)


@pytest.mark.parametrize("bad", [-1, 1.0, True, "0", None])
def test_branch_out_of_range(bad):
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache, cache.run(4), pytest.raises(ValueError, match="branch") as e:
        cache.step(0, branch=bad)
    assert repr(bad) in str(e.value)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "5", None, float("inf")])
def test_number_of_steps_out_of_range(bad):
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache, pytest.raises(ValueError, match=r"num_steps.*1 or more") as e:
        cache.run(bad)
    assert repr(bad) in str(e.value)


def test_timesteps_that_do_not_fit():
    with dittocache.enable(tiny.dit(), "fora") as cache, pytest.raises(ValueError, match=r"3 timesteps.*4 steps"):
        cache.run(4, timesteps=[3, 2, 1])


def test_steps_may_be_left_out():
    """A loop that skips a step of its own: the row of the step that is announced is followed."""
    model = tiny.dit()
    with dittocache.enable(model, "fora", interval=2, anchor="start") as cache, torch.no_grad(), cache.run(6):
        for k in (0, 1, 3, 4):
            cache.step(k)
            tiny.call(model, tiny.step(model, k))
        assert cache.trace.steps == (0, 1, 3, 4) and cache.trace.table[:, 0].tolist() == [1, 0, 0, 1]


# ---- no clock -------------------------------------------------------------------------------------------------------
def test_bare_transformer_without_a_clock_says_how_to_get_one(model):
    with dittocache.enable(model, "fora"):
        with pytest.raises(RuntimeError, match=r"scheduler=.*cache\.run\(num_steps\).*cache\.step\(i\)") as e:
            tiny.call(model, tiny.step(model, 0))
        assert "\n" not in str(e.value)
    assert tiny.call(model, tiny.step(model, 0)).isfinite().all()


def test_a_run_without_steps_says_so():
    model = tiny.dit()
    with dittocache.enable(model, "fora") as cache, cache.run(3), pytest.raises(RuntimeError, match=r"cache\.step"):
        tiny.call(model, tiny.step(model, 0))


def test_step_without_a_run_says_so():
    with dittocache.enable(tiny.dit(), "fora") as cache, pytest.raises(RuntimeError, match=r"cache\.run"):
        cache.step(0)


def test_a_run_on_a_disabled_cache_says_so():
    cache = dittocache.enable(tiny.dit(), "fora")
    cache.disable()
    with pytest.raises(RuntimeError, match="disabled"):
        cache.run(3)


def test_nothing_has_run_yet():
    with dittocache.enable(tiny.dit(), "fora") as cache:
        for ask in (lambda: cache.trace, cache.report):
            with pytest.raises(RuntimeError, match="nothing has run yet"):
                ask()


def test_a_forward_outside_of_any_run_is_computed_and_said_once(pipe):
    model = pipe.transformer
    expected = tiny.call(model, tiny.step(model, 0))
    with dittocache.enable(pipe, "fora"):
        with pytest.warns(UserWarning, match="outside of any run") as seen:
            outputs = [tiny.call(model, tiny.step(model, 0)) for _ in range(3)]
        assert len([w for w in seen if "dittocache" in str(w.message)]) == 1
    assert all(torch.equal(o, expected) for o in outputs)


def test_a_run_warns_once_in_all(pipe):
    """Not once a step or site."""
    with (
        dittocache.enable(pipe, "toca", selector="random", spatial_grid=3),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        tiny.draw(pipe, 8)
    assert len([w for w in seen if "spatial_bonus" in str(w.message)]) == 1
