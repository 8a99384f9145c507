"""Errors of whole steps, and plans made of them, on tiny pipelines."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import dittocache
from dittocache import Recipe
from dittocache.calibrate import Setup, calibrate
from dittocache.calibrate.trial import Trial
from dittocache.clock import observed
from dittocache.fill import At, Chosen, Entry, Fill, GradientQueue, Hold, Linear, Taylor, Trend
from dittocache.plan import Site
from dittocache.tune import Forecasts, StepErrors, candidates, cheapest, loss, measure, planned, search, solve
from dittocache.tune.errors import FORECASTS, Filling, _Observer, _replay, _table, draw, fillings_of, guided, mixing
from dittocache.when import ReuseSteps

STEPS = 6
SETUP = Setup(num_steps=STEPS, guidance_scale=1.5, seed=3, conditions=(1, 2))


@pytest.fixture(scope="module")
def pipe():
    made = tiny.pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def errors(pipe) -> StepErrors:
    return measure(pipe, SETUP, [0, 1, 2], batch=2, lags=3, gaps=(1, 2))


def filling(recipe: Recipe, k: int) -> Fill:
    """What step k is filled with."""
    return recipe.fill.fills[recipe.fill.chosen[k]]


def prediction_error(pipe, recipe: Recipe, k: int) -> float:
    """Mean over three samples of the squared error of the prediction at step k, with a recipe on."""

    def predictions() -> torch.Tensor:
        with observed(pipe.scheduler, _Observer()) as seen:
            draw(pipe, SETUP, [0, 1, 2])
        return seen.steps[k].prediction.double()

    plain = predictions()
    with dittocache.enable(pipe, recipe):
        return float((predictions() - plain).square().sum() / 3)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_order_with_the_least_error_is_chosen(pipe, errors, k):
    """Of runs that fill this step alone; order 2 needs three computed steps."""
    recipes = [Recipe(ReuseSteps((k,)), fill=Taylor(order)) for order in range(min(k, 3))]
    found = [prediction_error(pipe, recipe, k) for recipe in recipes]
    first, second, *_ = sorted(found)
    assert first < 0.999 * second
    assert errors.costs[k, k - 1, k - 2] == pytest.approx(errors.weights[k] * first, rel=1e-4)
    assert errors.chosen[k, k - 1, k - 2] == found.index(first)


REPLAYED = [  # with the factors of the outputs before step k, newest first
    (Filling(5, 3, None, 0), [0, 1]),
    (Filling(3, 2, 1, 1), [2, -1]),
    (Filling(5, 4, 2, 1), [1.5, 0, -0.5]),
    (Filling(3, 2, 1, 2), [2.5, -2, 0.5]),
    (Filling(4, 2, 1, 2), [0, 5, -6, 2]),
    (Filling(5, 4, 2, 2), [1.625, 0, -0.75, 0, 0.125]),
    (Filling(5, 4, 1, 2), [25 / 18, 0, 0, -10 / 18, 3 / 18]),  # 2 p - a is -2: the first
]


@pytest.mark.parametrize(("filling", "factors"), REPLAYED)
def test_an_error_is_that_of_a_run_that_fills_this_step(pipe, filling, factors):
    """Up to step k such a run is the uncached one. Series worked out by hand, D2 = (D1 - D1 of before) / h."""
    k, padding = filling.k, [0.0] * (5 - len(factors))
    table = [(1.0, 0.0, 0.0, 0.0, 0.0)] * k + [(*map(float, factors), *padding)] + [(1.0, 0.0, 0.0, 0.0, 0.0)] * 5
    found = prediction_error(pipe, Recipe(ReuseSteps((k,)), fill=Linear(tuple(table))), k)
    (measured,) = _replay(pipe, SETUP, [0, 1, 2], [filling])
    assert measured / 3 == pytest.approx(found, rel=1e-4)


def test_a_plan_does_what_was_measured(pipe, errors):
    """Its last step is filled from steps 4, 2 and 0, with the order that was chosen."""
    (measured,) = _replay(pipe, SETUP, [0, 1, 2], [Filling(5, 4, 2, 2)])
    chosen = np.where(np.arange(STEPS)[:, None, None] == 5, 2, errors.chosen)
    recipe = planned(replace(errors, chosen=chosen), (0, 2, 4))
    assert filling(recipe, 5) == Taylor(2) and Taylor(2).factors([4, 2, 0], 5) == [1.625, -0.75, 0.125]
    alone = replace(recipe, when=ReuseSteps((5,)))
    assert Taylor(2).factors([4, 3, 2], 5) == [2.5, -2, 0.5], "what a run has computed counts"
    (near,) = _replay(pipe, SETUP, [0, 1, 2], [Filling(5, 4, 3, 2)])
    assert near != pytest.approx(measured, rel=1e-2)
    assert prediction_error(pipe, alone, 5) == pytest.approx(near / 3, rel=1e-4)


def test_a_forecast_of_order_2_has_three_outputs():
    found = fillings_of(8, 3, (1, 2))
    assert all(len(set(one.history(one.fill + 1))) == one.fill + 1 for one in found)
    assert {(one.a, one.p) for one in found if one.fill == 2} == {(one.a, one.p) for one in found if one.p}
    assert Filling(7, 6, 4, 2).history(3) == [6, 4, 2] and Filling(7, 6, 1, 2).history(3) == [6, 1, 0]
    assert Filling(7, 6, 4, 3).history(4) == [6, 4, 2, 0] and Filling(7, 6, 2, 3).history(4) == [6, 2, 1, 0]


def test_what_was_not_measured(errors):
    assert errors.weights[0] == 0 and (errors.weights[1:] > 0).all()
    assert np.isinf(errors.costs[5, 1]).all(), "longer than the longest stretch"
    assert errors.costs[1, 0, STEPS] > 0 and errors.chosen[1, 0, STEPS] == 0, "nothing to forecast from yet"


def test_a_gap_that_was_not_measured_counts_as_the_nearest():
    """Here forecasts are better the wider the gap, and the higher their order."""
    fillings = fillings_of(8, 2, (1, 3))
    costs = np.array([1.0 if p is None else 0.5 / (a - p) / order for _, a, p, order in fillings])
    found = _table(8, fillings, costs, np.ones(8), (1, 3))
    assert found.costs[6, 5, :5].tolist() == [0.5 / 3, 0.25 / 3, 0.25 / 3, 0.25 / 3, 0.25]
    assert found.costs[6, 5, 8] == 1 and found.chosen[6, 5].tolist() == [1, 2, 2, 2, 2, 0, 0, 0, 0]
    assert found.costs[4, 3, :3].tolist() == [0.5 / 3, 0.5 / 3, 0.25], "a gap of 3 has no third output there"
    assert found.chosen[3, 2].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0]


def test_gaps_that_nothing_has():
    """A gap of 3 has none before step 3, and a third output from step 4 on."""
    fillings = fillings_of(6, 2, (3,))
    found = _table(6, fillings, 1.0 / (1 + np.array([order for *_, order in fillings])), np.ones(6), (3,))
    assert found.chosen[3, 2].tolist() == [0] * 7 and found.chosen[4, 3].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert found.chosen[5, 4].tolist() == [1, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 4])
def test_a_weight_is_what_the_prediction_before_makes_of_the_picture(pipe, errors, k, monkeypatch):
    """Two samples one by one, with the scheduler's own step replaced."""
    ratios = []
    for sample in (2 * k % 3, (2 * k + 1) % 3):  # of three, every step has others
        seen: list[torch.Tensor] = []
        with observed(pipe.scheduler, _Observer()) as uncached:
            plain = draw(pipe, SETUP, [sample]).double()
        change = uncached.steps[k - 1].prediction - uncached.steps[k].prediction
        step = type(pipe.scheduler).step

        def moved(self, prediction, *args, seen=seen, change=change, step=step, **kwargs):
            seen.append(prediction)
            return step(self, prediction + change if len(seen) == k + 1 else prediction, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.scheduler), "step", moved)
            picture = draw(pipe, SETUP, [sample]).double()
        ratios.append(float((picture - plain).square().sum() / change.double().square().sum()))
    assert errors.weights[k] == pytest.approx(np.sqrt(ratios[0] * ratios[1]), rel=1e-3)


