"""Linear predictors of what the network returns: recorded runs, segments in closed form, factors fitted on the way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import dittocache
from dittocache import Recipe
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.fill import At, Entry, Linear, Taylor
from dittocache.plan import Site
from dittocache.tune import Predictors, search, shortest
from dittocache.tune.predictor import GIVE_UP, POWERS, least_squares
from dittocache.tune.segments import carried, products, strays
from dittocache.tune.trajectory import angles, finest, record, solution, stepped
from dittocache.when import ReuseSteps

STEPS = 8
SETUP = Setup(num_steps=STEPS, guidance_scale=1.5, seed=3, conditions=(1, 2, 5))
SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler)


def pipeline(scheduler: type = DDIMScheduler):
    return tiny.pipeline(scheduler=scheduler(clip_sample=False) if scheduler is DDIMScheduler else scheduler())


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def planner(pipe) -> Predictors:
    return Predictors(pipe, SETUP, range(4), range(4, 8))


# ---- recorded runs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_recorded_run_is_what_the_scheduler_made(scheduler):
    pipe = pipeline(scheduler)
    runs = record(pipe, SETUP, [0, 1])
    assert runs.latents.shape == (STEPS + 1, 2, 1, 8, 8) and runs.predictions.shape == (STEPS, 2, 1, 8, 8)
    again = scheduler.from_config(pipe.scheduler.config)
    again.set_timesteps(STEPS)
    latents = runs.latents[0]
    for k, timestep in enumerate(again.timesteps):
        assert torch.allclose(latents, runs.latents[k], atol=1e-5 * float(latents.abs().max()))
        latents = again.step(runs.predictions[k], timestep, latents, return_dict=False)[0]
    assert torch.allclose(latents, runs.latents[-1], atol=1e-4)
    assert torch.equal(draw(pipe, SETUP, [0, 1]), runs.pictures), "nothing is left behind"


def test_a_gain_is_what_a_prediction_does_to_the_next_latents(pipe):
    runs = record(pipe, SETUP, [0])
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    change = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, timestep in enumerate(scheduler.timesteps):
        plain = stepped(scheduler, runs.predictions[k], timestep, runs.latents[k])
        moved = stepped(scheduler, runs.predictions[k] + change, timestep, runs.latents[k])
        assert torch.allclose(moved - plain, float(runs.gains[k]) * change, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler(clip_sample=True, clip_sample_range=0.1)])
def test_schedulers_that_are_not_linear_are_refused(scheduler):
    with pytest.raises(ValueError, match="draws noise, clips or thresholds: its steps are not linear"):
        record(tiny.pipeline(scheduler=scheduler), SETUP, [0])


def test_a_solution_follows_a_finer_run_at_the_same_noise_levels(pipe):
    """With five times the steps in the trailing spacing, every fifth latents are the finer run's own."""
    pipe = tiny.pipeline(scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    setup = Setup(num_steps=5, guidance_scale=1.5, seed=3, conditions=(1, 2))
    fine = record(pipe, Setup(num_steps=25, guidance_scale=1.5, seed=3, conditions=(1, 2)), [0, 1])
    found = solution(pipe, setup, [0, 1], 25)
    assert torch.allclose(found.latents[:-1], fine.latents[:-1:5], atol=1e-5)
    assert torch.equal(found.latents[-1], fine.latents[-1]) and torch.equal(found.pictures, fine.pictures)
    assert torch.allclose(found.gains, record(pipe, setup, [0]).gains)
    with pytest.raises(ValueError, match="the steps of a reference solution must be a whole number, 6 or more; got 5"):
        solution(pipe, setup, [0], 5)
    with pytest.raises(
        ValueError, match=r"DDIMScheduler cannot divide its 1000 timesteps into 300: .* may have 100, 125, "
    ):
        solution(pipe, setup, [0], 300)


def test_how_fine_a_solution_is():
    ddim, unipc = DDIMScheduler(), UniPCMultistepScheduler()
    assert [finest(ddim, steps) for steps in (12, 30, 50, 100, 200)] == [125, 500, 500, 1000, 1000]
    assert finest(unipc, 30) == 300


def test_between_two_levels_a_solution_is_interpolated():
    """UniPC's levels of four and of nine steps are others; what lies between two is not further than they are."""
    pipe = pipeline(UniPCMultistepScheduler)
    setup = Setup(num_steps=4, guidance_scale=1.5, seed=3, conditions=(1, 2))
    fine = record(pipe, Setup(num_steps=9, guidance_scale=1.5, seed=3, conditions=(1, 2)), [0, 1])
    found = solution(pipe, setup, [0, 1], 9)
    pipe.scheduler.set_timesteps(9)
    levels = angles(pipe.scheduler)
    pipe.scheduler.set_timesteps(4)
    for k, angle in enumerate(angles(pipe.scheduler)):
        after = int((levels > angle).sum())
        share = float((levels[after - 1] - angle) / (levels[after - 1] - levels[after])) if after else 0.0
        wanted = fine.latents[0] if not after else (1 - share) * fine.latents[after - 1] + share * fine.latents[after]
        assert torch.allclose(found.latents[k], wanted, atol=1e-4)


def test_angles_fall(pipe):
    pipe.scheduler.set_timesteps(STEPS)
    assert (angles(pipe.scheduler).diff() < 0).all()


# ---- segments -------------------------------------------------------------------------------------------------------
def test_strays_are_what_least_squares_leaves(pipe):
    runs = record(pipe, SETUP, [0, 1, 2])
    inner = products(runs)
    assert inner.shape == (2 * STEPS + 1, 2 * STEPS + 1)
    found = strays(inner, longest=4)
    latents, predictions = runs.latents.flatten(1).double(), runs.predictions.flatten(1).double()
    for n, a, p in ((3, 1, 0), (5, 3, 2), (8, 5, 2), (3, 0, STEPS)):
        known = [latents[a], predictions[a]]
        if p < STEPS:
            known += [predictions[p], predictions[max(2 * p - a, 0)]]
        columns = torch.stack(known, 1)
        rest = latents[n] - columns @ torch.linalg.lstsq(columns, latents[n]).solution
        assert found[n, a, p] == pytest.approx(float(rest.square().sum()) / 3, rel=1e-3, abs=1e-9)
    assert found[2, 1, 0] == 0 and np.isinf(found[6, 1, 0]) and np.isinf(found[1, 1]).all()


def test_products_add_up(pipe):
    whole, *parts = (products(record(pipe, SETUP, samples)) for samples in ([0, 1, 2], [0], [1, 2]))
    assert np.allclose(whole, (parts[0] + 2 * parts[1]) / 3, rtol=1e-4, atol=1e-3)


def test_what_is_carried_is_smooth_and_in_units_of_latents():
    weights, gains = np.array([0.0, 8.0, 8.0, 8.0]), np.array([1.0, 2.0, 2.0, 2.0])
    assert np.allclose(carried(weights, gains, 4), [0.5] * 5)
    assert carried(weights * [1, 1, 100, 1], gains, 4)[3] == pytest.approx(0.5 * 100 ** (1 / 3))


def test_what_is_carried_belongs_to_the_step_after_the_pushed_one():
    found = np.log(carried(np.exp(np.arange(9.0)), np.ones(9), 1))  # logarithms 1 to 8 for steps 2 to 9
    assert np.allclose(found, [2, 2, 2, 2.5, 3, 4, 5, 6, 6.5, 7])


def test_shortest_paths_against_all_plans():
    generator = np.random.default_rng(0)
    steps = 7
    edges = generator.random((steps + 1, steps, steps + 1))
    for objective, join in (("sum", sum), ("max", max)):
        paths = shortest(edges, objective)
        for budget in range(1, steps + 1):
            found = {}
            for rest in itertools.combinations(range(1, steps), budget - 1):
                plan = (0, *rest)
                found[plan] = join(
                    edges[n, a, p] for n, a, p in zip((*rest, steps), plan, (steps, *plan), strict=False)
                )
            assert paths.totals[budget] == pytest.approx(min(found.values()))
            assert join(
                edges[n, a, p]
                for n, a, p in zip(
                    (*paths.steps(budget)[1:], steps), paths.steps(budget), (steps, *paths.steps(budget)), strict=False
                )
            ) == pytest.approx(min(paths.totals[1 : budget + 1]))
    with pytest.raises(ValueError, match=r"edges must be \[T \+ 1, T, T \+ 1\]; got \[7, 7, 8\]"):
        shortest(edges[1:])
    with pytest.raises(ValueError, match="edges must cost 0 or more"):
        shortest(-edges)


# ---- factors --------------------------------------------------------------------------------------------------------
def test_least_squares_finds_the_factors_and_holds_what_it_cannot_tell():
    first, second = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    assert least_squares([first, second], 0.3 * first + 0.9 * second) == pytest.approx([0.3, 0.9], abs=1e-4)
    assert least_squares([first, first], first) == pytest.approx([1.0, 0.0], abs=1e-6)


def entry(*values: float) -> Entry:
    kept = Entry(values=[(torch.tensor([value]),) for value in values], steps=list(range(len(values)))[::-1])
    return kept


def test_linear():
    fill = Linear(((1.0, 0.0, 0.0), (9.0, 9.0, 9.0), (9.0, 9.0, 9.0), (2.0, -0.5, 0.25)))
    at = At(step=3, num_steps=4, site=Site("model", "model", "", 0, 1, 0))
    assert fill.depth == 3
    assert float(fill.fill(entry(4.0, 2.0, 8.0), at)[0]) == 2 * 4 - 0.5 * 2 + 0.25 * 8
    assert float(fill.fill(entry(4.0), at)[0]) == 4.0, "fewer outputs than the row needs: held"
    assert float(Linear(((1.0,), (1.0,), (1.0,), (2.0,))).fill(entry(4.0), at)[0]) == 8.0
    as_taylor = Linear(((0.0, 0.0),) * 3 + ((2.0, -1.0),))
    assert torch.equal(as_taylor.fill(entry(4.0, 2.0), at)[0], Taylor(1).fill(entry(4.0, 2.0), at._replace(step=2))[0])
    assert Recipe.from_dict(Recipe(ReuseSteps((3,)), where="model", fill=fill).to_dict()).fill == fill
    with pytest.raises(ValueError, match="coefficients are for 4 steps, but this run has step 4"):
        fill.fill(entry(1.0), at._replace(step=4))


@pytest.mark.parametrize("where", ["model", "module"])
def test_a_computed_step_is_corrected_as_well(where):
    """What the network returned counts for later steps; what it hands on is its own output times a factor."""
    network = tiny.dit()
    x = tiny.latents(network)
    plain = [tiny.predict(network, x, 900 - 100 * k) for k in range(2)]
    table = ((1.0, 0.0), (0.25, 0.5), (2.0, -1.0))
    recipe = Recipe(ReuseSteps((2,)), where=where, fill=Linear(table))
    with dittocache.enable(network, recipe) as cache, cache.run(3):
        found = []
        for k in range(3):
            cache.step(k)
            found.append(tiny.predict(network, x, 900 - 100 * k))
    assert torch.equal(found[0], plain[0]), "a row 1, 0 hands on the very output"
    if where == "model":
        assert torch.allclose(found[1], 0.25 * plain[1] + 0.5 * plain[0], atol=1e-6)
        assert torch.allclose(found[2], 2 * plain[1] - plain[0], atol=1e-5)
    else:
        assert not torch.allclose(found[1], plain[1], atol=1e-3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((), r"coefficients are a table of numbers \[steps, outputs\]; got \(\)"),
        ((1.0,), "coefficients are a table of numbers"),
        (((1.0,), (1.0, 2.0)), "its rows differ in length"),
        (((float("nan"),),), "every coefficient must be a number that is finite; got nan"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(ValueError, match=message):
        Linear(table)


# ---- the planner ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_fitted_recipe_draws_what_the_fit_drew(scheduler):
    """The recipe alone, on the same samples, gives the error that the planner told; less than with held outputs."""
    pipe = pipeline(scheduler)
    planner = Predictors(pipe, SETUP, range(4), range(4, 8))
    recipe, error = planner.made((0, 2, 4, 6))
    plain = draw(pipe, SETUP, range(4, 8)).double()

    def squared(recipe: Recipe) -> float:
        with dittocache.enable(pipe, recipe) as cache:
            pictures = draw(pipe, SETUP, range(4, 8)).double()
            assert cache.trace.table[:, 0].tolist() == [1, 0] * 4
        return float((pictures - plain).square().flatten(1).mean(1).sqrt().mean() ** 2)

    assert squared(recipe) == pytest.approx(error, rel=1e-2)
    assert error < squared(Recipe(ReuseSteps((1, 3, 5, 7)), where="model"))
    assert torch.equal(draw(pipe, SETUP, range(4, 8)).double(), plain), "nothing is left behind"


def test_half_precision():
    """A step's change may be smaller than what bfloat16 tells apart in the latents."""
    pipe = pipeline()
    pipe.to(torch.bfloat16)
    planner = Predictors(pipe, SETUP, range(4), range(4, 8))
    assert planner.runs.latents.dtype == torch.float32
    recipe, error = planner.made((0, 2, 4, 6))
    with dittocache.enable(pipe, recipe):
        assert draw(pipe, SETUP, [0]).isfinite().all()
    assert error < planner.made((0,))[1]


def test_more_computed_steps_lose_less(planner):
    errors = [search(planner, budget, 1)[1] for budget in (2, 4, 6)]
    assert errors[0] > errors[1] > errors[2]


def test_everything_computed_loses_nothing(planner):
    recipe, error = planner.made(tuple(range(STEPS)))
    assert error < 1e-12 and recipe.when.steps == ()


def test_a_predicted_loss_is_the_sum_over_segments(planner):
    computed = (0, 2, 5)
    assert planner.loss(computed) == pytest.approx(
        planner.edges[2, 0, STEPS] + planner.edges[5, 2, 0] + planner.edges[8, 5, 2]
    )
    best = planner.paths[0].steps(3)
    every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), 2)]
    assert planner.loss(best) == pytest.approx(min(map(planner.loss, every)))
    assert best in planner.candidates(3)


