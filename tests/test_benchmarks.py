"""The benchmarks run, and write what they say; their numbers are nobody's business here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """`import speed` finds benchmarks/; what a script sets for its whole process is set back."""
    import logging
    import warnings

    threads, level = torch.get_num_threads(), logging.getLogger("diffusers").level
    monkeypatch.syspath_prepend(str(FOLDER))
    with warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield
    torch.set_num_threads(threads)
    logging.getLogger("diffusers").setLevel(level)
    for name in ("speed", "per_block_kind", "claims", "l2c_router", "emoji", "plans"):
        sys.modules.pop(name, None)


def test_speed(benchmarks, tmp_path):
    import speed

    out = tmp_path / "deep" / "speed.json"
    args = ["--models", "tiny", "--steps", "6", "--rounds", "2", "--threads", "1", "--out", str(out)]
    returned = speed.main([*args, "--variants", "none", "fora", "duca value-norm"])
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(returned)) and data["provenance"]["threads"] == 1
    (entry,) = data["models"]
    assert (entry["steps"], entry["rounds"], entry["tokens"]) == (6, 2, 16)
    rows = {row["variant"]: row for row in entry["rows"]}
    assert rows["uncached"]["speedup"] == rows["uncached"]["compute_share"] == 1
    assert rows["none"]["equal_to_uncached"] and rows["none"]["blocks_computed"] == 1
    assert rows["fora"]["blocks_computed"] == 0.5  # steps 0, 2, 5
    assert len(rows["fora"]["seconds"]) == 2 and rows["fora"]["relative_error"] > 0
    # counted from outside, whatever the cache says of itself
    assert rows["fora"]["compute_share_counted"] == pytest.approx(rows["fora"]["compute_share"], rel=0.05)
    # a peer either has numbers or a reason
    assert all("speedup" in row or len(row["does_not_run"].splitlines()) == 1 for row in entry["rows"])
    assert "documented" in next(name for name, row in rows.items() if "does_not_run" in row)
    assert entry["overhead_percent"]["forwards"] >= 6


def test_speed_wrong_argument(benchmarks, capsys):
    import speed

    with pytest.raises(SystemExit):
        speed.main(["--steps", "0"])
    assert "--steps must be 1 or more" in capsys.readouterr().err


def test_equal_compute_difference(benchmarks):
    """Two lines in the plane PSNR over compute, 2 dB apart, at settings that never compute the same."""
    import per_block_kind

    def rows(shares, offset):
        errors = [10 ** (-(offset + 10 * share) / 10) for share in shares]
        return [
            {"params": {}, "compute_share": s, "psnr_db": offset + 10 * s, "squared_errors": [e] * 4}
            for s, e in zip(shares, errors)
        ]

    found = per_block_kind.difference(rows([0.6, 0.4, 0.2], 32.0), rows([0.7, 0.5, 0.3], 30.0))
    assert found["compute_range"] == [0.3, 0.6]
    np.testing.assert_allclose([found["equal_compute_db"], *found["equal_compute_ci_db"]], 2.0)
    assert found["settings"][0]["difference_db"] == pytest.approx(1.0)


@pytest.mark.slow
def test_per_block_kind(benchmarks, tmp_path):
    import per_block_kind

    out = tmp_path / "kinds.json"
    args = ["--methods", "toca", "--steps", "4", "--intervals", "2", "3", "--ratios", "0.1", "--pictures", "2"]
    per_block_kind.main([*args, "--out", str(out)])
    (comparison,) = json.loads(out.read_text(encoding="utf-8"))["comparisons"]
    assert len(comparison["settings"]) == 2 and all(pair["psnr_db"][0] > 0 for pair in comparison["settings"])


def test_claims_bases(benchmarks):
    import claims

    import dittocache

    for computed in (1, 7, 13, 20):
        table = claims.even(computed, 20).when.table(20, dittocache.describe(tiny.dit()).sites)
        assert table[0].all() and (table == 1).all(1).sum() == computed
    assert claims.schedules(20)["25 %"] == (1, 3, 5, 7, 9)
    assert {name: len(steps) for name, steps in claims.schedules(20).items()} == {"25 %": 5, "50 %": 10, "67 %": 13}


@pytest.mark.slow
def test_claims(benchmarks, tmp_path):
    import claims

    out = tmp_path / "claims.json"
    args = ["--steps", "6", "--pictures", "4", "--samples", "2", "--routers", "--out", str(out)]
    claims.main([*args, "--only", "goc"])
    data = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in data["rows"]}
    assert rows["GOC 50 %"]["base"]["label"] == "reuse 50 %" and out.with_suffix(".png").exists()
    for row in rows.values():
        low, high = row["psnr_interval"]
        assert low <= row["psnr"] <= high
        if "base" in row:  # the same compute or more
            assert row["base"]["compute"] >= row["compute"] - 2e-3
            assert row["fewer_steps"]["compute"] >= min(row["compute"], 5 / 6) - 2e-3
    claims.main([*args, "--only", "eb-cache"])  # the other method's rows stay
    again = {row["label"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert {"GOC 50 %", "EB table b 1"} <= again


def test_routers_of_one_share(benchmarks):
    import l2c_router

    generator = np.random.default_rng(0)
    mask = generator.random((10, 16)) < 0.3
    recipe = l2c_router.router(mask)
    logits = recipe.when.logits["logits"]
    assert (l2c_router.removed(logits, recipe.when.threshold) == mask).all()
    table = recipe.when.table(20, tiny.columns(16))
    assert ((table[1::2] == 0) == mask).all() and table[0::2].all()  # k odd is i even
    others = [*l2c_router.random_masks(mask, 3), l2c_router.alternation(mask), l2c_router.cheapest(mask, [*range(10)])]
    assert all(other.sum() == mask.sum() and other.shape == mask.shape for other in others)
    assert len({other.tobytes() for other in others}) == 5
    assert l2c_router.cheapest(mask, [*range(10)])[0].all()
    none = np.zeros((10, 16), dtype=bool)
    assert not l2c_router.alternation(none).any() and not l2c_router.cheapest(none, [0.0] * 10).any()


@pytest.mark.slow
def test_emoji(benchmarks, tmp_path):
    import emoji

    out = tmp_path / "emoji.json"
    args = ["--pictures", "4", "--steps", "6", "--batch", "2", "--out", str(out)]
    emoji.main([*args, "--only", "uncached", "all computed", "FORA 3", "TeaCache 0.2"])
    rows = {row["label"]: row for row in json.loads(out.read_text(encoding="utf-8"))["results"]}
    assert rows["all computed"]["compute_fraction"] == 1 and rows["FORA 3"]["compute_fraction"] < 0.7
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    with pytest.raises(SystemExit):
        emoji.main([*args, "--only", "uncached", "nope"])


@pytest.mark.slow
def test_plans(benchmarks, tmp_path):
    import plans

    out = tmp_path / "plans.json"
    sizes = ["--steps", "8", "--samples", "2", "--trial", "2", "--held-out", "3", "--tries", "7"]
    plans.main([*sizes, "--budgets", "4", "--out", str(out)])
    (row,) = json.loads(out.read_text(encoding="utf-8"))["psnr_db"]
    assert row["budget"] == 4 and len(row["computed"]) <= 4 and row["computed"][0] == 0
    assert all(np.isfinite(row[name]) for name in ("fewer steps", "TaylorSeer, order 1", "path", "search"))