def test_batches_do_not_matter(pipe, errors):
    again = measure(pipe, SETUP, [0, 1, 2], batch=3, lags=3, gaps=(1, 2))
    assert np.allclose(again.costs, errors.costs, rtol=1e-3)


def test_nothing_is_left_on_the_pipeline(pipe, errors):
    assert not tiny.traces_of_cache(pipe.transformer)
    assert type(pipe.scheduler).__module__.startswith("diffusers")


def test_a_solved_plan_fills_with_the_orders_that_were_measured(pipe, errors):
    recipe = solve(errors, 4)
    computed = [k for k in range(STEPS) if k not in recipe.when.steps]
    assert len(computed) <= 4 and computed[0] == 0
    for k in recipe.when.steps:
        a, p = ([STEPS, *(c for c in computed if c < k)])[-1:-3:-1]
        assert filling(recipe, k) == FORECASTS[errors.chosen[k, a, p]]
    every = [(0, *rest) for rest in ((1, 2, 3), (1, 2, 4), (1, 3, 5), (2, 3, 5), (1, 2, 5), (2, 4, 5), (1, 3, 4))]
    sums = cheapest(errors.costs).steps(4)
    assert loss(errors, sums) <= min(loss(errors, steps) for steps in every) * (1 + 1e-9)
    with dittocache.enable(pipe, recipe) as cache:
        draw(pipe, SETUP, [0])
        assert cache.trace.table.mean(1).tolist() == [float(k in computed) for k in range(STEPS)]