def test_a_hopeless_run_is_given_up(pipe, planner):
    """Its error is far above that of a plan that was seen: the run ends before it is over."""
    good, bad = (0, 1, 2, 3, 4, 5, 6), (0,)
    fresh = Predictors(pipe, SETUP, range(4), range(4, 8))
    _, error = fresh.made(good)
    recipe, lost = fresh.made(bad, error)
    assert recipe is None and lost == np.inf
    assert fresh.made(bad)[1] > 3 * error, "it would have been that bad"


def test_factors_do_not_see_the_trial(pipe, planner):
    other = Predictors(pipe, SETUP, range(4), range(8, 12))
    factors = [np.array(one.made((0, 3, 6))[0].fill.coefficients) for one in (planner, other)]
    assert np.allclose(*factors, atol=1e-3)


def test_limits(pipe):
    fresh = Predictors(pipe, SETUP, range(4), range(4, 8))
    fresh.seen = 0.01, np.full(STEPS, 0.1)
    assert fresh._limits(0.02)[-1] == pytest.approx(GIVE_UP * 2 * 0.1) and np.isinf(fresh._limits(0.02)[0])
    assert np.isinf(fresh._limits(np.inf)).all()
    fresh.made((0,), 1e-9)
    assert fresh.seen[0] == 0.01, "a worse run is not kept"


