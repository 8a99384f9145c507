"""Plans carried over to other steps by noise level."""

from __future__ import annotations

import itertools
import warnings

import diffusers
import numpy as np
import pytest
import tiny
import torch

import dittocache
from dittocache import Plan, Recipe, card, noise, origin, recipe
from dittocache.fill import Chosen, GradientQueue, Linear, Taylor, Trend
from dittocache.tune.errors import FORECASTS
from dittocache.tune.resample import assigned, levels, resample, timesteps_of
from dittocache.when import ReuseSteps, Table
from dittocache.which import ValueNorm

DDIM = diffusers.DDIMScheduler()
COMPUTED = (0, 7, 12, 18, 20, 23, 26, 29, 32, 36, 41, 45, 49)


def stepwise(computed=COMPUTED, steps=50, **kwargs):
    chosen = tuple(2 if k in computed else int(k > 20) for k in range(steps))  # 2 is never read
    filled = tuple(k for k in range(steps) if k not in computed)
    return Recipe(ReuseSteps(filled), fill=Chosen(FORECASTS, chosen), **kwargs)


def carried(made, scheduler=DDIM, steps=None, **kwargs):
    with pytest.warns(UserWarning, match=r"^dittocache: resampled from \d+ to \d+ steps; not measured"):
        return resample(made, scheduler, steps, **kwargs)


def computed_of(made):
    return [k for k in range(made.num_steps) if k not in made.when.steps]


# ---- noise levels ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("HeunDiscreteScheduler", {}),
    ],
)
def test_levels_are_those_of_the_scheduler(name, config):
    """By the timestep alone, as `noise.levels` knows them from the solver's own tables; but for rounded timesteps."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(12)
    alpha, sigma = noise.levels(scheduler)
    expected = (alpha / sigma).log().numpy()
    found = levels(scheduler, [float(t) for t in scheduler.timesteps])
    assert np.abs(found - expected)[1:].max() < 0.05 * np.abs(np.diff(expected)).max()
    assert (np.diff(found) >= 0).all()


def test_levels_without_an_end():
    """Pure noise lies at minus infinity, where nothing could be compared."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert levels(flow, [1000.0, 500.0, 0.0]).tolist() == [-8, 0, 8]
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert levels(zero, [999])[0] == -8


# ---- which steps ----------------------------------------------------------------------------------------------------
def test_assigned_is_the_best_there_is():
    generator = np.random.default_rng(0)
    for _ in range(50):
        steps = int(generator.integers(1, 9))
        count = int(generator.integers(1, steps + 1))
        there, targets = np.sort(generator.random(steps)), np.sort(generator.random(count))
        found = assigned(targets, there)
        assert found[0] == 0 and found == sorted(set(found))

        def distance(chosen, targets=targets, there=there):
            return sum(abs(t - there[k]) for t, k in zip(targets, chosen, strict=True))

        every = [(0, *rest) for rest in itertools.combinations(range(1, steps), count - 1)]
        assert distance(found) == pytest.approx(min(map(distance, every)))


@pytest.mark.parametrize("steps", [13, 20, 30, 50, 77, 100])
def test_computed_steps_stay_at_their_noise_levels(steps):
    made = carried(stepwise(), steps=steps)
    found, old, new = computed_of(made), *(levels(DDIM, timesteps_of(DDIM, n)) for n in (50, steps))
    assert len(found) == 13 and found[0] == 0 and made.num_steps == steps
    if steps >= 30:
        apart = np.abs(new[found] - old[list(COMPUTED)])
        assert (apart <= np.gradient(new)[found])[1:].all()  # step 0 is step 0
    if steps == 50:
        assert tuple(found) == COMPUTED


def test_by_noise_not_by_number():
    """A solver that spends its steps elsewhere computes other numbers, at the same noise."""
    karras = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    old, new = levels(DDIM, timesteps_of(DDIM, 50)), levels(karras, timesteps_of(karras, 50))
    found = computed_of(carried(stepwise(made_for={"timesteps": timesteps_of(DDIM, 50)}), karras, 50))
    assert found == [0, 12, 18, 24, 25, 27, 29, 30, 32, 34, 36, 39, 49]
    assert (np.abs(new[found] - old[list(COMPUTED)])[1:] <= np.gradient(new)[found][1:]).all()
    assert tuple(computed_of(carried(stepwise(), karras, 50))) == COMPUTED  # made for nothing else: these steps


