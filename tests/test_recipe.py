"""Recipes and the registry of methods: words, files, round trips."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import dittocache
from dittocache import Plan, Recipe, recipe
from dittocache.fill import Hold
from dittocache.when import Counter, DualInterval, Every, ModuleIntervals, SoftInterval, Table
from dittocache.which import SELECTORS, ValueNorm, Which

PLAN = Plan(
    [[1, 1], [0.25, 0]], ("transformer_blocks.0.ff", "transformer_blocks.0.attn1"), kinds=("feed-forward", "attention")
)
RECIPES = {
    **{name: recipe(name, **tiny.data_for(name)) for name in dittocache.methods()},
    "fora-5-start": recipe("fora", interval=5, anchor="start"),
    **{f"toca-{s}": recipe("toca", selector=s, ratio=0.2) for s in SELECTORS},
    "toca-none": recipe("toca", spatial_bonus=None, sensitive_window=None, module_ratio_factor=1.0, layer_divisor=27),
    "toca-window": recipe("toca", sensitive_window=[0.1, 0.9]),
    "toca-ratio0": recipe("toca", ratio=0),
    "duca-value-norm": recipe("duca", selector="value-norm", interval=5),
    "table": Recipe(when=Table(Plan(np.eye(2), ("a", "b")))),
    "table-which": Recipe(when=Table(PLAN), which=ValueNorm(ratio=0.5)),
    "counter": Recipe(when=Counter(4, 3), which=ValueNorm(), where="feed-forward"),
    "modules": Recipe(when=ModuleIntervals(2, 4, 3, 1), where="attention", provenance={"model": "x", "tokens": [1, 2]}),
    "mix": Recipe(when=DualInterval(4, 0.2, (0.1, 0.3), False, "up"), which=ValueNorm(0.05), fill=Hold()),
}


# ---- the registry ---------------------------------------------------------------------------------------------------
def test_methods_are_documented():
    known = dittocache.methods()
    assert set(known) >= {"none", "fora", "toca", "duca"}
    for name, method in known.items():
        assert (
            method.name == name
            and method.title
            and method.summary
            and method.needs in ("nothing", "calibration", "training")
        )
        if name not in ("none", "fbcache"):  # that one was published as code
            assert method.arxiv and method.arxiv in method.bibtex
        assert method.bibtex or name == "none"
        for p in method.parameters.values():
            kinds = ("int", "float", "bool", "choice", "pair", "steps", "numbers", "reals", "data")
            assert p.help and p.valid and p.type in kinds
            p.check(p.default)
        for settings in method.settings.values():
            needed = tiny.data_for(name) if settings.get("base") != "l2c" else tiny.data_for("l2c")
            method(**{**needed, **settings} if settings.get("rank") is None else {**settings, **needed, "rank": 2})
        assert method(**tiny.data_for(name)).method == name


def test_defaults_are_the_papers():
    """specs: FORA 3; ToCa N 3, R 0.07, w 0.25, s4 0.6; DuCa N 3, R 0.05, s4 0.8."""
    assert recipe("fora").when == Every(3, "end")
    toca, duca = recipe("toca"), recipe("duca")
    assert toca.when == SoftInterval(3, 0.4, (0.2, 0.4), True) and duca.when == DualInterval(3, 0.4, (0.2, 0.4), True)
    assert (toca.which.ratio, toca.which.soft_weight, toca.which.spatial_bonus, toca.which.spatial_grid) == (
        0.07,
        0.25,
        0.6,
        2,
    )
    assert (duca.which.ratio, duca.which.spatial_bonus, duca.which.name) == (0.05, 0.8, "attention")


def test_ratio_zero_keeps_the_interval():
    """specs/toca.md: a = 0 and no window if R = 0."""
    when = recipe("toca", ratio=0).when
    assert when.warp == 0 and when.sensitive_window is None
    assert {when.interval_at(i, 50) for i in range(50)} == {3}


def test_one_line_in_words():
    assert recipe("fora").describe() == "fora"
    assert recipe("toca", ratio=0.2).describe() == "toca(ratio=0.2)"
    assert RECIPES["mix"].describe() == "module: DualInterval + ValueNorm + Hold"
    for r in RECIPES.values():
        assert r.describe() and "\n" not in r.describe()


def test_design_s_own_examples():
    """Any when goes with any which and fill."""
    from dittocache.which import AttentionReceived

    model = tiny.dit()
    for r in (
        Recipe(where="module", when=DualInterval(3), which=AttentionReceived(0.05), fill=Hold()),
        Recipe(when=SoftInterval(3), which=SELECTORS["value-norm"](0.3)),
        Recipe(when=Counter(3), which=ValueNorm(0.3)),
    ):
        with dittocache.enable(model, r) as cache:
            tiny.predictions(model, cache, 8)
            assert cache.trace.compute_fraction < 1


def test_where():
    model = tiny.pixart()
    for where, kinds in (
        ("module", {"attention", "cross-attention", "feed-forward"}),
        ("attention", {"attention", "cross-attention"}),
        ("feed-forward", {"feed-forward"}),
    ):
        with dittocache.enable(model, Recipe(when=Every(3), where=where)) as cache, tiny.Counter(model) as counter:
            tiny.predictions(model, cache, 7)
            assert set(cache.trace.kinds) == kinds
        skipped = {name.rpartition(".")[2] for name, calls in counter.calls.items() if len(calls) == 3}
        computed = {name.rpartition(".")[2] for name, calls in counter.calls.items() if len(calls) == 7}
        assert (
            skipped
            == {"attention": {"attn1", "attn2"}, "feed-forward": {"ff"}, "module": {"attn1", "attn2", "ff"}}[where]
        )
        assert skipped | computed == {"attn1", "attn2", "ff"}


# ---- round trips ----------------------------------------------------------------------------------------------------
def same(a: Recipe, b: Recipe) -> bool:
    return all(getattr(a, n) == getattr(b, n) for n in ("when", "which", "fill", "fix", "where", "method", "params"))


@pytest.mark.parametrize("name", RECIPES)
def test_dictionary_round_trip(name):
    r = RECIPES[name]
    data = r.to_dict()
    text = json.dumps(data, allow_nan=False)
    again = Recipe.from_dict(json.loads(text))
    assert same(again, r) and again == r
    assert again.to_dict() == data and again.describe() == r.describe()


@pytest.mark.parametrize("name", RECIPES)
def test_saved_and_loaded(name, tmp_path):
    r = RECIPES[name]
    r.save_pretrained(tmp_path / "a" / "b")
    again = Recipe.from_pretrained(tmp_path / "a" / "b")
    assert same(again, r)
    assert again.provenance["dittocache"] == dittocache.__version__ and again.provenance.items() >= r.provenance.items()
    assert same(Recipe.from_pretrained(str(tmp_path / "a" / "b")), r)
    again.save_pretrained(tmp_path / "c")
    assert Recipe.from_pretrained(tmp_path / "c") == again
    assert {p.suffix for p in (tmp_path / "c").iterdir()} <= {".json", ".safetensors", ".md", ".png"}


def test_shares_survive_files_exactly(tmp_path):
    """A third of the tokens is a third of the tokens afterwards."""
    r = Recipe(when=Table(Plan([[1.0], [1 / 3], [5 / 49]], ("transformer_blocks.0.ff",))), which=ValueNorm())
    r.save_pretrained(tmp_path)
    assert np.allclose(Recipe.from_pretrained(tmp_path).when.plan.table, r.when.plan.table, atol=1e-6)
    for tokens in (3, 49, 256, 4096):
        for share in (1 / 3, 5 / 49, 1 / tokens):
            assert round(round(share, 6) * tokens) == round(share * tokens)


@given(
    interval=st.integers(1, 9),
    ratio=st.floats(0, 1),
    selector=st.sampled_from(sorted(SELECTORS)),
    weight=st.floats(0, 10),
    bonus=st.none() | st.floats(0, 3),
    grid=st.integers(1, 8),
    warp=st.floats(0, 0.95),
    window=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    factor=st.none() | st.floats(-5, 5),
    divisor=st.none() | st.integers(1, 40),
    quirk=st.booleans(),
    share=st.booleans(),
    name=st.sampled_from(["toca", "duca"]),
)
def test_every_valid_parameter_survives(
    interval, ratio, selector, weight, bonus, grid, warp, window, factor, divisor, quirk, share, name
):
    r = recipe(
        name,
        interval=interval,
        ratio=ratio,
        selector=selector,
        soft_weight=weight,
        spatial_bonus=bonus,
        spatial_grid=grid,
        interval_warp=warp,
        sensitive_window=window,
        module_ratio_factor=factor,
        layer_divisor=divisor,
        per_block_kind=quirk,
        share_guidance_indices=share,
    )
    assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    if ratio > 0:
        assert r.which.ratio == ratio and r.when.interval == interval and r.which.interval == interval


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fora", {"interval": np.int64(4)}),
        ("toca", {"ratio": np.float32(0.5), "interval": np.int32(3), "per_block_kind": np.bool_(False)}),
        ("toca", {"sensitive_window": (np.float64(0.1), np.float32(0.25)), "spatial_bonus": np.float16(0.5)}),
    ],
)
def test_numbers_of_numpy_are_numbers(name, params, tmp_path):
    """As they come out of a loop over np.arange, say."""
    r = recipe(name, **params)
    r.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert same(again, r)
    assert json.loads(json.dumps(r.to_dict())) == r.to_dict()


@pytest.mark.parametrize("name", ["fora", "toca", "duca", "duca-value-norm", "table-which"])
def test_a_loaded_recipe_works_like_the_saved_one(name, tmp_path):
    model, r = tiny.dit(), RECIPES[name]
    steps = 2 if name == "table-which" else 9
    with dittocache.enable(model, r) as cache:
        expected = tiny.predictions(model, cache, steps)
        trace = cache.trace
    r.save_pretrained(tmp_path)
    for target in (str(tmp_path), tmp_path, Recipe.from_pretrained(tmp_path)):
        with dittocache.enable(model, target) as cache:
            assert all(torch.equal(a, b) for a, b in zip(tiny.predictions(model, cache, steps), expected, strict=True))
            assert cache.trace == trace


def test_provenance_is_free(tmp_path):
    given_provenance = {
        "model": "me/x",
        "steps": 50,
        "labels": [["a", "b"], ["c"]],
        "grid": [[1, 2], [3, 4]],
        "nested": {"x": None, "array": "y"},
    }
    r = Recipe(when=Every(2), provenance=given_provenance)
    r.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert {k: again.provenance[k] for k in given_provenance} == given_provenance


def test_from_the_hub(monkeypatch, tmp_path):
    """The folder that the Hub's client hands back is read; its errors become one line."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    RECIPES["toca"].save_pretrained(tmp_path)
    for function in ("snapshot_download", "hf_hub_download"):
        answer = str(tmp_path) if function == "snapshot_download" else str(tmp_path / "recipe.json")
        monkeypatch.setattr(huggingface_hub, function, lambda *a, answer=answer, **k: answer)
    assert same(Recipe.from_pretrained("someone/recipe"), RECIPES["toca"])

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("first line\nsecond line\n\nthird")

    for function in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, function, fail)
    with pytest.raises(ValueError, match="'someone/recipe'") as e:
        Recipe.from_pretrained("someone/recipe")
    assert "\n" not in str(e.value)


