"""DPCache: costs, planners and calibration, against plain loops and brute force."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from typer.testing import CliRunner

import dittocache
from dittocache import Recipe
from dittocache.calibrate import Setup, Statistics, calibrate, planners
from dittocache.calibrate.base import Seen
from dittocache.calibrate.dpcache import CalibrateDPCache
from dittocache.cli import app
from dittocache.fill import At, Entry
from dittocache.plan import Site

INF = float("inf")
SETUP = Setup(num_steps=8, guidance_scale=1.5, seed=50, conditions=(3, 7, 1))
SITE = Site("blocks", "stack", "blocks", 0, 1, 0)


def features_of(steps: int, seed: int = 0) -> torch.Tensor:
    """Smooth features with a little noise: [steps, 2, 3, 4]."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, steps)[:, None, None, None]
    waves = torch.rand(2, 3, 4, generator=generator) * 6
    return torch.sin(waves * time) + 0.02 * torch.randn(steps, 2, 3, 4, generator=generator)


def ladder(features: torch.Tensor, steps: list[int], order: int) -> list[torch.Tensor]:
    """Repeated differences, step by step, as the authors keep them."""
    kept: list[torch.Tensor] = []
    for n, step in enumerate(steps):
        new = [features[step]]
        for before in kept[:order]:
            new.append((new[-1] - before) / (step - steps[n - 1]))
        kept = new
    return kept


def forecast(features: torch.Tensor, steps: list[int], order: int, at: int) -> torch.Tensor:
    factors = [1.0, 1.0, 0.5, 1 / 6]
    return sum(factors[o] * (at - steps[-1]) ** o * d for o, d in enumerate(ladder(features, steps, order)))  # type: ignore[return-value]


def plain_costs(features: torch.Tensor, order: int, gap: int) -> np.ndarray:
    """Section 2 of the authors' rule, entry by entry."""
    steps = len(features)
    last = list(range(steps - order - 1, steps))
    end = 0.8 * forecast(features, last, order, steps) + 0.2 * features[last].mean(0)
    targets = [*features, end]
    costs = np.full((steps, steps + 1, steps + 1), INF)
    for c in range(order):
        costs[: c + 1, c, c + 1] = 0
    for c in range(order, steps):
        for p in range(max(0, c - gap), c):
            if p < order - 1:
                continue
            history = [*range(p - order + 1, p + 1), c]
            total = 0.0
            for n in range(c + 1, steps + 1):
                total += 0.5 * float((forecast(features, history, order, n) - targets[n]).abs().mean())
                costs[p, c, n] = total
    return costs


def plans_of(steps: int, budget: int):
    return ((0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1))


def cost_of(costs: np.ndarray, plan: tuple[int, ...]) -> float:
    path = [0, *plan, len(costs)]
    return sum(costs[a, b, c] for a, b, c in zip(path, path[1:], path[2:], strict=False))


# ---- costs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("order", "gap"), [(1, 3), (2, 4), (3, 2)])
def test_costs_are_the_authors(order: int, gap: int) -> None:
    features = features_of(11).double()
    found = planners.segment_costs(features, order, gap).numpy()
    wanted = plain_costs(features, order, gap)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    np.testing.assert_array_equal(planners.measured(11, order, gap).numpy(), np.isfinite(wanted))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def real_cost(features: torch.Tensor, plan: tuple[int, ...], order: int, first_full: int, end: torch.Tensor) -> float:
    """What the recipe's own fill does with a plan, charged as the costs are; the first `order` steps are free."""
    fill = dittocache.recipe(
        "dpcache", full_steps=plan, num_steps=len(features), order=order, first_full=first_full
    ).fill
    entry, total = Entry(), 0.0
    for k, target in enumerate([*features, end]):
        at = At(k, len(features), SITE)
        if k > order:
            total += 0.5 * float((fill.fill(entry, at)[0] - target).abs().mean())
        if k in plan:
            fill.keep(entry, (target,), at)
    return total