def test_candidates(errors):
    found = candidates(errors, 3)
    assert (0, 2, 4) in found, "even steps"
    assert len(set(found)) == len(found) and all(len(one) <= 3 and one[0] == 0 for one in found)
    assert cheapest(errors.costs, "coherent").steps(3) in found


def test_the_search_only_gets_better_and_stops(pipe, errors):
    trial = Trial(pipe, Setup(num_steps=STEPS, seed=9, conditions=(1, 2)), range(2))
    starts, seen = candidates(errors, 3), []
    recipe, error = search(Forecasts(errors, trial), 3, tries=12, tried=lambda count, best: seen.append((count, best)))
    assert error == trial.error(recipe) <= min(trial.error(planned(errors, start)) for start in starts)
    assert len(recipe.when.steps) >= STEPS - 3 and 0 not in recipe.when.steps
    assert [count for count, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) <= 12
    assert all(b <= a for (_, a), (_, b) in itertools.pairwise(seen))


def test_every_filling_of_a_replay_is_what_it_is_alone(pipe, trends):
    """Where a step lies in a replay has nothing to do with which step of the run it is."""
    fills = (*FORECASTS, Trend(trends, 1.0))
    fillings = fillings_of(STEPS, 2, (1, 2), fills)
    together = _replay(pipe, SETUP, [0], fillings, fills)
    for n in range(0, len(fillings), 3):
        assert [together[n]] == pytest.approx(_replay(pipe, SETUP, [0], [fillings[n]], fills), rel=1e-4)


# ---- EOC ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trends(pipe):
    """Those of every step, of other samples."""
    made = calibrate(pipe, "eoc", [7, 8, 9], SETUP, reuse_steps=list(range(1, STEPS)), precision="float32")
    return made.fill.trend


@pytest.fixture(scope="module", params=[False, True], ids=["scaled", "added"])
def trend(request, trends) -> Trend:
    return Trend(trends, theta=1.0, additive=request.param)


@pytest.mark.parametrize("k", [2, 5])
def test_the_error_of_eoc_is_that_of_its_recipe(pipe, trend, k):
    (measured,) = _replay(pipe, SETUP, [0, 1, 2], [Filling(k, k - 1, None, 0)], (trend,))
    found = prediction_error(pipe, Recipe(ReuseSteps((k,)), fill=trend), k)
    assert measured / 3 == pytest.approx(found, rel=1e-4)
    assert measured / 3 != pytest.approx(prediction_error(pipe, Recipe(ReuseSteps((k,))), k), rel=1e-2)


def test_after_several_steps_all_trends_since_are_in_it(pipe, trend):
    site = Site("transformer_blocks.1.ff", "feed-forward", "transformer_blocks", 1, 2, 3)
    kept = torch.randn(2, *trend.trend[f"{site.name}@1"].shape, generator=torch.Generator().manual_seed(0))
    wanted = kept
    for k in (3, 4, 5):
        change = trend.trend[f"{site.name}@{k}"]
        wanted = wanted + change if trend.additive else wanted * (1 + change)
    (found,) = trend.fill(Entry([(kept,)], [2]), At(5, STEPS, site))
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, kept, atol=1e-3)
    entry = Entry([(kept,)], [2])
    for k in (3, 4, 5):
        (each,) = trend.fill(entry, At(k, STEPS, site))
    assert torch.equal(each, found), "as it is written back step by step"