def test_the_number_of_computed_steps():
    assert computed_of(carried(stepwise(), steps=10)) == list(range(10))  # fewer than were computed
    assert computed_of(carried(stepwise(), steps=1)) == [0]
    share = computed_of(carried(stepwise(), steps=25, keep="share"))
    assert len(share) == 6 and share[0] == 0 and share[-1] == 24
    assert len(computed_of(carried(stepwise(), steps=100, keep="share"))) == 26
    assert computed_of(carried(stepwise((0,)), steps=100)) == [0]


def test_a_plan_that_computes_all_steps():
    timesteps = [float(t) for t in range(1000, 0, -20)]
    made = carried(
        Recipe(ReuseSteps(()), fill=Chosen(FORECASTS, (1,) * 50), made_for={"timesteps": timesteps}), steps=30
    )
    assert made.when == ReuseSteps(()) and made.fill == Chosen()


def test_fills_come_from_the_nearest_filled_step():
    made = carried(stepwise(), steps=100)
    old, new = (levels(DDIM, timesteps_of(DDIM, n)) for n in (50, 100))
    filled = [k for k in range(50) if k not in COMPUTED]
    for k in made.when.steps:
        nearest = min(filled, key=lambda j, k=k: abs(old[j] - new[k]))
        assert made.fill.chosen[k] == (nearest > 20)
    assert set(made.fill.chosen) == {0, 1}


def test_fitted_factors_are_interpolated_between_the_same_outputs():
    """Factors that follow from the noise level alone are found again; where outputs are other ones, nothing is."""

    def fitted(computed, steps):
        at = levels(DDIM, timesteps_of(DDIM, steps))
        last = [max(a for a in computed if a <= k) for k in range(steps)]
        d = np.array([at[k] - at[a] for k, a in enumerate(last)])
        gaps = np.array([sum(a <= k for a in computed) for k in range(steps)])
        return np.stack([1 + d * gaps, -d * gaps], axis=1)

    coefficients = fitted(COMPUTED, 50)
    old = Recipe(stepwise().when, fill=Linear(tuple(map(tuple, coefficients.tolist()))))
    assert old.num_steps == 50
    for steps in (30, 50, 100):
        made = carried(old, steps=steps)
        found, expected = np.array(made.fill.coefficients), fitted(computed_of(made), steps)
        assert found.shape == (steps, 2) and np.allclose(found.sum(1), 1)
        at = levels(DDIM, timesteps_of(DDIM, 50))
        most = np.array([at[after - 1] - at[c] for c, after in zip(COMPUTED, (*COMPUTED[1:], 50), strict=True)])
        gap = np.array([sum(a <= k for a in computed_of(made)) for k in range(steps)])
        inside = (expected[:, 0] - 1) / gap <= most[gap - 1]  # beyond the last filled step nothing was fitted
        assert inside.mean() > 0.6 and np.allclose(found[inside], expected[inside], atol=1e-6)
    for steps, keep in ((10, "count"), (25, "share")):
        with pytest.raises(ValueError, match=f"Linear belongs to the 50 steps .* tune for {steps} steps"):
            resample(old, DDIM, steps, keep=keep)


def test_a_table_site_by_site():
    generator = np.random.default_rng(1)
    values = (generator.random((20, 3)) < 0.4).astype(float)
    values = np.concatenate([values, np.ones((20, 1)), np.zeros((20, 1)), np.where(values[:, :1] == 1, 1, 0.25)], 1)
    plan = Plan(
        values,
        tuple("abcdef"),
        fills=("hold",) * 20,
        meta={"num_steps": 20, "head": 0, "timesteps": timesteps_of(DDIM, 20)},
    )
    old = Recipe(Table(plan), which=ValueNorm())
    for steps in (20, 30, 12):
        made = carried(old, steps=steps)
        found = made.when.plan
        count = (found.table == 1).sum(0)
        assert found.table.shape == (steps, 6) and found.sites == plan.sites and found.meta["num_steps"] == steps
        assert found.fills == ("hold",) * steps and made.fill == old.fill and made.which == old.which
        wanted = np.minimum((values == 1).sum(0), steps)
        assert count[[0, 1, 2, 5]].tolist() == wanted[[0, 1, 2, 5]].tolist()
        assert count[3] == steps and count[4] == 1 and found.table[0, 4] == 1
        assert set(found.table[:, 5]) == {1, 0.25} and np.array_equal(found.table[:, 5] == 1, found.table[:, 0] == 1)
        if steps == 20:
            again = np.delete(values, 4, 1)
            again[0] = 1  # where a first step was not computed, the first that is moves there
            assert (np.delete(found.table, 4, 1) == again).mean() > 0.9