def test_candidates_are_of_every_power(planner):
    for paths, power in zip(planner.paths, POWERS, strict=False):
        assert paths.totals.tolist() == shortest(planner.edges**power).totals.tolist()


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_that_call_more_often_are_refused(scheduler):
    with pytest.raises(ValueError, match=rf"{scheduler.__name__} asks for \d+ predictions in {STEPS} steps"):
        Predictors(tiny.pipeline(scheduler=scheduler()), SETUP, [0], [1])


def test_the_search_gets_better(planner):
    start = planner.made(planner.candidates(3)[0])[1]
    seen: list[float] = []
    recipe, error = search(planner, 3, 20, tried=lambda count, best: seen.append(best))
    assert error <= start and error == min(seen) and len(seen) <= 20
    assert len(recipe.when.steps) == STEPS - 3
    stopped = []
    search(planner, 3, 20, tried=lambda count, best: stopped.append(count) or count == 2)
    assert stopped == [1, 2]


@pytest.mark.parametrize(
    ("samples", "trial", "more", "message"),
    [
        ([], [1], {}, "samples and trial are one or more numbers each, and differ"),
        ([1], [1], {}, "samples and trial are one or more numbers each, and differ"),
        ([1], [2], {"outputs": 0}, "outputs must be a whole number, 1 or more; got 0"),
        ([1], [2], {"reference": 5}, "the steps of a reference solution must be a whole number, 9 or more; got 5"),
    ],
)
def test_what_cannot_be_planned(pipe, samples, trial, more, message):
    with pytest.raises(ValueError, match=message):
        Predictors(pipe, SETUP, samples, trial, **more)
    assert not tiny.traces_of_cache(pipe.transformer)


def test_no_budget_below_one_step(planner):
    with pytest.raises(ValueError, match="budget must be a whole number, 1 or more; got 0"):
        search(planner, 0)