def test_a_plan_of_eoc_alone_is_eoc(pipe, trend):
    """What is written back depends on the last computed step alone, so that a path over pairs is exact."""
    steps = (1, 3, 4, 5)
    chosen = Recipe(ReuseSteps(steps), fill=Chosen((Taylor(1), trend), (0,) + (1,) * (STEPS - 1)))
    pictures = []
    for recipe in (Recipe(ReuseSteps(steps), fill=trend), chosen):
        with dittocache.enable(pipe, recipe):
            pictures.append(draw(pipe, SETUP, [0, 1]))
    assert torch.equal(*pictures)


def test_eoc_is_chosen_where_it_was_measured_to_be_best(pipe, trends, tmp_path):
    fills = (Hold(), Trend(trends, 1.0), Trend(trends, 1.0, additive=True), Taylor(1))
    errors = measure(pipe, SETUP, [0, 1, 2], lags=3, gaps=(1, 2), fills=fills)
    each = [measure(pipe, SETUP, [0, 1, 2], lags=3, gaps=(1, 2), fills=[fill]).costs for fill in fills]
    assert np.allclose(errors.costs, np.min(each, 0))
    read = np.isfinite(errors.costs)
    assert (np.argmin(each, 0) == errors.chosen)[read].all() and 2 in errors.chosen[read]
    chosen = np.where(np.arange(STEPS)[:, None, None] >= 4, 2, 3 * np.ones_like(errors.chosen))
    recipe = planned(replace(errors, chosen=chosen), (0, 1, 3))
    assert [type(fill) for fill in recipe.fill.fills] == [Trend, Taylor] and recipe.fill.chosen[2:] == (1, 0, 0, 0)
    assert {name.rpartition("@")[2] for name in recipe.fill.fills[0].trend} == {"4", "5"}, "not more than it needs"
    recipe.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == recipe == Recipe.from_dict(recipe.to_dict())
    assert len((tmp_path / "recipe.json").read_text()) < 5000, "its tensors are in the other file"
    pictures = []
    for made in (recipe, Recipe.from_pretrained(tmp_path)):
        with dittocache.enable(pipe, made):
            pictures.append(draw(pipe, SETUP, [0]))
    assert torch.equal(*pictures)


# ---- parts ----------------------------------------------------------------------------------------------------------
def test_chosen():
    fill = Chosen((Hold(), Taylor(1), Taylor(2)), (0, 0, 1, 0, 2))
    assert fill.depth == 3 and not Hold().rowwise and fill.rowwise
    site, entry = Site("a", "attention", "blocks", 0, 1, 0), Entry()
    assert not fill.ready(entry)
    for k, value in enumerate((1.0, 3.0, 4.0, 8.0)):
        fill.keep(entry, (torch.tensor([value]),), At(k, 5, site))
    assert entry.steps == [3, 2, 1] and [value[0].item() for value in entry.values] == [8, 4, 3]
    assert fill.fill(entry, At(4, 5, site))[0].item() == pytest.approx(2.5 * 8 - 2 * 4 + 0.5 * 3), "TaylorSeer's series"
    assert Chosen(fill.fills, (0,) * 5).fill(entry, At(4, 5, site))[0].item() == 8
    with pytest.raises(ValueError, match="fills are chosen for 5 steps, but this run has step 5"):
        fill.fill(entry, At(5, 6, site))
    with pytest.raises(ValueError, match="every entry of chosen must be a whole number, from 0 to 2; got 3"):
        Chosen(fill.fills, (0, 3))
    with pytest.raises(ValueError, match=r"a fill of computed outputs alone is needed .*; got GradientQueue"):
        Chosen((GradientQueue(),))
    with pytest.raises(ValueError, match="fills are a list of one or more; got 'hold'"):
        Chosen("hold")
    assert Recipe.from_dict(Recipe(ReuseSteps((2,)), fill=fill).to_dict()).fill == fill


