"""Every case of a pack against this library: `pytest tests/parity --goldens DIR`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dittocache
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
    for name, want in expected.items():
        got = found[name].reshape(want.shape)
        relative = units.relative_tolerance(case["tolerance"], name)
        if relative is not None:
            error = float((got.double() - want.double()).norm() / want.double().norm())
            assert error <= relative, f"{name} differs by {error:.2e}"
            continue
        if name == "selection_indices":
            assert torch.equal(got.long().sort(-1).values, want.long().sort(-1).values), name
        elif want.is_floating_point() and tolerance:
            assert float((got - want).abs().max()) <= tolerance, name
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
    noise = goldens.artifact(case["artifacts"]["noise"]) if "noise" in case["artifacts"] else None
    x = inputs["z"] if "z" in inputs else inputs["x"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped nothing")  # the uncached references
        with dittocache.enable(model, pack.recipe_of(goldens, case)) as cache, cache.run(case["num_steps"]):
            if spec["kind"] == sampling.UVIT:
                latents, predictions, raw = sampling.sample_uvit(model, inputs, spec, guidance, cache)
            else:
                latents, predictions = sampling.sample(model, x, spec, guidance, inputs, cache, noise)
    if "network_outputs" in expected:
        check_each("network_outputs", raw, expected["network_outputs"], case["tolerance"]["eps_rel_l2_per_step"])
    check_closeness(case, expected, latents, predictions)
    if "computed" in expected:
        check_computed(cache, expected["computed"])
    if "step_types" in expected:
        assert torch.equal(step_types(cache), expected["step_types"].long()), "step types"
    if "selection_calls" in expected:
        check_selection(cache, expected, calls)
    checked = {"latents", "eps", "velocity", "computed", "step_types", "selection_calls", "selection_indices"}
    checked |= {"network_outputs"}
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


def step_types(cache: dittocache.Cache) -> Tensor:
    """0 full, 1 partial, 2 aggressive for every step and block, read off the trace."""
    trace = cache.trace
    kinds = np.array(trace.kinds)
    full = trace.table[:, kinds == "attention"] == 1
    aggressive = np.zeros_like(full)
    if "stack" in trace.kinds:
        aggressive |= trace.table[:, kinds == "stack"] == 0
    return torch.tensor(np.where(full, 0, np.where(aggressive, 2, 1)))


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
    sites = len(set(trace.kinds))  # attention and feed-forward of each block, in order of execution
    by_block = table.reshape(len(table), -1, sites)
    found = {1: by_block.amin((1, 2)), 2: by_block.amin(2), 3: by_block}[computed.ndim]
    assert torch.equal(found.double(), computed.reshape(found.shape).double()), "computed"


def check_selection(cache: dittocache.Cache, expected: dict[str, Tensor], calls: list[tuple[Tensor, int]]) -> None:
    trace = cache.trace
    rows = expected["selection_calls"].tolist()
    feed_forward = [n for n, kind in enumerate(trace.kinds) if kind == "feed-forward"]
    tokens = calls[0][0].shape[1] if calls else 1
    for k, _, block, count in rows:
        share = trace.table[k, feed_forward[block]]
        assert round(share * tokens) == count, f"step {k}, block {block}: {share * tokens} tokens instead of {count}"
    if not calls:
        return
    # where all tokens are taken nothing is chosen, and no score is needed
    some = [0 < count < tokens for *_, count in rows]
    assert [count for _, count in calls] == [row[3] for row, s in zip(rows, some, strict=True) if s], (
        "numbers of tokens"
    )
    chosen = [want for want, s in zip(expected["selection_indices"], some, strict=True) if s]
    for (score, count), want in zip(calls, chosen, strict=True):
        order = score.argsort(dim=-1, descending=True, stable=True)
        for row in range(len(score)):
            got, right = set(order[row, :count].tolist()), set(want[row, :count].tolist())
            gap = float(score[row, order[row, count - 1]] - score[row, order[row, min(count, tokens - 1)]])
            assert got == right or gap < 1e-5, "selected tokens"
