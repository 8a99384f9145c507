"""The one table: shape, counting, files, replaying."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dittocache
from dittocache import Plan, Recipe
from dittocache.plan import align
from dittocache.when import Table
from dittocache.which import RandomTokens, Straight

SHARES = st.floats(0, 1)


def plans(shares=SHARES):
    return st.integers(1, 6).flatmap(
        lambda t: st.integers(1, 5).flatmap(
            lambda s: hnp.arrays(np.float64, (t, s), elements=shares).map(
                lambda table: Plan(
                    table,
                    tuple(f"b.{j}.ff" for j in range(s)),
                    kinds=("feed-forward",) * s,
                    flops=tuple(map(float, range(1, s + 1))),
                    flops_rest=0.5,
                )
            )
        )
    )


# ---- counting -------------------------------------------------------------------------------------------------------
def test_counting_by_hand():
    plan = Plan([[1, 1], [0.5, 0], [0, 0]], ("a", "b"), kinds=("x", "y"), flops=(10.0, 30.0), flops_rest=5.0)
    assert plan.flops_full == 3 * 45 and plan.flops_done == 1.5 * 10 + 30 + 3 * 5
    assert plan.compute_fraction == pytest.approx(60 / 135) and plan.ideal_speedup == pytest.approx(135 / 60)
    assert plan.share_by_kind() == {"x": pytest.approx(0.5), "y": pytest.approx(1 / 3)}


def test_without_measured_flops_the_table_counts():
    plan = Plan([[1, 1], [0, 0.5]], ("a", "b"))
    assert math.isnan(plan.flops_full) and math.isnan(plan.flops_done)
    assert plan.compute_fraction == 0.625 and plan.ideal_speedup == 1.6
    assert Plan([[0.0]], ("a",)).ideal_speedup == math.inf


@given(plans())
def test_shares_are_shares(plan):
    assert 0 < plan.compute_fraction <= 1 and plan.ideal_speedup >= 1
    assert plan.flops_done <= plan.flops_full * (1 + 1e-12)
    ones = Plan(np.ones_like(plan.table), plan.sites, flops=plan.flops, flops_rest=plan.flops_rest)
    assert ones.compute_fraction == 1.0


# ---- files ----------------------------------------------------------------------------------------------------------
@given(plans())
def test_json_round_trip(plan):
    text = plan.to_json()
    again = Plan.from_json(text)
    assert np.allclose(again.table, plan.table, atol=1e-6)
    assert (again.sites, again.steps, again.kinds) == (plan.sites, plan.steps, plan.kinds)
    assert (again.flops, again.flops_rest) == (plan.flops, plan.flops_rest)
    assert again.to_json() == text and Plan.from_dict(json.loads(text)) == again


@given(plans(st.sampled_from([0.0, 1.0])))
def test_json_round_trip_of_whole_steps_is_exact(plan):
    assert Plan.from_json(plan.to_json()) == plan


def test_files(tmp_path):
    plan = Plan([[1, 0.25]], ("a", "b"), steps=(7,), fills=("hold",), meta={"note": "hello"})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.steps == (7,) and again.fills == ("hold",) and again.meta == {"note": "hello"}


def test_drawing(tmp_path):
    model = tiny.dit()
    with dittocache.enable(model, "duca", selector="random", ratio=0.3, ratio_schedule="constant") as cache:
        tiny.predictions(model, cache, 10)
    for name in ("a.png", "a.svg"):
        cache.trace.draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    Plan([[1.0]], ("a",)).draw(tmp_path / "b.png", title="one")
    assert (tmp_path / "b.png").exists()


# ---- bad plans ------------------------------------------------------------------------------------------------------
BAD = {
    "one dimension": (lambda: Plan([1, 0], ("a", "b")), "2 dimensions"),
    "ragged": (lambda: Plan([[1, 0], [1]], ("a", "b")), "array of numbers"),
    "text": (lambda: Plan([["x"]], ("a",)), "array of numbers"),
    "nan": (lambda: Plan([[1.0], [float("nan")]], ("a",)), r"step 1, site 'a' has nan"),
    "inf": (lambda: Plan([[float("inf")]], ("a",)), "inf"),
    "negative": (lambda: Plan([[-0.1]], ("a",)), "-0.1"),
    "above one": (lambda: Plan([[1.5]], ("a",)), "1.5"),
    "too few sites": (lambda: Plan([[1, 0]], ("a",)), "1 sites"),
    "too few steps": (lambda: Plan([[1], [0]], ("a",), steps=(1,)), "1 steps"),
    "sites twice": (lambda: Plan([[1, 0]], ("a", "a")), "once"),
    "steps twice": (lambda: Plan([[1], [0]], ("a",), steps=(1, 1)), "once|order|rise"),
    "steps of text": (lambda: Plan([[1]], ("a",), steps=("x",)), "step.*'x'"),
    "steps between": (lambda: Plan([[1]], ("a",), steps=(0.5,)), "step.*0.5"),
    "negative steps": (lambda: Plan([[1]], ("a",), steps=(-1,)), "step.*-1"),
    "kinds": (lambda: Plan([[1]], ("a",), kinds=("x", "y")), "kinds"),
    "flops": (lambda: Plan([[1]], ("a",), flops=(1.0, 2.0)), "flops"),
    "nan flops": (lambda: Plan([[1]], ("a",), flops=(float("nan"),)), "flops.*nan"),
    "negative flops": (lambda: Plan([[1]], ("a",), flops=(-1.0,)), "flops.*-1"),
    "fills": (lambda: Plan([[1]], ("a",), fills=("hold", "hold")), "fills"),
    "sites in one text": (lambda: Plan([[1, 0]], "ab"), "sites"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans(case):
    make, words = BAD[case]
    with pytest.raises(ValueError, match=words) as e:
        make()
    assert "\n" not in str(e.value)


GOOD = Plan([[1, 1], [0, 0.5], [0.25, 0]], ("a", "b"), kinds=("x", "y"), flops=(1.0, 2.0), flops_rest=3.0)


@given(st.integers(0, len(GOOD.to_json()) - 1))
def test_truncated_files(cut):
    with pytest.raises(ValueError, match=r"damaged plan|not a plan") as e:
        Plan.from_json(GOOD.to_json()[:cut])
    assert "\n" not in str(e.value)


JUNK = [None, True, 3, -1, 0.5, "x", "", [], {}, [None], ["x"], [[1]], {"a": 1}, float("nan")]


@given(
    st.sampled_from(["format", "steps", "sites", "kinds", "table", "flops", "flops_rest", "fills", "meta"]),
    st.sampled_from(JUNK),
)
def test_damaged_fields_are_a_clear_error_or_harmless(field, junk):
    """Whatever stands in a field: a ValueError of one line that says it is about a plan, or a plan that works."""
    data = GOOD.to_dict() | {field: junk}
    try:
        plan = Plan.from_json(json.dumps(data))
    except ValueError as error:
        assert "\n" not in str(error) and "plan" in str(error), str(error)
    else:
        assert plan.table.shape == (3, 2) and 0 < plan.compute_fraction <= 1
        assert plan.sites == ("a", "b") and plan.steps == (0, 1, 2)
        assert json.loads(plan.to_json()) and plan.share_by_kind()


@pytest.mark.parametrize("field", ["steps", "sites", "table"])
def test_missing_fields(field):
    data = GOOD.to_dict()
    del data[field]
    with pytest.raises(ValueError, match=f"damaged plan.*{field}"):
        Plan.from_dict(data)


def test_a_transposed_table_is_damaged():
    """Not quietly reshaped into something else."""
    data = GOOD.to_dict()
    for table in (GOOD.table.T.tolist(), GOOD.table.reshape(-1).tolist(), [[1, 1, 0], [0.5, 0.25, 0]]):
        with pytest.raises(ValueError, match="plan"):
            Plan.from_dict(data | {"table": table})


@pytest.mark.parametrize("data", [None, 3, "x", [], {}, {"format": "dittocache-recipe-1"}, {"format": None}], ids=str)
def test_foreign_data(data):
    with pytest.raises(ValueError, match="not a plan") as e:
        Plan.from_dict(data)
    assert "\n" not in str(e.value)


def test_a_plan_is_read_only():
    given_table = np.ones((2, 1))
    plan = Plan(given_table, ("a",))
    given_table[0] = 0
    assert (plan.table == 1).all()
    with pytest.raises(ValueError):
        plan.table[0] = 0
    with pytest.raises(AttributeError):
        plan.sites = ()


def test_what_is_passed_is_not_mutated():
    table, sites, meta, data = [[1.0, 0.0]], ["a", "b"], {"x": [1]}, GOOD.to_dict()
    before = json.dumps(data)
    Plan(table, sites, meta=meta)
    Plan.from_dict(data)
    assert (table, sites, meta, json.dumps(data)) == ([[1.0, 0.0]], ["a", "b"], {"x": [1]}, before)
    plan = Plan(table, sites, meta=meta)
    plan.to_dict()["meta"]["y"] = 2
    assert plan.meta == {"x": [1]}


# ---- replaying ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", ["none", "separate"])
@pytest.mark.parametrize("by", ["plan", "json", "file", "recipe"])
def test_replaying_the_trace_of_fora_is_bit_identical(model, by, guidance, tmp_path):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    with dittocache.enable(model, "fora", scheduler=scheduler) as cache:
        expected = tiny.sample(model, scheduler, guidance=guidance)
        trace = cache.trace
    trace.save(tmp_path / "plan.json")
    replay = {
        "plan": trace,
        "json": Plan.from_json(trace.to_json()),
        "file": Plan.load(tmp_path / "plan.json"),
        "recipe": Recipe(when=Table(trace)),
    }[by]
    with dittocache.enable(model, replay, scheduler=scheduler) as cache:
        assert torch.equal(tiny.sample(model, scheduler, guidance=guidance), expected)
        assert cache.trace == trace and cache.trace.compute_fraction == trace.compute_fraction < 0.8


def test_replaying_the_trace_of_aggressive_steps(bundled_pipe):
    """With nothing partial in it, DuCa's trace holds everything."""
    with dittocache.enable(bundled_pipe, "duca", selector="random", ratio=0.0, interval=4) as cache:
        expected = tiny.draw(bundled_pipe, 10)
        trace = cache.trace
    assert "stack" in trace.kinds and (trace.table[:, -1] == 0).any()
    with dittocache.enable(bundled_pipe, trace) as cache:
        # partial steps of no tokens were reused by another path: equal but for rounding
        assert tiny.relative(tiny.draw(bundled_pipe, 10), expected) < 1e-5
        assert cache.trace == trace