# ---- runs -----------------------------------------------------------------------------------------------------------
def test_runs_where_the_old_one_is_refused():
    """The refusal names the way out; the plan that it gives is what is then followed."""
    pipe = tiny.pipeline()
    pipe.scheduler.set_timesteps(12)
    made_for = origin.made_for(pipe.transformer, pipe.scheduler, pipe.scheduler.timesteps.tolist())
    made = stepwise((0, 3, 5, 8, 11), 12, made_for=made_for)
    with dittocache.enable(pipe, made), pytest.raises(ValueError, match=r"has 8: .*dittocache\.tune\.resample"):
        tiny.draw(pipe, steps=8)
    other = carried(made, pipe.scheduler, 8)
    with dittocache.enable(pipe, other) as cache:
        tiny.draw(pipe, steps=8)
        assert np.flatnonzero((cache.trace.table == 1).all(1)).tolist() == computed_of(other)
        trace = cache.trace
    replayed = Recipe(Table(trace), fill=other.fill)
    with dittocache.enable(pipe, replayed), pytest.raises(ValueError, match=r"has 12: dittocache\.tune\.resample"):
        tiny.draw(pipe, steps=12)
    again = carried(replayed, pipe.scheduler, 12)
    with dittocache.enable(pipe, again) as cache:
        tiny.draw(pipe, steps=12)
        assert cache.trace == again.when.plan