@pytest.mark.parametrize(("order", "first_full"), [(1, 3), (2, 3), (2, 4)])
def test_the_history_of_a_path_is_what_its_runs_forecast_from(order: int, first_full: int) -> None:
    features, steps, gap = features_of(9, seed=1), 9, 4
    guard = first_full - 2
    costs = planners.segment_costs(features, order, gap, "path", guard)
    np.testing.assert_array_equal(costs.isfinite(), planners.measured(steps, order, gap, "path"))
    forced = planners.forced_steps(steps, first_full, 0)
    allowed = planners.allowed(costs, forced, gap)
    end = planners.end_target(features, order)
    for budget in (5, 6):
        totals = {
            plan: real_cost(features, plan, order, first_full, end)
            for plan in plans_of(steps, budget)
            if set(range(first_full)) <= set(plan) and max(np.diff([*plan, steps])) <= gap
        }
        plan = planners.exact_plan(allowed, budget)
        assert plan == min(totals, key=totals.__getitem__)
        for one, total in totals.items():
            assert planners.path_cost(allowed, one) == pytest.approx(total, rel=1e-4)


# ---- planners -------------------------------------------------------------------------------------------------------
def random_costs(steps: int, order: int, gap: int, seed: int) -> np.ndarray:
    where = planners.measured(steps, order, gap).numpy()
    costs = np.random.default_rng(seed).random(where.shape)
    costs[planners.blank(steps, order).numpy() == 0] = 0
    return np.where(where, costs, INF)


def plain_recurrence(costs: np.ndarray, budget: int, first: int, last: int, gap: int) -> list[int]:
    """Section 3 of the authors' rule, loop by loop."""
    steps = len(costs)
    forced = {0, steps} | set(range(first)) | set(range(steps - last, steps))
    budget = min(budget, steps)
    best = {(0, 0): 0.0}
    path: dict[tuple[int, int], int] = {}
    for m in range(1, budget + 1):
        for n in range(m, steps + 1):
            for c in range(max(m - 1, n - gap), n):
                if any(c < f < n for f in forced):
                    continue
                before = 0 if c == 0 else c - 1 if {c - 1, c} <= forced else path.get((m - 1, c), 0)
                total = best.get((m - 1, c), INF) + costs[before, c, n]
                if total < best.get((m, n), INF):
                    best[m, n], path[m, n] = total, c
    n = steps
    if best.get((budget, steps), INF) == INF:
        n = min(range(steps + 1), key=lambda n: (best.get((budget, n), INF), n))
    plan = []
    for m in range(budget, 0, -1):
        n = path.get((m, n), 0)
        plan.append(n)
    return plan[::-1]


@pytest.mark.parametrize("seed", range(6))
def test_planners(seed: int) -> None:
    steps, gap, worse = 9, 4, 0
    for order, first, last in ((1, 1, 0), (2, 3, 0), (2, 4, 1), (2, 0, 2)):
        costs = random_costs(steps, order, gap, seed)
        forced = planners.forced_steps(steps, first, last)
        allowed = planners.allowed(costs, forced, gap)
        for budget in range(2, steps + 2):
            authors = planners.authors_plan(allowed, budget)
            assert list(authors) == plain_recurrence(costs, budget, first, last, gap)
            possible = [p for p in plans_of(steps, budget) if cost_of(allowed, p) < INF]
            exact = planners.exact_plan(allowed, budget)
            if not possible:
                assert exact == ()
                assert budget > steps or planners.path_cost(allowed, authors) == INF
                continue
            least = min(cost_of(allowed, plan) for plan in possible)
            assert cost_of(allowed, exact) == pytest.approx(least) == planners.path_cost(allowed, exact)
            worse += planners.path_cost(allowed, authors) > least + 1e-9
    assert worse, "costs depend on the predecessor: the authors' recurrence must miss some optima"


def test_of_equal_paths_the_authors_take_the_smallest_steps() -> None:
    costs = np.where(planners.measured(8, 1, 3), 0.0, INF)
    forced = planners.forced_steps(8, 0, 0)
    assert list(planners.authors_plan(planners.allowed(costs, forced, 3), 4)) == plain_recurrence(costs, 4, 0, 0, 3)


