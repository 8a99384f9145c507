"""Every case of a pack against this library: `pytest tests/parity --goldens DIR`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dittocache
from dittocache.when import dynamic
from dittocache.which import Which
from dittocache.which.tokens import RandomTokens

from . import pack, sampling, units

MISSING = Path(__file__).parent / "missing.txt"


def test_case(goldens: pack.Pack, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = goldens.missing(case)
    if reason is not None:
        pytest.fail(reason, pytrace=False)
    if case["kind"] == "unit":
        run_unit(goldens, case)
    else:
        run_sampling(goldens, case, monkeypatch)


def test_missing(request: pytest.FixtureRequest) -> None:
    """What this version cannot run is listed by name, so that the list cannot grow or go stale unseen."""
    from .conftest import default_folder

    goldens = pack.Pack(default_folder())
    listed = {line.split(":")[0] for line in MISSING.read_text(encoding="utf-8").splitlines() if line}
    known = {case["id"] for case in goldens.cases}
    missing = {case["id"]: goldens.missing(case) for case in goldens.cases if goldens.missing(case)}
    assert set(missing) == listed & known, "tests/parity/missing.txt must name exactly the cases that cannot run"


def run_unit(goldens: pack.Pack, case: dict[str, Any]) -> None:
    function = units.find(case)
    assert function is not None
    inputs = {name: goldens.artifact(reference) for name, reference in case["inputs"].items()}
    settings = {**case["settings"], "method": case["method"]}
    if function in units.WITH_NETWORK:
        found = function(settings, inputs, goldens, case)
    else:
        found = function(settings, inputs)
    expected = goldens.expected(case)
    if "product_rel_l2" in case["tolerance"]:
        expected = units.products(expected)
    assert set(found) == set(expected)
    tolerance = next((v for k, v in case["tolerance"].items() if k.endswith("abs")), 0.0)
    slack = case["tolerance"].get("cost_rel", 0.0)
    for name, want in expected.items():
        got = found[name].reshape(want.shape)
        relative = units.relative_tolerance(case["tolerance"], name)
        if relative is not None:
            error = float((got.double() - want.double()).norm() / want.double().norm())
            assert error <= relative, f"{name} differs by {error:.2e}"
            continue
        if name == "selection_indices":
            assert torch.equal(got.long().sort(-1).values, want.long().sort(-1).values), name
        elif want.is_floating_point() and (tolerance or slack):
            assert torch.allclose(got.double(), want.double(), rtol=slack, atol=tolerance), name  # inf where inf is
        else:
            assert torch.equal(got.double(), want.double()), name


def run_sampling(goldens: pack.Pack, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, expected = goldens.network(case["network"]), goldens.inputs(case), goldens.expected(case)
    spec, guidance = goldens.sampler(case), goldens.guidance(case)
    calls: list[tuple[Tensor, int]] = []

    def record(self: Which, score: Tensor, count: int) -> Tensor:
        calls.append((score.clone(), count))
        return dittocache.which.scores.select(score, count)

    monkeypatch.setattr(Which, "choose", record)
    if "random_scores" in case["artifacts"]:
        inject(monkeypatch, goldens.artifact(case["artifacts"]["random_scores"]), expected)
    changes = watch_changes(monkeypatch)
    noise = goldens.artifact(case["artifacts"]["noise"]) if "noise" in case["artifacts"] else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped nothing")  # the uncached references
        times = sampling.scheduler_times(spec)
        with dittocache.enable(model, pack.recipe_of(goldens, case)) as cache, cache.run(case["num_steps"], times):
            latents, predictions, outputs = sampling.run(model, inputs, spec, guidance, cache, noise)
    if "network_outputs" in expected:
        (tolerance,) = (v for name, v in case["tolerance"].items() if name.endswith("_rel_l2_per_step"))
        check_each("network_outputs", outputs, expected["network_outputs"], tolerance)
    check_closeness(case, expected, latents, predictions)
    if "computed" in expected:
        check_computed(cache, expected["computed"])
    if "indicator" in expected:
        check_indicator(changes, expected["indicator"])
    if "step_types" in expected:
        types = expected["step_types"].long()
        assert torch.equal(step_types(cache, types.shape), types), "step types"
    if "module_kinds" in expected:
        assert torch.equal(module_kinds(model, cache), expected["module_kinds"].long()), "kinds of the modules"
    if "selection_calls" in expected:
        check_selection(model, cache, case, expected, calls)
    checked = {"latents", "eps", "velocity", "computed", "step_types", "selection_calls", "selection_indices"}
    checked |= {"module_kinds"}
    checked |= {"network_outputs", "indicator"}
    unknown = set(expected) - checked
    assert not unknown, f"this runner does not check {unknown}"


def inject(monkeypatch: pytest.MonkeyPatch, draws: Tensor, expected: dict[str, Tensor]) -> None:
    """Hands out recorded random scores; calls that take no token, or all, draw none here."""
    counts = expected["selection_calls"][:, 3].tolist()
    left = [draws[n] for n, count in enumerate(counts) if 0 < count < draws.shape[-1]]

    def base(self: Any, observed: Any, x: Tensor, held: Tensor, halves: int, generator: Any) -> Tensor:
        assert halves == 2
        return left.pop(0).repeat(2, 1)

    monkeypatch.setattr(RandomTokens, "base", base)


def watch_changes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The relative changes that a schedule of the whole batch looks at, in order."""
    changes: list[float] = []
    change = dynamic.change

    def watched(new: Tensor, old: Tensor) -> Tensor:
        found = change(new, old)
        changes.append(float(found))
        return found

    monkeypatch.setattr(dynamic, "change", watched)
    return changes