def test_timesteps_that_the_scheduler_has():
    """Dynamic shifts depend on more than the number of steps."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made = stepwise(made_for={"timesteps": np.linspace(1000, 20, 50).tolist()})
    with pytest.raises(ValueError, match="leave num_steps out"):
        resample(made, flow, 30)
    flow.set_timesteps(30, mu=1.15)
    before = flow.timesteps.clone()
    found = carried(made, flow)
    assert found.made_for["timesteps"] == pytest.approx(before.tolist(), abs=1e-3) and found.num_steps == 30
    assert torch.equal(flow.timesteps, before)
    assert carried(made, flow, None).when == found.when


def test_the_scheduler_is_left_as_it_is():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(7)
    carried(stepwise(), scheduler, 30)
    assert len(scheduler.timesteps) == 7


def test_rules_go_with_any_number_of_steps():
    for name in ("fora", "toca", "taylorseer", "pab", "teacache", "dicache"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resample(recipe(name), DDIM, 30) is not None
            assert resample(recipe(name), DDIM, 30) == recipe(name)


def test_a_calibrated_rule_takes_the_new_steps():
    old = Recipe(
        recipe("fora").when,
        method="fora",
        params={"interval": 3, "anchor": "end"},
        made_for={"model": "X", "timesteps": timesteps_of(DDIM, 50)},
    )
    found = carried(old, steps=30)
    assert found.when == old.when and found.method == "fora" and found.params == old.params
    assert found.made_for == {"model": "X", "scheduler": "DDIMScheduler", "timesteps": timesteps_of(DDIM, 30)}


def test_a_published_plan_is_still_cited(tmp_path):
    old = recipe("goc", reuse_steps=[3, 5, 7])
    found = carried(Recipe(**{**vars(old), "made_for": {"timesteps": timesteps_of(DDIM, 10)}}), steps=20)
    assert found.method is None and len(computed_of(found)) == 7
    found.save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert dittocache.methods()["goc"].bibtex.strip() in written and "resampled from another number" in written
    assert Recipe.from_pretrained(tmp_path) == found


# ---- the predicted loss ---------------------------------------------------------------------------------------------
def costs_of(steps, filled, scale=1.0):
    """Errors that depend smoothly on the noise, and on the length of a step squared: what is assumed."""
    at = levels(DDIM, timesteps_of(DDIM, steps))
    cost = scale * np.exp(-(at**2) / 20) * np.gradient(at) ** 2
    return [float(c) if k in filled else 0.0 for k, c in enumerate(cost)]


def test_the_predicted_loss_follows_the_noise():
    old = stepwise()
    costs = costs_of(50, old.when.steps)
    provenance = {
        "solver": {"costs": costs},
        "measured": [{"label": "x"}],
        "model": "glyphs",
        "setup": {"num_steps": 50},
    }
    for steps in (30, 80):
        with pytest.warns(UserWarning, match=rf"predicted squared error [\d.e-]+ \({sum(costs):.4g} with 50 steps\)"):
            found = resample(Recipe(**{**vars(old), "provenance": provenance}), DDIM, steps)
        told = found.provenance["resampled"]
        truth = sum(costs_of(steps, found.when.steps))
        assert told["squared error"]["predicted"] == pytest.approx(truth, rel=0.1)
        assert told["squared error"]["before"] == pytest.approx(sum(costs))
        assert told["of"] == provenance and (told["from"], told["to"]) == (50, steps)
        assert set(found.provenance) == {"resampled", "model", "setup"}  # what was measured was of another plan
        assert found.provenance["setup"]["num_steps"] == steps
    for steps, keep in ((10, "count"), (30, "share")):  # other lags: nothing to go by
        with pytest.warns(UserWarning, match="no predicted loss"):
            resample(Recipe(**{**vars(old), "provenance": provenance}), DDIM, steps, keep=keep)


# ---- bad input ------------------------------------------------------------------------------------------------------
def bad_provenance(costs):
    return stepwise(provenance={"solver": {"costs": costs}})


@pytest.mark.parametrize(
    ("made", "scheduler", "steps", "keep", "words"),
    [
        (stepwise(), DDIM, 30, "budget", "keep must be one of count, share; got 'budget'"),
        (stepwise(), DDIM, 0, "count", "num_steps must be a whole number, 1 or more; got 0"),
        (stepwise(), DDIM, 2.5, "count", "num_steps must be a whole number, 1 or more; got 2.5"),
        (stepwise(), "ddim", 30, "count", "those of a diffusers scheduler; got 'ddim'"),
        (stepwise(), "ddim", None, "count", "str has no timesteps: pass num_steps"),
        (Recipe(ReuseSteps((3,))), DDIM, 30, "count", "does not say for how many steps"),
        (recipe("eoc", **tiny.data_for("eoc")), DDIM, 30, "count", "does not say for how many steps"),
        (
            Recipe(ReuseSteps((70,)), made_for={"timesteps": [9.0, 1.0]}),
            DDIM,
            30,
            "count",
            "reuse_steps in a run of 2 steps",
        ),
        (
            Recipe(ReuseSteps((1,)), fill=Chosen(FORECASTS, (0, 1)), made_for={"timesteps": [9.0, 5.0, 1.0]}),
            DDIM,
            30,
            "count",
            "Chosen belongs to the 3 steps",
        ),
        (
            Recipe(
                ReuseSteps((1,)),
                fill=Chosen((Taylor(1), Trend({"blocks.0.attn@1": torch.ones(4, 8)})), (0, 1)),
                made_for={"timesteps": [9.0, 1.0]},
            ),
            DDIM,
            30,
            "count",
            "Trend belongs to the 2 steps",
        ),
        (
            Recipe(Table(Plan(np.eye(3), tuple("abc"))), made_for={"timesteps": [9.0, 1.0]}),
            DDIM,
            30,
            "count",
            "the plan has 3 steps, but the recipe was made for 2",
        ),
        (
            Recipe(ReuseSteps((1,)), fill=GradientQueue(positions=(1,)), made_for={"timesteps": [9.0, 1.0]}),
            DDIM,
            30,
            "count",
            "GradientQueue belongs to the 2 steps .* cannot be resampled: calibrate, train or tune for 30 steps",
        ),
        (
            Recipe(**{**vars(recipe("l2c", **tiny.data_for("l2c"))), "made_for": {"timesteps": [3.0, 2.0, 1.0]}}),
            DDIM,
            30,
            "count",
            "Router belongs to the 3 steps",
        ),
        (bad_provenance([1.0]), DDIM, 30, "count", "costs in the provenance must be 50 numbers"),
        (bad_provenance("x"), DDIM, 30, "count", "costs in the provenance must be 50 numbers"),
        (bad_provenance([-1.0] * 50), DDIM, 30, "count", "every entry of the solver's costs"),
        (stepwise(), diffusers.EDMEulerScheduler(), 30, "count", "EDMEulerScheduler is not supported"),
    ],
)
def test_bad_input(made, scheduler, steps, keep, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=words) as e:
            resample(made, scheduler, steps, keep=keep)
    assert "\n" not in str(e.value)


def test_number_of_steps():
    """What a recipe says of its runs, the surest first."""
    assert recipe("fora").num_steps is None and stepwise().num_steps == 50
    assert Recipe(Table(Plan(np.eye(4), tuple("abcd")))).num_steps == 4
    assert Recipe(ReuseSteps((1,)), params={"num_steps": 7}).num_steps == 7
    assert Recipe(ReuseSteps((1,)), provenance={"setup": {"num_steps": 8}}).num_steps == 8
    assert Recipe(ReuseSteps((1,)), provenance={"setup": [8]}).num_steps is None
    assert stepwise(made_for={"timesteps": [2.0, 1.0]}).num_steps == 2
    assert Recipe(ReuseSteps((1,)), fill=Taylor(1)).num_steps is None and card.method_of(stepwise()) == ""
