"""Bad input: one clear line each, and nothing changed."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import sys
import warnings

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pipelines import CASES, run
from safetensors.torch import save_file
from torch import nn

import dittocache
from dittocache import Plan, Recipe, origin, recipe
from dittocache.fill import GradientQueue, LowRankIncrement, Trend
from dittocache.fix import NoiseScale
from dittocache.tensors import Tensors
from dittocache.when import Every, SoftInterval, Table
from dittocache.which import ValueNorm


@contextlib.contextmanager
def one_line(*words, error=ValueError):
    """The block raises one line that holds these words."""
    with pytest.raises(error) as e:
        yield
    text = str(e.value)
    assert text and "\n" not in text, text
    for word in words:
        assert word in text, f"{word!r} is missing in: {text}"


@pytest.fixture
def shared():
    """A model with a cache on, and what it draws: both must outlive every error."""
    model, scheduler = tiny.dit(), DDIMScheduler()
    cache = dittocache.enable(model, "fora", scheduler=scheduler)
    expected = tiny.sample(model, scheduler, 4)
    yield model, scheduler, cache, expected, tiny.fingerprint(model)
    cache.disable()


@contextlib.contextmanager
def nothing_changed(shared):
    model, scheduler, cache, expected, before = shared
    yield model
    assert tiny.fingerprint(model) == before and cache.enabled
    assert torch.equal(tiny.sample(model, scheduler, 4), expected)
    assert cache.trace.compute_fraction < 0.9


# ---- names ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["", "foraa", "FORA", "fora ", "none\n", "../fora", "teacach\u00e9"])
def test_unknown_method(shared, name):
    with nothing_changed(shared) as model, one_line(repr(name)):
        dittocache.enable(model, name)
    with one_line("unknown method", repr(name), "fora", "toca", "duca"):
        recipe(name)


@pytest.mark.parametrize(
    "what", [None, 3, 0.5, ["fora"], {"interval": 3}, Every(3), torch.zeros(2)], ids=lambda v: type(v).__name__
)
def test_not_a_recipe(shared, what):
    with nothing_changed(shared) as model, one_line(type(what).__name__, "Recipe", error=(TypeError, ValueError)):
        dittocache.enable(model, what)
    with one_line("unknown method", "fora"):
        recipe(what)


@pytest.mark.parametrize("method", ["none", "fora", "toca", "duca"])
@given(name=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20))
def test_unknown_parameter(method, name):
    known = dittocache.methods()[method].parameters
    assume(name not in known and name != "name")
    with one_line(method, repr(name), *(known or ["none"])):
        recipe(method, **{name: 3})


def test_unknown_parameter_changes_nothing(shared):
    with nothing_changed(shared) as model, one_line("toca", "'intervall'", "interval", "ratio"):
        dittocache.enable(model, "toca", intervall=4)


@pytest.mark.parametrize(
    "what", [Recipe(when=Every(3)), Plan([[1.0]], ("a",)), "some/folder"], ids=["recipe", "plan", "folder"]
)
def test_parameters_without_a_method(shared, what):
    with nothing_changed(shared) as model, one_line("'interval'", "fora"):
        dittocache.enable(model, what, interval=3)


# ---- values ---------------------------------------------------------------------------------------------------------
NOT_NUMBERS = [
    None,
    True,
    False,
    "3",
    "",
    "three",
    [],
    [3],
    (3,),
    {},
    {3},
    object,
    3j,
    b"3",
    np.array([1, 2]),
    np.array([[1], [2]]),
    torch.tensor([[3], [4]]),
]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")]
INTS = {
    "fora": ["interval"],
    "toca": ["interval", "spatial_grid", "layer_divisor"],
    "duca": ["interval", "spatial_grid", "layer_divisor"],
}
NUMBERS = {
    "ratio": (0, 1),
    "soft_weight": (0, math.inf),
    "spatial_bonus": (0, math.inf),
    "interval_warp": (0, 0.95),
    "module_ratio_factor": (-math.inf, math.inf),
}
OPTIONAL = {"layer_divisor", "spatial_bonus", "module_ratio_factor", "sensitive_window"}
INT_PAIRS = [(m, p) for m, ps in INTS.items() for p in ps]


@pytest.mark.parametrize(("method", "name"), INT_PAIRS)
@given(
    value=st.one_of(
        st.integers(max_value=0), st.floats(), st.text(max_size=5), st.sampled_from(NOT_NUMBERS + NOT_FINITE)
    )
)
@example(3.0)
@example(-(10**400))
def test_whole_numbers(method, name, value):
    assume(not (value is None and name in OPTIONAL))
    with one_line(name, "1 or more"):
        recipe(method, **{name: value})


@pytest.mark.parametrize("method", ["toca", "duca"])
@pytest.mark.parametrize("name", NUMBERS)
@given(
    value=st.one_of(
        st.floats(), st.integers(-(10**30), 10**30), st.text(max_size=5), st.sampled_from(NOT_NUMBERS + NOT_FINITE)
    )
)
@example(float("nan"))
@example(10**400)
@example(-(10**400))
@example(-1e-300)
@example(1.0000000000000002)
def test_numbers(method, name, value):
    low, high = NUMBERS[name]
    number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    inside = number and low <= value <= high and abs(value) <= sys.float_info.max
    if inside or (value is None and name in OPTIONAL):
        recipe(method, **{name: value})
    else:
        with one_line(name):
            recipe(method, **{name: value})


@pytest.mark.parametrize("name", ["per_block_kind", "share_guidance_indices"])
@pytest.mark.parametrize("value", [0, 1, None, "True", "", 1.0, [], float("nan")], ids=repr)
def test_true_or_false(name, value):
    with one_line(name, "True or False", repr(value)):
        recipe("toca", **{name: value})


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        True,
        "ab",
        "0.2,0.4",
        (),
        (0.2,),
        (0.2, 0.3, 0.4),
        (0.4, 0.2),
        (-0.1, 0.2),
        (0.2, 1.1),
        (0, float("nan")),
        ("0.2", "0.4"),
        (None, None),
        (True, False),
        {"low": 0.2, "high": 0.4},
        [[0.1, 0.2]],
        np.zeros((3, 2)),
    ],
    ids=repr,
)
def test_windows(value):
    with one_line("sensitive_window"):
        recipe("toca", sensitive_window=value)
    with one_line("sensitive_window"):
        SoftInterval(3, sensitive_window=value)


CHOICES = {"selector": "value-norm", "ratio_schedule": "ddim50"}


@pytest.mark.parametrize("name", CHOICES)
@given(
    value=st.one_of(
        st.text(max_size=12),
        st.integers(),
        st.none(),
        st.sampled_from([["attention"], {"a": 1}, True, b"attention", "Attention", "attention "]),
    )
)
def test_choices(name, value):
    assume(value not in ("attention", "random", "norm", "constant", "linear", "exp"))
    with one_line(name, CHOICES[name], repr(value)):
        recipe("toca", **{name: value})


@pytest.mark.parametrize("anchor", ["", "END", "middle", None, 0, True])
def test_anchor(anchor):
    with one_line("anchor", "end", "start", repr(anchor)):
        recipe("fora", anchor=anchor)


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("fora", {"interval": 0}, ["interval", "0"]),
        ("fora", {"interval": True}, ["interval", "True"]),
        ("fora", {"interval": "3"}, ["interval", "'3'"]),
        ("toca", {"ratio": 1.01}, ["ratio", "1.01"]),
        ("toca", {"ratio": float("nan")}, ["ratio", "nan"]),
        ("toca", {"ratio": -0.1}, ["ratio", "-0.1"]),
        ("duca", {"ratio": float("inf")}, ["ratio", "inf"]),
        ("duca", {"selector": "best"}, ["selector", "'best'", "attention", "value-norm", "random"]),
        ("toca", {"ratio_schedule": "cosine"}, ["ratio_schedule", "'cosine'", "ddim50"]),
    ],
)
def test_bad_values_change_nothing(shared, method, params, words):
    with nothing_changed(shared) as model, one_line(*words):
        dittocache.enable(model, method, **params)


@given(value=st.sampled_from([0, -1, 2.5, True, None, "3", float("nan")]))
def test_parts_check_their_own_parameters(value):
    with one_line("interval"):
        Every(value)
    with one_line("interval"):
        SoftInterval(value)
    with one_line("interval"):
        ValueNorm(interval=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("when", None),
        ("when", "fora"),
        ("when", ValueNorm()),
        ("which", Every(3)),
        ("which", "attention"),
        ("fill", "hold"),
        ("fill", None),
        ("fix", 3),
        ("where", "everywhere"),
        ("where", None),
        ("where", 3),
    ],
)
def test_parts_of_the_wrong_sort(name, value):
    with one_line(name, "must be one of"):
        Recipe(**({"when": Every(3)} | {name: value}))


# ---- targets --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "target", [None, 3, "model", [], {}, DiTTransformer2DModel, DDIMScheduler()], ids=lambda v: type(v).__name__
)
def test_not_a_target(target):
    with one_line(type(target).__name__, "pipeline", error=TypeError):
        dittocache.enable(target, "fora")
    dittocache.disable(target)  # harmless


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.TransformerEncoderLayer(8, 2, 8)],
    ids=lambda m: type(m).__name__,
)
def test_a_module_without_blocks(module):
    before = tiny.fingerprint(module)
    with one_line(type(module).__name__, "nothing to cache"):
        dittocache.enable(module, "fora")
    assert tiny.fingerprint(module) == before


def test_a_pipeline_without_a_transformer():
    from diffusers import DiffusionPipeline

    class Empty(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    pipe = Empty(DDIMScheduler())
    with one_line("Empty", "transformer"):
        dittocache.enable(pipe, "fora")
    assert type(pipe) is Empty and type(pipe.scheduler) is DDIMScheduler


@pytest.mark.parametrize("missing", ["all", "one", "of the second"])
def test_a_half_loaded_model(missing):
    """Weights on the meta device have no values; a pipeline's second network counts, too."""
    case = CASES["wan-2.2"]
    pipe = case.build(0)
    model = pipe.transformer_2 if missing == "of the second" else pipe.transformer
    if missing == "all":
        model.to("meta")
    else:
        projection = model.blocks[1].attn1.to_q
        weight, projection.weight = projection.weight, nn.Parameter(projection.weight.to("meta"))
    before = tiny.fingerprint(pipe.transformer), tiny.fingerprint(pipe.transformer_2), type(pipe), type(pipe.scheduler)
    with one_line("meta device", "WanTransformer3DModel", "load"):
        dittocache.enable(pipe, "fora", interval=2)
    after = tiny.fingerprint(pipe.transformer), tiny.fingerprint(pipe.transformer_2), type(pipe), type(pipe.scheduler)
    assert after == before
    if missing != "all":
        projection.weight = weight
        assert torch.equal(run(case, pipe, steps=3), run(case, case.build(0), steps=3))
        with dittocache.enable(pipe, "fora", interval=2) as cache:
            run(case, pipe, steps=6)
            assert cache.trace.compute_fraction < 1


