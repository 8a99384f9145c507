"""Factors of a plan moved together: Gauss-Newton on the last latents; and the network's input as a part of them."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

import dittocache
from dittocache import Recipe, clock
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.fill import At, Entry, Linear
from dittocache.plan import Site
from dittocache.tune import Predictors, predictor, refine
from dittocache.tune.refine import Equations, Replay, cost, equations, orthonormal, predicted
from dittocache.tune.trajectory import fed_latents, record, scaled, stepped
from dittocache.when import ReuseSteps

STEPS = 8
COMPUTED = (0, 2, 5)
SETUP = Setup(num_steps=STEPS, guidance_scale=1.5, seed=3, conditions=(1, 2, 5))
SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler)


def pipeline(scheduler: type = DDIMScheduler):
    return tiny.pipeline(scheduler=scheduler(clip_sample=False) if scheduler is DDIMScheduler else scheduler())


class Calls:
    """Counts forwards of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self._counted)

    def _counted(self, *_: object) -> None:
        self.count += 1


# ---- the network's input --------------------------------------------------------------------------------------------
def test_the_input_is_a_part_of_a_prediction():
    network = tiny.dit()
    x = [tiny.latents(network) * (1 + k) for k in range(3)]
    plain = [tiny.predict(network, x[k], 900 - 100 * k) for k in range(2)]
    fill = Linear(((1.0, 0.0), (0.25, 0.5), (2.0, -1.0)), inputs=(0.0, 0.5, -0.25))
    with dittocache.enable(network, Recipe(ReuseSteps((2,)), where="model", fill=fill)) as cache, cache.run(3):
        found = []
        for k in range(3):
            cache.step(k)
            found.append(tiny.predict(network, x[k], 900 - 100 * k))
    assert torch.equal(found[0], plain[0]), "a factor of 0 leaves the very output"
    # predicted variances have no input of theirs
    grown = [torch.nn.functional.pad(one, (0, 0, 0, 0, 0, found[0].shape[1] - one.shape[1])) for one in x]
    assert torch.allclose(found[1], 0.25 * plain[1] + 0.5 * plain[0] + 0.5 * grown[1], atol=1e-6)
    assert torch.allclose(found[2], 2 * plain[1] - plain[0] - 0.25 * grown[2], atol=1e-5)


def test_a_step_that_cannot_be_filled_is_what_the_network_returns():
    """Another batch than what is kept belongs to: computed, and no factor of the filled step comes to it."""
    network = tiny.dit()
    fill = Linear(((1.0,), (3.0,)), inputs=(0.0, 0.5))
    x = tiny.latents(network)
    two = torch.cat([x, x])
    plain = tiny.predict(network, two, 800)
    with dittocache.enable(network, Recipe(ReuseSteps((1,)), where="model", fill=fill)) as cache, cache.run(2):
        cache.step(0)
        tiny.predict(network, x, 900)
        cache.step(1)
        assert torch.equal(tiny.predict(network, two, 800), plain)


def test_inputs_are_saved_and_checked():
    fill = Linear(((1.0,), (0.5,)), inputs=(0.0, 0.25))
    recipe = Recipe(ReuseSteps((1,)), where="model", fill=fill)
    assert Recipe.from_dict(recipe.to_dict()).fill == fill and fill.keeps_inputs and not Linear().keeps_inputs
    with pytest.raises(ValueError, match="inputs are 2 numbers, one a step like coefficients; got 1"):
        Linear(((1.0,), (0.5,)), inputs=(0.5,))
    with pytest.raises(ValueError, match="inputs are a list of numbers"):
        Linear(inputs=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every coefficient must be a number that is finite; got nan"):
        Linear(inputs=(float("nan"),))


@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 3, 9), torch.zeros(2, 5)])
def test_an_input_of_another_shape_is_refused(inputs):
    entry = Entry(values=[(torch.ones(2, 4, 8),)], steps=[0])
    at = At(step=1, num_steps=2, site=Site("output", "model", "", 0, 1, 0), inputs=inputs)
    fill = Linear(((1.0,), (1.0,)), inputs=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"output has an input of the shape .* leave out `inputs`"):
        fill.fill(entry, at)
    fewer = fill.fill(entry, at._replace(inputs=torch.ones(2, 3, 8)))[0]  # the first ones are changed
    assert (fewer[:, :3] == 1.5).all() and (fewer[:, 3:] == 1).all()
    more = fill.fill(entry, at._replace(inputs=torch.ones(2, 6, 8)))[0]
    assert (more == 1.5).all() and (entry.values[0][0] == 1).all(), "what is kept stays as it is"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_the_network_is_fed_with(scheduler):
    pipe = pipeline(scheduler)
    assert fed_latents(pipe, SETUP, 0)
    pipe.scheduler.set_timesteps(STEPS)
    sample, timestep = torch.randn(1, 1, 8, 8), pipe.scheduler.timesteps[2]
    expected = scheduler.from_config(pipe.scheduler.config)
    expected.set_timesteps(STEPS)
    assert torch.equal(scaled(pipe.scheduler, sample, timestep), expected.scale_model_input(sample, timestep))