SITE = Site("a.attn", "attention", "a", 0, 1, 0)
TREND = {f"{SITE.name}@{k}": torch.full((2, 1), float(k)) for k in range(1, 6)}


@pytest.mark.parametrize(("write_back", "kept"), [(True, {"4", "5"}), (False, {"5"})])
def test_a_trend_that_is_chosen_late_has_all_trends_that_it_needs(write_back, kept):
    chosen = np.zeros((6, 6, 7), dtype=int)
    chosen[5] = 1
    fills = (Hold(), Trend(TREND, 1.0, write_back))
    fill = planned(StepErrors(np.ones((6, 6, 7)), chosen, np.ones(6), fills), (0, 3)).fill
    assert {name.rpartition("@")[2] for name in fill.fills[1].trend} == kept


def test_trends_that_are_added():
    fill = Trend(TREND, 0.5, additive=True)
    assert fill.fill(Entry([(torch.ones(1, 2, 1),)], [0]), At(2, 6, SITE))[0].flatten().tolist() == [2.5, 2.5]
    assert dittocache.recipe("eoc", trend=TREND, additive=True).fill.additive


def test_no_fill_goes_on_from_what_another_made_up():
    fill, entry = Chosen((Trend(TREND, 1.0), Taylor(1)), (0, 0, 0, 1)), Entry()
    for k, value in enumerate((1.0, 3.0)):
        fill.keep(entry, (torch.full((1, 2, 1), value),), At(k, 4, SITE))
    assert fill.fill(entry, At(2, 4, SITE))[0].flatten().tolist() == [9, 9] and entry.steps == [1, 0]
    assert fill.fill(entry, At(3, 4, SITE))[0].flatten().tolist() == [7, 7]


def test_data_of_another_size_is_refused_when_an_output_is_kept():
    with pytest.raises(ValueError, match="calibrate for this size"):
        Chosen((Hold(), Trend(TREND)), (0, 1)).keep(Entry(), (torch.ones(1, 3, 1),), At(0, 2, SITE))


def test_fills_with_the_same_data_are_saved(tmp_path):
    trend = Trend(TREND, 0.5)
    made = Recipe(ReuseSteps((1,)), fill=Chosen((trend, replace(trend, additive=True), trend.of([2])), (0, 1)))
    made.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == made


def test_mixing_finds_how_guidance_was_done():
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(4, 6, 5, generator=generator), torch.randn(2, 6, 5, generator=generator)]
    first, second, third = outputs[0][:2, :3], outputs[0][2:, :3], outputs[1][:, :3]
    prediction = 2.5 * first - 1.0 * second - 0.5 * third
    factors = mixing(outputs, prediction)
    assert torch.allclose(factors, torch.tensor([2.5, -1.0, -0.5], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(guided(outputs, factors, prediction), prediction, atol=1e-5)
    with pytest.raises(ValueError, match=r"no sum of the network's outputs \(\d+\.\d % are left\)"):
        mixing(outputs, prediction.abs())
    with pytest.raises(ValueError, match=r"the network returns \[6, 6, 5\], but the scheduler is handed \[4, 3, 5\]"):
        mixing(outputs, torch.ones(4, 3, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": []}, "samples are one or more numbers; got none"),
        ({"samples": [0], "lags": 0}, "lags must be a whole number, 1 or more; got 0"),
        ({"samples": [0], "fills": ()}, r"fills are a list of one or more; got \(\)"),
        ({"samples": [0], "fills": ["hold"]}, r"a fill of computed outputs alone is needed .*; got 'hold'"),
        ({"samples": [0], "fills": [Linear()]}, r"a fill of computed outputs alone is needed .*; got Linear"),
        ({"samples": [0], "fills": [Trend({"nobody@1": torch.ones(2, 2)})]}, "nobody"),
    ],
)
def test_what_cannot_be_measured(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(pipe, SETUP, **arguments)


def test_no_errors_of_a_cached_pipeline(pipe):
    with dittocache.enable(pipe, "fora"), pytest.raises(ValueError, match="a cache is on"):
        measure(pipe, SETUP, [0])


def test_budgets_out_of_reach(errors):
    with pytest.raises(ValueError, match="no plan computes 1 steps: at least 2 of them are needed"):
        solve(errors, 1)
    with pytest.raises(ValueError, match="budget must be a whole number, 1 or more; got 0"):
        solve(errors, 0)