def test_a_stack_is_known_by_its_name():
    """A plan made by hand need not say of what kind its sites are."""
    model = tiny.dit()
    with dittocache.enable(model, "duca", selector="random", ratio=0.0, interval=4) as cache:
        expected = tiny.predictions(model, cache, 10)
        trace = cache.trace
    with dittocache.enable(model, Plan(trace.table, trace.sites)) as cache:
        for a, b in zip(tiny.predictions(model, cache, 10), expected, strict=True):
            assert tiny.relative(a, b) < 1e-5
        assert cache.trace == trace


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("by", ["plan", "json"])
def test_replaying_shares_computes_as_many_tokens(ratio, by):
    """On 49 tokens, where shares are no finite fractions: counted on the layers themselves."""
    model = tiny.dit(sample_size=14)
    which = Straight(ratio=ratio, ratio_schedule="linear", soft_weight=0.0, spatial_bonus=None)
    with dittocache.enable(model, Recipe(when=dittocache.recipe("toca").when, which=which)) as cache:
        with tiny.Counter(model) as counter:
            expected = tiny.predictions(model, cache, 12)
        trace, first = cache.trace, counter.calls
    replay = trace if by == "plan" else Plan.from_json(trace.to_json())
    with dittocache.enable(model, Recipe(when=Table(replay), which=which)) as cache:
        with tiny.Counter(model) as counter:
            outputs = tiny.predictions(model, cache, 12)
        assert counter.calls == first
        assert np.allclose(cache.trace.table, trace.table)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_plan_with_shares_and_a_selector():
    model = tiny.dit()
    sites = tuple(f"transformer_blocks.{n}.ff" for n in range(3))
    table = np.array([[1, 1, 1], [0.25, 0.5, 0], [1, 0.0625, 0.75]])
    recipe = Recipe(when=Table(Plan(table, sites)), which=RandomTokens(spatial_bonus=None), where="feed-forward")
    with dittocache.enable(model, recipe) as cache, tiny.Counter(model) as counter:
        tiny.predictions(model, cache, 3)
        assert np.array_equal(cache.trace.table, table)
    assert [counter.calls[s] for s in sites] == [[16, 4, 16], [16, 8, 1], [16, 12]]
    assert counter.calls["transformer_blocks.0.attn1"] == [16] * 3