def test_a_network_that_is_fed_with_something_else():
    """Where the network does not see the latents themselves, predictors are made of its outputs alone."""
    pipe = pipeline()

    def moved(module, args, kwargs):
        return (args[0] + 1, *args[1:]), kwargs

    pipe.transformer.register_forward_pre_hook(moved, with_kwargs=True)
    planner = Predictors(pipe, SETUP, range(4), range(4, 8))
    assert not planner.inputs
    recipe, error = planner.made(COMPUTED)
    refined, better = planner.refined(recipe)
    assert recipe.fill.inputs == refined.fill.inputs == () and better <= error * (1 + 1e-4)


@pytest.mark.parametrize("share", [1.0, -1.0, 0.5])
def test_what_is_added_must_come_out_as_it_is(share):
    """Some pipelines turn the sign of what the network returns (Lumina2), or scale it: there the input is not used."""
    pipe = pipeline()
    scheduler = pipe.scheduler
    scheduler.step = lambda prediction, *args: type(scheduler).step(scheduler, share * prediction, *args)
    assert fed_latents(pipe, SETUP, 0) == (share == 1.0)


def test_latents_in_half_precision():
    """A network in bfloat16 is fed with what the latents are, rounded: values above 4 by more than a hundredth."""
    pipe = pipeline()
    pipe.transformer.to(torch.bfloat16)
    assert fed_latents(pipe, SETUP, 0)


# ---- factors --------------------------------------------------------------------------------------------------------
def test_tables_and_fills():
    table = torch.tensor([[1.0, 0.0, 0.5], [2.0, -1.0, 0.0]], dtype=torch.float64)
    assert Linear.of(table) == Linear(((1.0, 0.0), (2.0, -1.0)), (0.5, 0.0))
    assert torch.equal(Linear.of(table).table, table)
    table[:, -1] = 0
    assert Linear.of(table).inputs == () and torch.equal(Linear.of(table).table, table)
    outputs, latents = [torch.tensor([4.0]), torch.tensor([2.0])], torch.tensor([8.0])
    assert float(predicted(torch.tensor([2.0, -1.0, 0.5]), outputs, latents)) == 2 * 4 - 2 + 0.5 * 8
    assert float(predicted(torch.tensor([2.0, -1.0, 0.5]), outputs[:1], latents)) == 2 * 4 + 0.5 * 8