@pytest.mark.parametrize(
    "scheduler", [3, "ddim", DDIMScheduler, object()], ids=lambda v: getattr(v, "__name__", type(v).__name__)
)
def test_not_a_scheduler(shared, scheduler):
    with nothing_changed(shared) as model, one_line("scheduler", "set_timesteps", error=TypeError):
        dittocache.enable(model, "fora", scheduler=scheduler)


# every cache that diffusers has, as far as this version of it has it
FOREIGN = {
    "FirstBlockCacheConfig": {"threshold": 0.1},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "current_timestep_callback": lambda: 500,
    },
    "FasterCacheConfig": {"current_timestep_callback": lambda: 500, "is_guidance_distilled": True},
    "MagCacheConfig": {"calibrate": True},
    "TaylorSeerCacheConfig": {},
    "TextKVCacheConfig": {},
    "SeaCacheConfig": {},
}


def test_all_caches_of_diffusers_are_known():
    assert {name for name in dir(diffusers) if name.endswith(("CacheConfig", "BroadcastConfig"))} <= set(FOREIGN)


@pytest.mark.parametrize("order", ["before", "while"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_diffusers_cache_on_the_same_model(name, order):
    """Whichever came first: both would skip blocks, and neither could know."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    model, plain = tiny.flux(), tiny.predictions(tiny.flux(), None, 4)
    config = getattr(diffusers, name)(**FOREIGN[name])
    refused = one_line("diffusers cache is already on", "disable_cache", error=RuntimeError)
    if order == "before":
        model.enable_cache(config)
        before = tiny.fingerprint(model)
        with refused:
            dittocache.enable(model, "fora")
        assert tiny.fingerprint(model) == before
        model.disable_cache()
        cache = dittocache.enable(model, "fora")
    else:
        cache = dittocache.enable(model, "fora")
        model.enable_cache(config)
        with refused:
            cache.run(4)
        model.disable_cache()
    tiny.predictions(model, cache, 4)
    assert cache.trace.compute_fraction < 1
    cache.disable()
    assert all(torch.equal(a, b) for a, b in zip(tiny.predictions(model, None, 4), plain, strict=True))


def test_a_diffusers_cache_that_comes_on_under_a_pipeline():
    case = CASES["flux"]
    pipe = case.build(0)
    with dittocache.enable(pipe, "fora", interval=2) as cache:
        cached = run(case, pipe, steps=4)
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        with one_line("diffusers cache is already on", "fbc_", error=RuntimeError):
            run(case, pipe, steps=4)
        pipe.transformer.disable_cache()
        # it leaves its wrappers behind, under which blocks take their own way, not the shortcut
        assert tiny.relative(run(case, pipe, steps=4), cached) < 1e-5 and cache.trace.compute_fraction < 1


def test_an_error_leaves_no_hook_on_a_fresh_model(model):
    before, plain = tiny.fingerprint(model), tiny.sample(model, steps=2)
    bad = [
        ("nothing", {}),
        ("fora", {"interval": 0}),
        ("toca", {"selector": "x"}),
        ("fora", {"scheduler": 3}),
        (Plan([[0.0]], ("nowhere",)), {}),
        (Plan([[0.5]], ("transformer_blocks.0.ff",)), {}),
        (7, {}),
    ]
    for what, params in bad:
        with pytest.raises((ValueError, TypeError)):
            dittocache.enable(model, what, **params)
    assert tiny.fingerprint(model) == before and not tiny.traces_of_cache(model)
    assert torch.equal(tiny.sample(model, steps=2), plain)


def test_an_error_leaves_a_pipeline_and_its_cache_alone(pipe):
    cache = dittocache.enable(pipe, "fora")
    expected, before = tiny.draw(pipe), tiny.fingerprint(pipe)
    for what, params in [("nothing", {}), ("toca", {"ratio": 2}), (Plan([[0.0]], ("nowhere",)), {}), ("./missing", {})]:
        with pytest.raises(ValueError):
            dittocache.enable(pipe, what, **params)
        assert tiny.fingerprint(pipe) == before and cache.enabled
        assert torch.equal(tiny.draw(pipe), expected)
    cache.disable()


# ---- plans ----------------------------------------------------------------------------------------------------------
SITES = tuple(f"transformer_blocks.{n}.{m}" for n in range(3) for m in ("attn1", "ff"))


def test_a_plan_for_other_sites(shared):
    with (
        nothing_changed(shared) as model,
        one_line("'single_transformer_blocks.0.proj_out'", "transformer_blocks.0.attn1"),
    ):
        dittocache.enable(model, Plan([[1.0]], ("single_transformer_blocks.0.proj_out",)))


def test_a_plan_for_another_number_of_steps(pipe):
    plan = Plan(np.ones((4, 6)), SITES)
    plain = tiny.draw(pipe, 4), tiny.draw(pipe, 6)
    with dittocache.enable(pipe, plan) as cache:
        with one_line("4 steps", "6"):
            tiny.draw(pipe, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(tiny.draw(pipe, 4), plain[0])
        with one_line("4 steps", "7"):
            cache.run(7)
    assert torch.equal(tiny.draw(pipe, 6), plain[1]) and not tiny.traces_of_cache(pipe.transformer)


def test_a_partial_plan_without_a_selector(shared):
    plan = Plan(np.full((4, 6), 0.5), SITES)
    with nothing_changed(shared) as model, one_line("which", "ValueNorm"):
        dittocache.enable(model, plan)


def test_a_partial_plan_of_what_is_not_token_wise(shared):
    recipe_of = Recipe(when=Table(Plan([[1.0], [0.5]], ("transformer_blocks.0.attn1",))), which=ValueNorm())
    with nothing_changed(shared) as model, one_line("'transformer_blocks.0.attn1'", "token-wise"):
        dittocache.enable(model, recipe_of)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"where": "modul"}, ("'modul'", "module", "stack", "tail", "model", "pattern")),
        ({"where": None}, ("None", "module", "pattern")),
        ({"keeps": "changes"}, ("'changes'", "output", "change")),
        ({"where": "module", "keeps": "change"}, ("block, stack, tail", "'module'")),
        ({"where": "model", "keeps": "change"}, ("block, stack, tail", "'model'")),
        ({"where": "tail"}, ("tail", "keeps='change'")),
    ],
)
def test_where_and_what_is_kept(fields, words):
    with one_line(*words):
        Recipe(when=Every(3), **fields)


def test_a_pattern_that_matches_nothing(shared):
    recipe_of = Recipe(when=Every(3), where="transformer_blocks.*.attn9")
    with nothing_changed(shared) as model, one_line("'transformer_blocks.*.attn9'", "'transformer_blocks.0.attn1'"):
        dittocache.enable(model, recipe_of)


def test_a_pattern_chooses_sites():
    model = tiny.dit()
    with dittocache.enable(model, Recipe(when=Every(2), where="transformer_blocks.[01].ff")) as cache:
        tiny.predictions(model, cache, 4)
        assert cache.trace.sites == ("transformer_blocks.0.ff", "transformer_blocks.1.ff")
        assert (cache.trace.table[[1, 3]] == 1).all() and (cache.trace.table[2] == 0).all()


def test_a_time_embedding_that_is_not_there():
    model = tiny.uvit()
    words = ("time embedding", "UViTBlock", "indicator='modulated'")
    with dittocache.enable(model, "teacache", indicator="embedding") as cache, one_line(*words, error=RuntimeError):
        tiny.predictions(model, cache, 3)


def test_a_where_that_matches_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})])

    with one_line("'attention'", "Net", "feed-forward"):
        dittocache.enable(Net(), Recipe(when=Every(3), where="attention"))
    with one_line("attention", "Net"):
        dittocache.enable(Net(), "toca", selector="attention")


# ---- saved recipes --------------------------------------------------------------------------------------------------
GOOD = recipe("toca", ratio=0.2, selector="value-norm")
TEXT = json.dumps(GOOD.to_dict(), indent=2)


def write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def replaced(**changes):
    """The good recipe with entries replaced; `when.interval` is spelt `when__interval`."""
    data = json.loads(TEXT)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = data
        for p in parents:
            inner = inner[p]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return json.dumps(data)


NAN = float("nan")
PLAN = Plan([[1.0]], ("a",)).to_dict()


def with_table(table):
    """The good recipe with a plan in place of its schedule, and this in place of the plan's table."""
    return replaced(when={"type": "Table", "plan": PLAN | {"table": table}})


DAMAGED = {
    "empty": ("", ["damaged"]),
    "blank": (" \n", ["damaged"]),
    "not JSON": ("interval: 3", ["damaged"]),
    "not text": (b"\xff\xfe\x00\x81", ["damaged"]),
    "a list": ("[1, 2]", ["not a recipe", "list"]),
    "a number": ("3", ["not a recipe", "int"]),
    "null": ("null", ["not a recipe"]),
    "nested too deep": ("[" * 100_000, ["damaged"]),
    "no format": (replaced(format=...), ["not a recipe", "None"]),
    "another format": (replaced(format="peft-1"), ["not a recipe", "'peft-1'", "dittocache-recipe-1"]),
    "a newer format": (replaced(format="dittocache-recipe-2"), ["dittocache-recipe-2"]),
    "no when": (replaced(when=...), ["when"]),
    "when null": (replaced(when=None), ["when"]),
    "when text": (replaced(when="every"), ["when", "'every'"]),
    "when empty": (replaced(when={}), ["when"]),
    "unknown when": (replaced(when__type="Evry"), ["'Evry'", "Every"]),
    "a which for a when": (replaced(when={"type": "ValueNorm"}), ["'ValueNorm'", "Every"]),
    "unknown which": (replaced(which__type="KeyNorm"), ["'KeyNorm'", "ValueNorm"]),
    "an interface for a which": (replaced(which__type="Which"), ["'Which'"]),
    "unknown fill": (replaced(fill__type="Taylor99"), ["'Taylor99'", "Hold"]),
    "unknown fix": (replaced(fix={"type": "Noise"}), ["'Noise'"]),
    "unknown key": (replaced(when__intervall=3), ["'intervall'", "interval"]),
    "unknown key at the top": (replaced(wherre="module"), ["'wherre'", "where"]),
    "nan": (replaced(when__warp=NAN), ["interval_warp", "nan"]),
    "nan ratio": (replaced(which__ratio=NAN), ["ratio", "nan"]),
    "infinite weight": (replaced(which__soft_weight=float("inf")), ["soft_weight", "inf"]),
    "text interval": (replaced(when__interval="3"), ["interval", "'3'"]),
    "bool interval": (replaced(when__interval=True), ["interval", "True"]),
    "list interval": (replaced(when__interval=[3]), ["interval"]),
    "null interval": (replaced(when__interval=None), ["interval", "None"]),
    "huge ratio": (replaced(which__ratio=7), ["ratio", "7"]),
    "window of three": (replaced(when__sensitive_window=[0.1, 0.2, 0.3]), ["sensitive_window"]),
    "window of text": (replaced(when__sensitive_window=["a", "b"]), ["sensitive_window"]),
    "where": (replaced(where="everywhere"), ["where", "'everywhere'", "module"]),
    "where list": (replaced(where=["module"]), ["where"]),
    "params list": (replaced(params=[1]), ["params"]),
    "params null": (replaced(params=None), ["params"]),
    "provenance text": (replaced(provenance="me"), ["provenance"]),
    "method list": (replaced(method=["toca"]), ["method"]),
    "method number": (replaced(method=3), ["method"]),
    "table of text": (replaced(when={"type": "Table", "plan": "x"}), ["plan"]),
    "table without plan": (replaced(when={"type": "Table"}), ["Table"]),
    "table with nan": (with_table([[NAN]]), ["nan"]),
    "table that does not fit": (with_table([[1], [1]]), ["plan"]),
    "array that is not there": (with_table({"array": "x"}), ["damaged"]),
    "array of nothing": (with_table({"array": [1]}), ["damaged"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_recipes(case, tmp_path):
    text, words = DAMAGED[case]
    with one_line(*words):
        Recipe.from_pretrained(write(tmp_path, text))


@pytest.mark.parametrize("case", ["not JSON", "unknown when", "nan", "unknown which", "when null", "method list"])
def test_damaged_recipes_change_nothing(case, shared, tmp_path):
    folder = write(tmp_path / "r", DAMAGED[case][0])
    for target in (folder, str(folder)):
        with nothing_changed(shared) as model, one_line():
            dittocache.enable(model, target)


@given(cut=st.integers(0, len(TEXT) - 1))
def test_truncated_recipes(cut, tmp_path_factory):
    with one_line("damaged"):
        Recipe.from_pretrained(write(tmp_path_factory.mktemp("cut"), TEXT[:cut]))


LEAVES = [
    "format",
    "method",
    "params",
    "where",
    "when",
    "which",
    "fill",
    "fix",
    "provenance",
    "when__type",
    "when__interval",
    "when__warp",
    "when__sensitive_window",
    "when__per_block_kind",
    "when__direction",
    "which__type",
    "which__ratio",
    "which__ratio_schedule",
    "which__layer_divisor",
    "which__interval",
    "which__spatial_bonus",
    "which__spatial_grid",
    "which__share_guidance_indices",
    "fill__type",
    "params__interval",
    "params__selector",
]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(path=st.sampled_from(LEAVES), junk=JUNK)
def test_junk_in_a_recipe_is_a_clear_error_or_a_recipe_that_works(path, junk):
    try:
        found = Recipe.from_dict(json.loads(replaced(**{path: junk})))
    except ValueError as error:
        assert "\n" not in str(error), str(error)
        return
    assert found.describe() and "\n" not in found.describe()
    json.dumps(found.to_dict())
    model = tiny.dit()
    with dittocache.enable(model, found) as cache:
        assert cache.recipe is found


@pytest.mark.parametrize("name", ["./missing", "/nowhere/at/all", "~/x", "a/b/c"])
def test_a_recipe_that_is_not_there(shared, name):
    with nothing_changed(shared) as model, one_line(repr(name)):
        dittocache.enable(model, name)


def test_a_folder_without_a_recipe(shared, tmp_path):
    with nothing_changed(shared) as model, one_line("recipe.json", "missing"):
        dittocache.enable(model, tmp_path)


def test_a_damaged_array_file(shared, tmp_path):
    Recipe(when=Table(Plan(np.ones((4, 6)), SITES))).save_pretrained(tmp_path)
    arrays = [p for p in tmp_path.iterdir() if p.suffix == ".safetensors"]
    assert arrays, "tables are kept as safetensors"
    for content in (b"", b"\x00" * 40, arrays[0].read_bytes()[:-9]):
        arrays[0].write_bytes(content)
        with nothing_changed(shared) as model, one_line("damaged"):
            dittocache.enable(model, tmp_path)
    arrays[0].unlink()
    with nothing_changed(shared) as model, one_line("damaged"):
        dittocache.enable(model, tmp_path)


# ---- calibrated and learned data ------------------------------------------------------------------------------------
DIT = tiny.dit()
L2C, EOC, ICC = (tiny.data_for(name, DIT, 4) for name in ("l2c", "eoc", "icc"))
A, B = "transformer_blocks.0.attn1.to_q/A", "transformer_blocks.0.attn1.to_q/B"


def holed(value):
    return torch.tensor([[value, 1.0]])


BAD_DATA = {
    "nan trend": ("eoc", {"trend": {"a@1": holed(math.nan)}}, ["'a@1'", "1 of 2", "not finite"]),
    "infinite factors": ("icc", {"factor_tensors": {"a/A": holed(math.inf), "a/B": holed(0)}}, ["'a/A'", "not finite"]),
    "nan scores": ("l2c", {"router_logits": holed(-math.inf)}, ["'logits'", "not finite"]),
    "foreign trend": ("eoc", {"trend": {"nowhere@1": holed(0.0)}}, ["'nowhere'", "DiTTransformer2DModel"]),
    "foreign factors": (
        "icc",
        {"factor_tensors": {"x/A": torch.ones(2, 1), "x/B": torch.ones(1, 2)}},
        ["'x'", "linear"],
    ),
    "a module's trend name without a step": ("eoc", {"trend": {"a": holed(0.0)}}, ["SITE@STEP", "'a'"]),
    "a trend of half a step": ("eoc", {"trend": {"a@1.5": holed(0.0)}}, ["SITE@STEP", "'a@1.5'"]),
    "a trend of step 01": ("eoc", {"trend": {"a@01": holed(0.0)}}, ["SITE@STEP", "'a@01'"]),
    "a trend of nothing": ("eoc", {"trend": {"@1": holed(0.0)}}, ["SITE@STEP", "'@1'"]),
    "a flat trend": ("eoc", {"trend": {"a@1": [1.0]}}, ["[tokens, channels]", "[1]"]),
    "uneven trends": ("eoc", {"trend": {"a@1": holed(1.0), "a@2": [[1.0]]}}, ["'a@2'", "[1, 1]", "[1, 2]"]),
    "a number for a trend": ("eoc", {"trend": 3}, ["mapping of names", "3"]),
    "no trend": ("eoc", {}, ["eoc needs a trend"]),
    "no scores": ("l2c", {}, ["l2c needs router_logits"]),
    "no factors": ("icc", {}, ["icc needs factor_tensors", "reuse"]),
    "text for an array": ("eoc", {"trend": {"a@1": "x"}}, ["'a@1'", "'x'"]),
    "complex": ("eoc", {"trend": {"a@1": [[1j]]}}, ["'a@1'", "complex"]),
    "no name": ("eoc", {"trend": {1: [[1.0]]}}, ["name", "1"]),
    "half a pair": ("icc", {"factor_tensors": {"a/A": torch.ones(2, 1)}}, ["'a/A'", "pairs"]),
    "a pair that does not fit": (
        "icc",
        {"factor_tensors": {"a/A": torch.ones(2, 1), "a/B": torch.ones(2, 2)}},
        ["'a/A'", "pairs"],
    ),
    "a third": ("icc", {"factor_tensors": {"a/C": torch.ones(2, 1)}}, ["'a/C'", "pairs"]),
    "another rank": ("icc", {**ICC, "rank": 5}, ["rank is 5", "2"]),
    "rank 0": ("icc", {**ICC, "rank": 0}, ["rank", "1 or more", "0"]),
    "factors of a fourth sort": ("icc", {**ICC, "factors": "pca"}, ["factors", "'pca'", "svd", "reuse"]),
    "columns": ("l2c", {"router_logits": torch.zeros(4, 5)}, ["5 columns", "6 sites"]),
    "a row": ("l2c", {"router_logits": torch.zeros(6)}, ["[rows, sites]", "[6]"]),
    "two tables": ("l2c", {"router_logits": {"a": holed(0.0), "b": holed(0.0)}}, ["'logits'", "'a'"]),
    "threshold": ("l2c", {**L2C, "threshold": 1.5}, ["threshold", "1.5"]),
    "rows": ("l2c", {**L2C, "rows": "inner"}, ["rows", "'inner'", "index", "outer"]),
    "theta": ("eoc", {**EOC, "theta": math.nan}, ["theta", "nan"]),
    "theta inf": ("eoc", {**EOC, "theta": math.inf}, ["theta", "inf"]),
    "eta": ("goc", {"eta": math.inf}, ["eta", "inf"]),
    "eta text": ("goc", {"eta": "1.2"}, ["eta", "'1.2'"]),
    "noise_scale 0": ("eb-cache", {"noise_scale": 0}, ["noise_scale", "above 0"]),
    "noise_scale -1": ("eb-cache", {"noise_scale": -1}, ["noise_scale", "-1"]),
    "noise_scale nan": ("eb-cache", {"noise_scale": math.nan}, ["noise_scale", "nan"]),
    "a base without scores": ("goc", {"base": "l2c"}, ["base", "router_logits"]),
    "scores without a base": ("goc", {"router_logits": torch.zeros(4, 6)}, ["base", "router_logits"]),
    "state 4": ("eb-cache", {"table": (0, 1, 4)}, ["table", "0 to 3", "4"]),
    "state -1": ("eb-cache", {"table": (0, -1)}, ["table", "-1"]),
    "states of text": ("eb-cache", {"table": "012"}, ["table", "'012'"]),
    "table_order": ("eb-cache", {"table_order": "reversed"}, ["table_order", "'reversed'", "sampling", "index"]),
    **{
        f"reuse_steps {value!r:.20}": ("goc", {"reuse_steps": value}, ["reuse_steps", "whole number"])
        for value in ([0], [-1], [1.5], ["1"], "13", 3, {1, 3}, [True], {"1": 2}, [[1]], np.eye(2), b"1", [None])
    },
    "correct_steps": ("goc", {"correct_steps": [-1]}, ["correct_steps", "-1"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_change_nothing(shared, case):
    method, params, words = BAD_DATA[case]
    with nothing_changed(shared) as model, one_line(*words):
        dittocache.enable(model, method, **params)


def test_parts_check_their_own_data():
    for build, words in (
        (lambda: Trend({"a@1": holed(1.0)}, theta=math.nan), ["theta", "nan"]),
        (lambda: Trend({"a@1": holed(1.0)}, write_back=1), ["write_back", "1"]),
        (lambda: GradientQueue(math.inf), ["eta", "inf"]),
        (lambda: GradientQueue(positions=(-1,)), ["positions", "-1"]),
        (lambda: GradientQueue(require_both="yes"), ["require_both", "'yes'"]),
        (lambda: NoiseScale(0), ["noise_scale", "0"]),
        (lambda: NoiseScale(threshold=1), ["threshold", "1"]),
        (lambda: NoiseScale(high=1.2), ["high", "1.2"]),
        (lambda: LowRankIncrement(3), ["mapping", "3"]),
        (lambda: Tensors({"safetensors": "?"}), ["damaged tensors"]),
        (lambda: Tensors({"safetensors": "AAAA"}), ["damaged tensors"]),
    ):
        with one_line(*words):
            build()


@pytest.mark.parametrize("case", ["reuse_steps", "table", "rows"])
def test_lists_for_another_number_of_steps(pipe, case):
    """They are found when the run begins, and it does not."""
    method, params, words = {
        "reuse_steps": ("goc", {"reuse_steps": [1, 6]}, ["reuse_steps in a run of 6 steps", "from 1 to 5", "6"]),
        "table": ("eb-cache", {"table": (0, 2, 0)}, ["3 states", "6 steps"]),
        "rows": ("l2c", {"router_logits": torch.zeros(4, 6)}, ["4 rows", "6"]),
    }[case]
    plain = tiny.draw(pipe, 6)
    with dittocache.enable(pipe, method, **params), one_line(*words):
        tiny.draw(pipe, 6)
    assert torch.equal(tiny.draw(pipe, 6), plain) and not tiny.traces_of_cache(pipe.transformer)


@pytest.mark.parametrize(("name", "cut"), [(A, (slice(1), slice(None))), (B, (slice(None), slice(5)))])
def test_factors_for_layers_of_another_size(name, cut):
    """Never broadcast: an error at the first forward."""
    model = tiny.dit()
    plain = tiny.sample(model, steps=2)
    data = ICC["factor_tensors"] | {name: ICC["factor_tensors"][name][cut]}
    with (
        dittocache.enable(model, "icc", factor_tensors=data) as cache,
        one_line("'transformer_blocks.0.attn1.to_q'", "16 x 16", "calibrate"),
    ):
        tiny.predictions(model, cache, 4)
    assert torch.equal(tiny.sample(model, steps=2), plain) and not tiny.traces_of_cache(model)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def written(folder, content, name="router.pth"):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


ROWS = {f"{i}.prob": torch.full((6,), float(i) - 2) for i in range(4)}


@pytest.mark.parametrize("name", ["torch", "prefixed", "half", "table", "rows"])
def test_router_files(tmp_path, name):
    """The authors' layout, with their command line in it, and ours."""
    path = {
        "torch": lambda: written(tmp_path, {"routers": ROWS, "opt": {}, "args": argparse.Namespace(lr=0.001)}),
        "prefixed": lambda: written(tmp_path, {"routers": {f"module.{k}": v for k, v in ROWS.items()}}),
        "half": lambda: written(tmp_path, {"routers": {k: v.half() for k, v in ROWS.items()}}),
        "table": lambda: written(tmp_path, {"logits": torch.stack(list(ROWS.values()))}, "r.safetensors"),
        "rows": lambda: written(tmp_path, ROWS, "r.safetensors"),
    }[name]()
    for source in (path, str(path)):
        found = recipe("l2c", router_logits=source).when.logits["logits"]
        assert torch.equal(found, torch.stack(list(ROWS.values()))) and found.dtype == torch.float32


def without_row(i):
    return {"routers": {k: v for k, v in ROWS.items() if k != f"{i}.prob"}}


FILES = {
    "truncated": (lambda folder: written(folder, (written(folder, {"routers": ROWS})).read_bytes()[:-40]), ["damaged"]),
    "empty": (lambda folder: written(folder, b""), ["damaged"]),
    "text": (lambda folder: written(folder, b"hello world\n"), ["damaged"]),
    "not a torch file": (lambda folder: written(folder, ROWS, "r.safetensors").rename(folder / "r.pt"), ["damaged"]),
    "not a safetensors file": (lambda folder: written(folder, b"\0" * 40, "r.safetensors"), ["damaged"]),
    "foreign code in a zip": (lambda f: written(f, {"routers": ROWS, "x": Evil(f / "x")}), ["damaged", "plain"]),
    "foreign code in a pickle": (lambda f: written(f, pickle.dumps(Evil(f / "x"))), ["damaged", "plain"]),
    "a module": (lambda folder: written(folder, nn.Linear(2, 2)), ["damaged", "plain"]),
    "a missing row": (lambda folder: written(folder, without_row(2)), ["row 2 is missing"]),
    "a missing first row": (lambda folder: written(folder, without_row(0)), ["row 0 is missing"]),
    "a row far away": (
        lambda folder: written(folder, {"routers": ROWS | {"999999999999.prob": ROWS["0.prob"]}}),
        ["row 4 is missing"],
    ),
    "uneven rows": (lambda folder: written(folder, {"routers": ROWS | {"4.prob": torch.ones(5)}}), ["(5,)", "(6,)"]),
    "numbers for rows": (lambda folder: written(folder, {"routers": {"0.prob": 0.5}}), ["damaged router"]),
    "no rows": (lambda folder: written(folder, {"routers": {}}), ["'logits'"]),
    "rows of None": (lambda folder: written(folder, {"routers": None}), ["None"]),
    "a bare tensor": (lambda folder: written(folder, torch.zeros(4, 6)), ["tables by name"]),
    "a list": (lambda folder: written(folder, [torch.zeros(6)]), ["tables by name"]),
    "a number": (lambda folder: written(folder, 3), ["tables by name", "3"]),
    "numbered tensors": (lambda folder: written(folder, {0: torch.zeros(6)}), ["name", "0"]),
    "other names": (lambda folder: written(folder, {"foo": torch.zeros(4, 6)}, "r.safetensors"), ["'logits'", "'foo'"]),
    "nothing there": (lambda folder: folder / "nowhere.pth", ["no file", "nowhere.pth"]),
    "a folder": (lambda folder: folder, ["no file"]),
    "a name too long": (lambda folder: "x" * 5000, ["no file"]),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(shared, case, tmp_path):
    make, words = FILES[case]
    path = make(tmp_path)
    with nothing_changed(shared) as model, one_line(*words) as _:
        dittocache.enable(model, "l2c", router_logits=path)
    for method, name in (("eoc", "trend"), ("icc", "factor_tensors")):
        with one_line():
            recipe(method, **{name: path})
    assert not (tmp_path / "x").exists(), "code of a file was run"


def test_a_bad_file_never_advises_to_load_it_unsafely(tmp_path):
    path = written(tmp_path, {"routers": ROWS, "x": Evil(tmp_path / "x")})
    with pytest.raises(ValueError) as e:
        recipe("l2c", router_logits=path)
    assert "weights_only" not in str(e.value) and "\x1b" not in str(e.value)


# ---- made for another model or run ----------------------------------------------------------------------------------
TIMESTEPS = [float(t) for t in range(950, -1, -50)]  # 20 steps of DDIM, spacing "leading"


def calibrated(model, **changes):
    return dataclasses.replace(recipe("fora"), made_for=origin.made_for(model, DDIMScheduler(), TIMESTEPS) | changes)


def test_a_recipe_for_another_model_is_refused(shared):
    for wrong, words in (
        (calibrated(tiny.pixart()), ["PixArtTransformer2DModel", "DiTTransformer2DModel"]),
        (calibrated(tiny.dit(1)), ["other weights", "0.9"]),
        (calibrated(tiny.dit(0, num_layers=4)), ["other weights"]),
        (calibrated(tiny.dit(), scheduler="DPMSolverMultistepScheduler"), ["DPMSolverMultistepScheduler", "DDIM"]),
    ):
        with nothing_changed(shared) as model, one_line(*words):
            dittocache.enable(model, wrong, scheduler=DDIMScheduler())
        lifted = dataclasses.replace(wrong, made_for={})
        with dittocache.enable(tiny.dit(), lifted) as cache:
            assert cache.enabled


@pytest.mark.parametrize("copied", ["itself", "fine-tuned", "bfloat16", "float16", "fused", "adapter", "wrapped"])
def test_a_recipe_for_the_same_model_is_taken(copied, tmp_path):
    model, other = tiny.dit(), tiny.dit()
    if copied == "fine-tuned":
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    elif copied in ("bfloat16", "float16"):
        other.to(getattr(torch, copied))
    else:
        for block in other.transformer_blocks:
            if copied == "fused":
                block.attn1.fuse_projections()
            elif copied == "adapter":
                block.attn1.lora_A, block.attn1.lora_B = nn.Linear(16, 2), nn.Linear(2, 16)
            elif copied == "wrapped":  # as peft does
                inner = block.attn1.to_q
                block.attn1.to_q = nn.Module()
                block.attn1.to_q.base_layer = inner
    calibrated(model).save_pretrained(tmp_path)
    with dittocache.enable(other, tmp_path, scheduler=DDIMScheduler()) as cache:
        assert cache.enabled


def test_a_recipe_for_another_run_is_refused():
    model = tiny.dit()
    for scheduler, steps, words in (
        (DDIMScheduler(), 10, ["20 steps", "10"]),
        (DDIMScheduler(timestep_spacing="trailing"), 20, ["950.0", "49", "spacing"]),
    ):
        with dittocache.enable(model, calibrated(model), scheduler=scheduler) as cache, one_line(*words):
            tiny.sample(model, scheduler, steps)
        lifted = dataclasses.replace(calibrated(model), made_for={})
        with dittocache.enable(model, lifted, scheduler=scheduler) as cache:
            tiny.sample(model, scheduler, steps)
            assert cache.trace.compute_fraction < 1
    for scheduler in (DDIMScheduler(), DDIMScheduler(steps_offset=1)):  # an offset of 1 is no other spacing
        with dittocache.enable(model, calibrated(model), scheduler=scheduler) as cache:
            tiny.sample(model, scheduler, 20)
            assert cache.trace.compute_fraction < 1
    with dittocache.enable(model, calibrated(model)) as cache:
        with one_line("20 steps", "19"):
            cache.run(19)
        cache.run(20)


@pytest.mark.parametrize(
    "made_for",
    [
        {"timesteps": "abc"}, {"timesteps": 5}, {"timesteps": ["a"]}, {"timesteps": [NAN]}, {"timesteps": []},
        {"weights": [1.0]}, {"weights": {"a[0]": "x"}}, {"model": 3}, {"scheduler": ["x"]},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_made_for(made_for, tmp_path):
    name = next(iter(made_for))
    with one_line("made_for", name):
        dataclasses.replace(recipe("fora"), made_for=made_for)
    with one_line("made_for", name):
        Recipe.from_pretrained(write(tmp_path, replaced(made_for=made_for)))


# ---- recipes with tensors -------------------------------------------------------------------------------------------
WITH_TENSORS = {
    "l2c": recipe("l2c", **L2C),
    "eoc": recipe("eoc", **EOC, reuse_steps=range(1, 4)),
    "icc": recipe("icc", **ICC),
    "half": Recipe(when=Every(2), fill=Trend({"a@1": torch.ones(2, 3).half(), "b:c@2": torch.ones(1, 2).bfloat16()})),
    "empty": Recipe(when=Every(2), fill=Trend({})),
}


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_recipes_with_tensors_survive(name, tmp_path):
    r = dataclasses.replace(WITH_TENSORS[name], made_for=origin.made_for(DIT, DDIMScheduler(), [3, 2.5]))
    text = json.dumps(r.to_dict(), allow_nan=False)
    r.save_pretrained(tmp_path)
    for again in (Recipe.from_dict(json.loads(text)), Recipe.from_pretrained(tmp_path), copy.deepcopy(r)):
        assert again == r and again.made_for == r.made_for
        part, other = (again.fill, r.fill) if name != "l2c" else (again.when, r.when)
        assert hash(part) == hash(other)
        tensors, others = (next(v for v in vars(p).values() if isinstance(v, Tensors)) for p in (part, other))
        assert [t.dtype for t in tensors.values()] == [t.dtype for t in others.values()]
    assert dataclasses.replace(r, made_for={}) != r
    r.to_dict()["made_for"]["weights"].clear()
    assert r.made_for["weights"]


@pytest.mark.parametrize("content", ["missing", "cut", "empty", "zeros", "renamed", "fewer", "nan"])
def test_damaged_tensors_of_a_recipe(shared, content, tmp_path):
    WITH_TENSORS["eoc"].save_pretrained(tmp_path)
    path = tmp_path / "recipe.safetensors"
    data = path.read_bytes()
    tensors = {f"fill.trend:{k}": v for k, v in EOC["trend"].items()}
    first = next(iter(tensors))
    if content == "missing":
        path.unlink()
    elif content in ("cut", "empty", "zeros"):
        path.write_bytes({"cut": data[:-5], "empty": b"", "zeros": bytes(50)}[content])
    elif content == "renamed":
        save_file({f"x{k}": v for k, v in tensors.items()}, path)
    elif content == "fewer":
        save_file({k: v for k, v in tensors.items() if k != first}, path)
    else:
        save_file(tensors | {first: torch.full((16, 16), math.nan)}, path)
    words = ["not finite", first.partition(":")[2]] if content == "nan" else ["damaged"]
    with nothing_changed(shared) as model, one_line(*words):
        dittocache.enable(model, tmp_path)


def test_tensors_do_not_change_after_they_are_made():
    array, tensor, rows = np.ones((1, 2)), torch.ones(1, 2), [[1.0, 1.0]]
    found = Tensors({"a": array, "b": tensor, "c": rows})
    kept, number = copy.deepcopy(found), hash(found)
    array[:], rows[0][0] = 5, 5
    tensor.fill_(5)
    assert found == kept and hash(found) == number
    assert all((t == 1).all() for t in found.values())
    assert found != Tensors({"a": array, "b": tensor, "c": rows})
    assert found != Tensors({**found, "a": found["a"].float()}) and found != Tensors({"a": found["a"]})
    assert found == Tensors(dict(reversed(list(found.items())))) and found != 3
    source = torch.ones(2, 1, requires_grad=True)
    assert not Tensors({"x": source})["x"].requires_grad
    eight_bits = Tensors({"x": torch.ones(2).to(torch.float8_e4m3fn)})
    assert Tensors(json.loads(json.dumps(eight_bits.to_dict()))) == eight_bits