def test_sites_that_a_plan_does_not_name_are_computed():
    model = tiny.dit()
    plan = Plan([[1], [0], [0]], ("transformer_blocks.1.attn1",))
    with dittocache.enable(model, plan) as cache, tiny.Counter(model) as counter:
        tiny.predictions(model, cache, 3)
    assert {name: len(calls) for name, calls in counter.calls.items() if len(calls) != 3} == {
        "transformer_blocks.1.attn1": 1
    }


def test_a_plan_that_begins_with_reuse_computes_what_it_must():
    """There is nothing to reuse yet: computed, and the trace says so."""
    model = tiny.dit()
    sites = tuple(s.name for s in dittocache.describe(model).sites if s.kind != "stack")
    plan = Plan(np.zeros((3, 6)), sites)
    (expected,) = tiny.predictions(model, None, steps=1, frozen=True)
    with dittocache.enable(model, plan) as cache:
        for output in tiny.predictions(model, cache, 3, frozen=True):
            assert tiny.relative(output, expected) < 1e-5
        assert cache.trace.table.tolist() == [[1] * 6, [0] * 6, [0] * 6]


def test_align_puts_columns_into_order():
    sites = dittocache.describe(tiny.dit()).sites
    plan = Plan([[0.5, 0.0]], (sites[3].name, sites[0].name))
    assert align(plan, sites).tolist() == [[0, 1, 1, 0.5, 1, 1, 1]]
    with pytest.raises(ValueError, match=r"'nowhere' is not in this model.*transformer_blocks.0.attn1"):
        align(Plan([[1.0]], ("nowhere",)), sites)
