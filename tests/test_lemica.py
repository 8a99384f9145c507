"""LeMiCa: the planner against brute force, and its measurements against plain runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from typer.testing import CliRunner

import dittocache
from dittocache import Recipe
from dittocache.calibrate import Setup, Statistics, calibrate, planners
from dittocache.calibrate.lemica import CalibrateLeMiCa
from dittocache.calibrate.setup import draw
from dittocache.cli import app
from dittocache.when import ReuseSteps

INF = float("inf")
SETUP = Setup(num_steps=6, guidance_scale=1.5, seed=50, conditions=(3, 7, 1))


def random_weights(steps: int, gap: int, seed: int, levels: int | None = None) -> np.ndarray:
    generator = np.random.default_rng(seed)
    i, j = np.ogrid[:steps, :steps]
    weights = generator.random((steps, steps)) if levels is None else generator.integers(1, levels + 1, (steps, steps))
    weights = np.where(j == i + 1, 0.0, weights)
    return np.where((j > i) & (j - i <= gap), weights, INF)


def plans_of(steps: int, budget: int):
    return [(0, *rest, steps - 1) for rest in itertools.combinations(range(1, steps - 1), budget - 2)]


def errors_of(weights: np.ndarray, plan: tuple[int, ...]) -> list[float]:
    return sorted((weights[i, j] for i, j in itertools.pairwise(plan)), reverse=True)


# ---- the planner ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [None, 3])  # few different weights: the second largest, third, ... must decide
@pytest.mark.parametrize("seed", range(5))
def test_the_largest_errors_are_the_least(seed: int, levels: int | None) -> None:
    steps, gap = 9, 4
    weights = random_weights(steps, gap, seed, levels)
    for budget in range(2, steps + 1):
        possible = [plan for plan in plans_of(steps, budget) if max(errors_of(weights, plan)) < INF]
        minimax, least = (planners.segment_plan(weights, budget, objective) for objective in ("minimax", "sum"))
        assert bool(possible) == bool(minimax) == bool(least) == ((budget - 1) * gap >= steps - 1)
        if possible:
            assert minimax in possible and least in possible
            best = min(errors_of(weights, plan) for plan in possible)
            assert errors_of(weights, minimax) == best == planners.segment_errors(weights, minimax)
            assert sum(errors_of(weights, least)) == pytest.approx(min(sum(errors_of(weights, p)) for p in possible))


def test_minimax_and_sum_differ() -> None:
    weights = [random_weights(9, 4, seed) for seed in range(20)]
    plans = [tuple(planners.segment_plan(w, 5, objective) for objective in ("minimax", "sum")) for w in weights]
    assert any(one != other for one, other in plans)


# ---- measuring ------------------------------------------------------------------------------------------------------
def plain_weights(pipe, samples: list[int], gap: int) -> np.ndarray:
    """Every segment in a run of its own, from the beginning."""
    steps = SETUP.num_steps
    uncached = draw(pipe, SETUP, samples).double()
    weights = np.zeros((steps, steps))
    for i, j in itertools.combinations(range(steps), 2):
        if 1 < j - i <= gap:
            recipe = Recipe(ReuseSteps(tuple(range(i + 1, j))), where="stack", keeps="change")
            with dittocache.enable(pipe, recipe):
                pictures = draw(pipe, SETUP, samples).double()
            weights[i, j] = (pictures - uncached).abs().flatten(1).mean(1).sum()
    return weights


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler]
)  # plain, with a memory, with noise
def test_runs_that_are_played_back_are_the_runs(scheduler, tmp_path) -> None:
    pipe = tiny.pipeline(scheduler=scheduler())
    calibrate(pipe, "lemica", 2, SETUP, out=tmp_path, batch=2, budget=4, max_gap=3)
    sums = Statistics.load(tmp_path).sums
    assert np.array_equal(sums["weights"].numpy(), plain_weights(pipe, [0, 1], 3))
    i, j = np.ogrid[:6, :6]
    assert np.array_equal(sums["counts"].numpy(), 2 * ((i < j) & (j - i <= 3)))


def test_what_was_before_a_segment_is_not_computed_again() -> None:
    pipe, calls = tiny.pipeline(), []
    block = pipe.transformer.transformer_blocks[0].attn1
    handle = block.register_forward_hook(lambda *args: calls.append(1))
    calibrate(pipe, "lemica", 1, SETUP, budget=4, max_gap=2)
    handle.remove()
    # the full run; segment i -> i + 2: step 0, step i and all from i + 2
    assert len(calls) == 6 + sum((i > 0) + 1 + 6 - (i + 2) for i in range(4))


def test_calibration_plans_with_the_mean_over_samples(tmp_path) -> None:
    pipe = tiny.pipeline()
    made = calibrate(pipe, "lemica", 3, SETUP, out=tmp_path, batch=2, budget=4, max_gap=3)
    weights = plain_weights(pipe, [0, 1, 2], 3) / 3
    weights[Statistics.load(tmp_path).sums["counts"].numpy() == 0] = INF
    best = min((errors_of(weights, plan), plan) for plan in plans_of(6, 4))
    assert made.params["full_steps"] == best[1] and made.params["num_steps"] == 6
    assert made.where == "stack" and made.keeps == "change"
    assert (
        calibrate(pipe, "lemica", 3, SETUP, out=tmp_path, budget=5, max_gap=3).params["full_steps"]
        == min((errors_of(weights, plan), plan) for plan in plans_of(6, 5))[1]
    )
    with dittocache.enable(pipe, made) as cache:
        tiny.draw(pipe, 6)
        assert tuple(np.flatnonzero(cache.trace.table[:, 0])) == made.params["full_steps"]


def test_samples_with_longer_segments_are_averaged_apart(tmp_path) -> None:
    """Without a limit the budget decides how long segments get: 2 steps for 4 of 6, 3 for 3 of 6."""
    pipe = tiny.pipeline()
    calibrate(pipe, "lemica", 1, SETUP, out=tmp_path, budget=4)
    made = calibrate(pipe, "lemica", 2, SETUP, out=tmp_path, budget=3)
    both, second = plain_weights(pipe, [0, 1], 2) / 2, plain_weights(pipe, [1], 3)
    i, j = np.ogrid[:6, :6]
    weights = np.where((j > i) & (j - i <= 3), np.where(j - i <= 2, both, second), INF)
    assert made.params["full_steps"] == min((errors_of(weights, plan), plan) for plan in plans_of(6, 3))[1]
    counts = Statistics.load(tmp_path).sums["counts"]
    assert counts[1, 3] == 2 and counts[1, 4] == 1 and counts[1, 5] == 0


def test_every_segment_is_averaged_over_its_own_samples() -> None:
    """0 -> 2 and 3 -> 5 were measured twice, the longer 2 -> 5 and 0 -> 3 once: means 1.5, 0.5, 1 and 2."""
    weights, counts = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for i, j, total, count in ((0, 2, 3, 2), (2, 5, 1, 1), (0, 3, 2, 1), (3, 5, 1, 2)):
        weights[i, j], counts[i, j] = total, count
    statistics = Statistics("lemica", {}, (0, 1), {"weights": weights, "counts": counts})
    assert CalibrateLeMiCa(budget=3).fit(statistics, None, SETUP).params["full_steps"] == (0, 2, 5)


def test_calibration_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny.pipeline()
    before, classes = draw(pipe, SETUP, [0]), {type(module) for module in pipe.transformer.modules()}
    calibrate(pipe, "lemica", 1, SETUP, budget=4)
    assert torch.equal(draw(pipe, SETUP, [0]), before)
    assert {type(module) for module in pipe.transformer.modules()} == classes


def test_command(tmp_path) -> None:
    command = "calibrate lemica --samples 1 --steps 5 -p budget=4 --out"
    result = CliRunner().invoke(app, [*command.split(), str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert Recipe.from_pretrained(tmp_path / "made").describe().startswith("lemica(full_steps=(0, ")


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"budget": 7}, "budget.*from 2 to 6; got 7"),
        (
            {"budget": 3, "max_gap": 2},
            "no plan computes 3 of 6 steps, at most 2.*budget must be 4 or more, or max_gap 3",
        ),
        ({"budget": 1}, "budget.*2 or more; got 1"),
        ({"max_gap": 0}, "max_gap.*1 or more; got 0"),
    ],
)
def test_calibrations_that_cannot_work_draw_nothing(params, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(tiny.pipeline(), "lemica", 1, SETUP, out=tmp_path / "made", **params)
    assert not (tmp_path / "made").exists()


def test_a_list_is_needed() -> None:
    with pytest.raises(ValueError, match="lemica needs full_steps: run `dittocache calibrate lemica`"):
        dittocache.recipe("lemica")