def check_indicator(changes: list[float], indicator: Tensor) -> None:
    """The last step is full whatever has changed, so that there may be no look at it."""
    want = indicator[~indicator.isnan()].tolist()
    assert len(want) - 1 <= len(changes) <= len(want), "how often it was looked at"
    assert changes == pytest.approx(want[: len(changes)], rel=1e-5), "indicator"


def check_closeness(case: dict[str, Any], expected: dict[str, Tensor], latents: Tensor, predictions: Tensor) -> None:
    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    tolerance = case["tolerance"]
    assert distance(latents, expected["latents"]) <= tolerance["latents_rel_l2"], "latents"
    for name in ("eps", "velocity"):
        if name in expected:
            check_each(name, predictions, expected[name], tolerance[f"{name}_rel_l2_per_step"])


def check_each(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every step on its own: late steps hardly move the final latents."""
    worst = max(
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)
    )
    assert worst <= tolerance, f"{name} differs by {worst:.2e} in the worst step"


def step_types(cache: dittocache.Cache, shape: torch.Size) -> Tensor:
    """0 full, 1 partial, 2 aggressive for every step, or step and block, read off the trace."""
    trace = cache.trace
    kinds = np.array(trace.kinds)
    full = trace.table[:, (kinds == "attention") | (kinds == "fused")] == 1
    aggressive = np.zeros_like(full)
    if "stack" in trace.kinds:
        aggressive |= trace.table[:, kinds == "stack"] == 0
    types = torch.tensor(np.where(full, 0, np.where(aggressive, 2, 1)))
    if len(shape) == 1:  # decided once a step
        assert (types == types[:, :1]).all(), "the blocks of a step differ"
        return types[:, 0]
    return types


def module_kinds(model: Any, cache: dittocache.Cache) -> Tensor:
    """0 full, 1 partial, 2 aggressive for every step, pair of blocks, block of the pair and module.

    A partial step that takes all tokens is not a full one, though the trace shows a share of 1.
    """
    trace, columns = cache.trace, {site.name: site for site in dittocache.describe(model).columns}
    planned = cache.recipe.when.table(len(trace.table), [columns[name] for name in trace.sites])
    modules = np.array([kind != "stack" for kind in trace.kinds])
    kinds = np.where((trace.table == 1) & (planned == 1), 0, 1)[:, modules]
    if not modules.all():
        kinds[(trace.table[:, ~modules] == 0).any(1)] = 2
    return torch.tensor(kinds).reshape(len(kinds), -1, 2, 3)


def check_computed(cache: dittocache.Cache, computed: Tensor) -> None:
    """A mask of the computed steps, or of steps and blocks, or of steps, blocks and modules."""
    trace = cache.trace
    table = torch.tensor(trace.table)
    if computed.ndim == 4:  # two calls an evaluation, both alike
        assert torch.equal(computed[:, 0], computed[:, 1]), "the calls of an evaluation differ"
        computed = computed[:, 0]
    if computed.ndim == 2 and computed.shape[1] == 2:  # attention and feed-forward, all blocks alike
        kinds = np.array(trace.kinds)
        found = torch.stack([table[:, kinds == kind].amin(1) for kind in ("attention", "feed-forward")], 1)
        assert torch.equal(found.double(), computed.double()), "computed"
        return
    if computed.ndim == 1:
        assert torch.equal(table.amin(1), computed.double()), "computed"
        return
    sites = len(set(trace.kinds))  # attention and feed-forward of each block, in order of execution
    by_block = table.reshape(len(table), -1, sites)
    found = {2: by_block.amin(2), 3: by_block}[computed.ndim]
    assert torch.equal(found.double(), computed.reshape(found.shape).double()), "computed"


# the site that a row of `selection_calls` is about, by the class of the network: (row) -> step, name of the site
FLUX_PARTS = ("transformer_blocks.{}.ff", "transformer_blocks.{}.ff_context", "single_transformer_blocks.{}.proj_out")
SELECTED: dict[str, Callable[[list[int]], str]] = {
    "DiTTransformer2DModel": lambda row: f"transformer_blocks.{row[2]}.ff",
    "PixArtTransformer2DModel": lambda row: f"transformer_blocks.{row[1]}.{('attn2', 'ff')[row[2]]}",
    "FluxTransformer2DModel": lambda row: FLUX_PARTS[row[2]].format(row[1]),
    "STDiT3": lambda row: f"{('spatial', 'temporal')[row[2]]}_blocks.{row[1]}.{('attn', 'cross_attn', 'mlp')[row[3]]}",
}


def check_selection(
    model: Any, cache: dittocache.Cache, case: dict[str, Any], expected: dict[str, Tensor], calls: list[Any]
) -> None:
    """Every partial call in order: its site, its number of tokens, and which they are."""
    trace, left = cache.trace, list(calls)
    tolerated = re.search(r"less than ([0-9.e-]+)", case["tolerance"].get("selection", ""))
    excused = float(tolerated.group(1)) if tolerated else 0.0
    rows = expected["selection_calls"].tolist()
    for row, want in zip(rows, expected.get("selection_indices", [None] * len(rows)), strict=True):
        name, count = SELECTED[type(model).__name__](row), row[-1]
        share = trace.table[row[0], trace.sites.index(name)]
        where = f"step {row[0]}, {name}"
        if not left or left[0][1] != count or share in (0, 1):  # none or all are taken: nothing is chosen
            assert share == (0 if count == 0 else 1), f"{where}: a share of {share} where {count} tokens are expected"
            continue
        score, _ = left.pop(0)
        tokens = score.shape[1]
        assert round(share * tokens) == count, f"{where}: {share * tokens} tokens instead of {count}"
        order = score.argsort(dim=-1, descending=True, stable=True)
        for r in range(len(score)):  # where guidance halves share their tokens, one of them is listed
            got, right = set(order[r, :count].tolist()), set(want[r % len(want), :count].tolist())
            gap = float(score[r, order[r, count - 1]] - score[r, order[r, min(count, tokens - 1)]])
            assert got == right or gap < excused, f"{where}: selected tokens"
    assert not left, "tokens were chosen where nothing is expected"