# ---- calibration ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def recorded(pipe, sample: int) -> torch.Tensor:
    """[T, tokens, channels]: what leaves the last block, of the conditional row, told by a hook of torch's own."""
    seen = []
    block = pipe.transformer.transformer_blocks[-1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    pipe(
        class_labels=[SETUP.condition(pipe, sample)],
        num_inference_steps=SETUP.num_steps,
        guidance_scale=SETUP.guidance_scale,
        generator=[SETUP.generator(sample)],
        output_type="pt",
    )
    handle.remove()
    return torch.stack(seen)


def test_calibration_averages_the_costs_of_uncached_runs(pipe, tmp_path) -> None:
    made = calibrate(pipe, "dpcache", 3, SETUP, out=tmp_path, batch=2, budget=5, max_gap=3)
    costs = np.mean([plain_costs(recorded(pipe, j), 2, 3) for j in range(3)], axis=0)
    sums = Statistics.load(tmp_path).sums["costs"].numpy()
    np.testing.assert_allclose(sums / 3, costs[np.isfinite(costs)], rtol=1e-4)
    assert list(made.params["full_steps"]) == plain_recurrence(costs, 5, 3, 0, 3)
    assert made.params["num_steps"] == 8 and made.fill.start == 1 and made.where == "stack" and made.keeps == "output"
    alone = calibrate(pipe, "dpcache", 3, SETUP, batch=1, budget=5, max_gap=3)
    assert alone == made
    again = calibrate(pipe, "dpcache", 3, SETUP, out=tmp_path, budget=6, max_gap=3, planner="exact")  # nothing is drawn
    allowed = planners.allowed(costs, planners.forced_steps(8, 3, 0), 3)
    assert again.params["full_steps"] == planners.exact_plan(allowed, 6)


def test_a_calibrated_plan_is_what_runs(pipe, tmp_path) -> None:
    calibrate(
        pipe, "dpcache", 2, SETUP, out=tmp_path, budget=5, planner="exact", history="path", max_gap=3, last_full=1
    )
    made = Recipe.from_pretrained(tmp_path)
    assert {0, 1, 2, 7} < set(made.params["full_steps"]) and len(made.params["full_steps"]) == 5
    with dittocache.enable(pipe, made) as cache:
        tiny.draw(pipe, 8)
        assert tuple(np.flatnonzero(cache.trace.table[:, 0])) == made.params["full_steps"]
        assert cache.trace.sites == ("transformer_blocks",)
        with pytest.raises(ValueError, match="made for"):
            tiny.draw(pipe, 9)


def test_only_the_last_stack_is_recorded() -> None:
    """FLUX: the single stream, in which text and image are one."""

    class Pipe:
        transformer = tiny.flux()
        scheduler = DDIMScheduler()

    pipe, sums = Pipe(), {}
    setup = Setup(num_steps=5)
    see = CalibrateDPCache(budget=4, max_gap=2).watch(pipe, setup, sums)
    stacks = [span.site for span in dittocache.describe(pipe.transformer).stacks if span.main]
    assert len(stacks) == 2
    features = features_of(5).transpose(0, 1)
    for k in range(5):
        see(At(k, 5, stacks[0]), Seen(torch.full((2, 9, 4), float("nan")), None), None)
        see(At(k, 5, stacks[1]), Seen(features[:, k], None), None)
    wanted = plain_costs(features.transpose(0, 1), 2, 2)
    np.testing.assert_allclose(sums["costs"] / 2, wanted[np.isfinite(wanted)], rtol=1e-4)


def test_command(tmp_path) -> None:
    command = "calibrate dpcache --samples 2 --steps 8 -p budget=5 -p planner=exact --out"
    result = CliRunner().invoke(app, [*command.split(), str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert Recipe.from_pretrained(tmp_path / "made").describe().startswith("dpcache(full_steps=(0, 1, 2,")


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "dpcache needs full_steps: run `dittocache calibrate dpcache`"),
        ({"full_steps": ()}, r"step 0.*got \(\)"),
        ({"full_steps": (1, 2)}, r"step 0.*num_steps=50; got \(1, 2\)"),
        ({"full_steps": (0, 8), "num_steps": 8}, r"below num_steps=8; got \(0, 8\)"),
        ({"full_steps": (0, "x")}, "full_steps.*'x'"),
        ({"full_steps": (0, 1), "order": 0}, "order.*0"),
    ],
)
def test_lists_that_are_none(params, message) -> None:
    with pytest.raises(ValueError, match=message):
        dittocache.recipe("dpcache", **params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"budget": 9}, "budget.*from 1 to 8; got 9"),
        ({"budget": 4, "max_gap": 2}, "no plan computes 4 of 8 steps.*at most 2.*budget must be 5 or more"),
        ({"budget": 5, "order": 8}, "order.*from 1 to 7; got 8"),
        ({"budget": 5, "history": "path"}, "history='path' goes with planner='exact'"),
        ({"budget": 5, "planner": "best"}, "planner.*authors, exact.*'best'"),
    ],
)
def test_calibrations_that_cannot_work_draw_nothing(pipe, params, message, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            calibrate(pipe, "dpcache", 2, SETUP, out=tmp_path / "made", **params)
    assert not (tmp_path / "made").exists()