def test_orthonormal():
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(2, 5, generator=generator) for _ in range(3)]
    combined = orthonormal(bases)
    made = torch.tensordot(combined, torch.stack(bases).double(), dims=1).flatten(1)
    assert torch.allclose(made @ made.T / 10, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert (combined[0, 1:] == 0).all()


# ---- equations ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=SCHEDULERS, ids=lambda s: s.__name__)
def planner(request) -> Predictors:
    return Predictors(pipeline(request.param), SETUP, range(4), range(4, 8))


def last_latents(pipe, table: torch.Tensor) -> torch.Tensor:
    """Of the recipe itself, no replay."""
    filled = tuple(k for k in range(STEPS) if k not in COMPUTED)
    with dittocache.enable(pipe, Recipe(ReuseSteps(filled), where="model", fill=Linear.of(table))):
        seen = Ends()
        with clock.observed(pipe.scheduler, seen):
            draw(pipe, SETUP, range(4))
    return seen.last.double()


class Ends(clock.Silent):
    """Keeps the latents of the last step."""

    def on_prediction(self, scheduler, prediction, timestep, sample):
        self.last = stepped(scheduler, prediction, timestep, sample)
        return prediction


def test_a_replay_draws_what_the_recipe_draws(planner):
    table = planner.made(COMPUTED)[0].fill.table
    replay = Replay(frozenset(COMPUTED), table, inputs=True)
    replay.run(planner.pipe, SETUP, range(4))
    assert torch.allclose(replay.latents[-1].double(), last_latents(planner.pipe, table), atol=1e-4)
    assert len(replay.latents) == STEPS + 1 and list(replay.outputs) == list(COMPUTED)


def test_latents_are_not_scaled_where_the_input_is_not_used(planner, monkeypatch):
    def refused(*args):
        raise AssertionError("scaled")

    monkeypatch.setattr(planner, "inputs", False)
    for module in (predictor, refine):
        monkeypatch.setattr(module, "scaled", refused)
    recipe, error = planner.made(COMPUTED)
    assert not recipe.fill.inputs and planner.refined(recipe)[1] <= error * (1 + 1e-6)


def test_equations_are_what_moved_factors_do(planner, monkeypatch):
    """Every unknown, moved a little in the recipe itself, changes the last latents as the equations say."""
    monkeypatch.setattr(refine, "PUSH", 1e-3)  # so that both are derivatives
    table = planner.made(COMPUTED)[0].fill.table
    found = equations(planner.pipe, SETUP, range(4), planner.runs, COMPUTED, table, planner.inputs)
    assert len(found.directions) == (1 + 2 + 3) + 3 * planner.inputs
    plain = last_latents(planner.pipe, table)
    missed = (planner.runs.latents[-1][:4] - plain).flatten(1)
    weights = missed.square().mean(1, keepdim=True) ** -0.25
    size = 1e-3
    rows = torch.stack(
        [
            (((last_latents(planner.pipe, table + size * one) - plain) / size).flatten(1) * weights).flatten()
            for one in found.directions
        ]
    )
    scale = float(found.matrix.diagonal().mean())
    assert torch.allclose(found.matrix, rows @ rows.T, atol=0.05 * scale)
    assert torch.allclose(
        found.gained, rows @ (missed * weights).flatten(), atol=0.05 * float(found.gained.abs().max())
    )
    for n, one in enumerate(found.directions):
        moved = one.abs().sum(1).nonzero().flatten().tolist()
        segment = max(k for k in COMPUTED if k <= moved[0])
        end = next((k for k in COMPUTED if k > segment), STEPS)
        assert moved == list(range(segment, end)), f"direction {n} is one segment's"


def test_known_outputs_are_not_computed_again():
    pipe = pipeline()
    planner = Predictors(pipe, SETUP, range(4), range(4, 8))
    table = planner.made(COMPUTED)[0].fill.table
    calls, told = Calls(pipe.transformer.transformer_blocks[0]), []
    equations(
        pipe, SETUP, range(4), planner.runs, COMPUTED, table, True, lambda done, total: told.append((done, total))
    )
    directions = (1 + 2 + 3) + 3
    later = cost(len(COMPUTED), planner.outputs, True)
    assert later == 2 * 2 + 1 * 3 + 0 + directions, "every replay computes step 0, as it has nothing to hold yet"
    assert calls.count == len(COMPUTED) + later
    assert told == [(0, later), (2 * 3, later), (2 * 3 + 3 * 2, later)]


def test_solving_a_linear_problem():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    wanted = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    directions = [torch.zeros(2, 3, dtype=torch.float64) for _ in range(3)]
    for n, one in enumerate(directions):
        one[n % 2, n] = 1.0
    table = torch.zeros(2, 3, dtype=torch.float64)
    found = Equations(table, directions, rows @ rows.T, rows @ (wanted @ rows))
    solved = found.solved(0.0)
    assert [float(solved[n % 2, n]) for n in range(3)] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert float(found.solved(1e9).abs().max()) < 1e-6, "much damping, no change"


def test_refined_factors_come_closer(planner):
    recipe, error = planner.made(COMPUTED)
    refined, better = planner.refined(recipe)
    assert better <= error * (1 + 1e-4) and refined.when == recipe.when
    if better < error:
        plain = planner.runs.pictures[4:].double()
        with dittocache.enable(planner.pipe, refined):
            missed = (draw(planner.pipe, SETUP, range(4, 8)).double() - plain).square().flatten(1).mean(1)
        assert float(missed.sqrt().mean() ** 2) == pytest.approx(better, rel=1e-2)


def test_refining_mends_bad_factors():
    """From factors that only hold, the way back is found, even where fitting step after step is not asked."""
    pipe = pipeline()
    planner = Predictors(pipe, SETUP, range(4), range(4, 8))
    holding = torch.zeros(STEPS, planner.outputs + 1, dtype=torch.float64)
    holding[:, 0] = 1
    recipe = Recipe(
        ReuseSteps(tuple(k for k in range(STEPS) if k not in COMPUTED)), where="model", fill=Linear.of(holding)
    )
    with dittocache.enable(pipe, recipe):
        held = planner._error(torch.as_tensor(draw(pipe, SETUP, range(4, 8))))
    assert planner.refined(recipe)[1] < 0.7 * held
    assert record(pipe, SETUP, [0]).pictures.equal(planner.runs.pictures[:1]), "nothing is left behind"