# ---- nothing that is passed is mutated ------------------------------------------------------------------------------
def test_what_is_passed_is_not_mutated():
    params = {"interval": 4, "sensitive_window": [0.1, 0.2], "selector": "random"}
    before = json.dumps(params)
    r = recipe("toca", **params)
    model = tiny.dit()
    text = json.dumps(r.to_dict())
    for target in (model, tiny.pipeline()):
        with dittocache.enable(target, r):
            pass
        with dittocache.enable(target, "toca", **params):
            pass
    with dittocache.enable(model, r) as cache:
        tiny.predictions(model, cache, 6)
    assert json.dumps(params) == before and json.dumps(r.to_dict()) == text
    data = r.to_dict()
    kept = json.dumps(data)
    Recipe.from_dict(data)
    assert json.dumps(data) == kept


def test_the_caller_s_later_changes_do_not_reach_a_recipe():
    window, provenance = [0.1, 0.2], {"model": "x"}
    r = recipe("toca", sensitive_window=window)
    with_window = SoftInterval(3, sensitive_window=window)
    with_provenance = Recipe(when=Every(3), provenance=provenance)
    window[1], provenance["model"] = 0.9, "y"
    assert tuple(r.when.sensitive_window) == (0.1, 0.2) == tuple(r.params["sensitive_window"])
    assert tuple(with_window.sensitive_window) == (0.1, 0.2)
    assert with_provenance.provenance == {"model": "x"}
    r.to_dict()["params"]["interval"] = 99
    assert r.params["interval"] == 3


def test_one_recipe_on_two_models():
    """A recipe is not changed by being used."""
    r = recipe("toca", selector="random", ratio=0.3, ratio_schedule="constant")
    first, second = tiny.dit(0), tiny.pixart(1)
    with dittocache.enable(first, r) as a, dittocache.enable(second, r) as b:
        one, two = tiny.predictions(first, a, 8), tiny.predictions(second, b, 8)
        again = tiny.predictions(first, a, 8), tiny.predictions(second, b, 8)
    for x, y in zip((*one, *two), (*again[0], *again[1]), strict=True):
        assert torch.equal(x, y)


def test_methods_returns_a_copy():
    dittocache.methods().clear()
    assert "fora" in dittocache.methods()


def test_bare_interfaces_are_no_answers():
    """`Which` itself cannot score tokens; it is refused at once, not in the middle of a run."""
    with pytest.raises(ValueError, match="which must be one of") as e:
        Recipe(when=Every(3), which=Which())
    assert "\n" not in str(e.value)


def test_other_parameters_with_the_same_tensors():
    """What is changed shows in words and files; tensors, provenance and made_for stay."""
    for name, change, where in (
        ("eoc", {"theta": 0.3}, lambda r: r.fill.theta == 0.3),
        ("l2c", {"threshold": 0.9}, lambda r: r.when.threshold == 0.9),
        ("icc", {"period": 4}, lambda r: r.when.interval == 4),
        ("goc", {"eta": 0.5}, lambda r: r.fill.eta == 0.5),
    ):
        first = dataclasses.replace(recipe(name, **tiny.data_for(name)), provenance={"a": 1}, made_for={"model": "X"})
        other = first.with_params(**change)
        ((parameter, value),) = change.items()
        assert where(other) and f"{parameter}={value}" in other.describe() and other.params[parameter] == value
        assert other.provenance == {"a": 1} and other.made_for == {"model": "X"}
        assert other.with_params(**{parameter: first.params[parameter]}) == first
    on_l2c = recipe("eoc", **tiny.data_for("eoc"), router_logits=tiny.data_for("l2c")["router_logits"])
    assert on_l2c.with_params(theta=0.5).when == on_l2c.when
    with pytest.raises(ValueError, match="eoc has no parameter 'eta'"):
        on_l2c.with_params(eta=0.5)
    with pytest.raises(ValueError, match="only a method's recipe has parameters"):
        RECIPES["mix"].with_params(interval=3)
