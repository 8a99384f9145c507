"""`dittocache tune`: a whole small search on the bundled model, and what it refuses before any work."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import dittocache
from dittocache import Recipe, bundled
from dittocache.cli import app
from dittocache.evaluate.comparison import Comparison

SMALL = ("--steps", 10, "--samples", 4, "--trial", 4, "--judged", 4, "--held-out", 4, "--batch", 4)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in ("tune", *arguments)])
    assert result.exit_code == code, result.output
    return result


def test_a_search_ends_with_a_recipe_that_works(tmp_path):
    found = json.loads(
        run("--max-loss", "psnr>=24", *SMALL, "--tries", 2, "--methods", 2, "--out", "found", "--json").stdout
    )
    assert found["met"] == (found["psnr"] >= 24) and found["winner"]["method"] in ("solver", "fewer steps")
    comparison = Comparison.load("found")
    assert comparison.results[1].label == found["winner"]["label"]
    assert (tmp_path / "found" / "index.html").stat().st_size > 10_000
    tried = json.loads((tmp_path / "found" / "tune.json").read_text())["tried"]
    assert {one["method"] for one in tried} > {"solver", "fewer steps"}, "published methods, too"
    assert all("fd" in one for one in tried), "the bundled judge looks at everything"
    if found["winner"]["method"] == "solver":
        recipe = Recipe.from_pretrained("found")
        assert "psnr >= 24" in recipe.provenance["goal"]
        pipe = bundled.load("glyphs")
        with dittocache.enable(pipe, "found") as cache:
            pipe("A", num_inference_steps=10, guidance_scale=1.5)
            assert cache.trace.compute_fraction < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a budget is a largest loss or a least speed-up; got neither"),
        (("--max-loss", "psnr>=30", "--min-speedup", 2), "a budget is a largest loss or a least speed-up; got both"),
        (("--max-loss", "psnr=30"), "a largest loss is written like psnr>=35"),
        (("--min-speedup", 0.5), "the least speed-up must be more than 1; got 0.5"),
        (("--min-speedup", 40), "a speed-up of 40 is out of reach: plans compute at least 2 of 50 steps"),
        (("--min-speedup", 2, "--samples", 0), "samples must be a whole number, 1 or more; got 0"),
        (("--min-speedup", 2, "--held-out", 0), "held_out must be a whole number, 2 or more; got 0"),
        (("--min-speedup", 2, "--scheduler", "fancy"), "'fancy' is no scheduler of diffusers"),
        (("--min-speedup", 2, "--against", "truth"), "pictures are compared with own or solution; got 'truth'"),
        (("nowhere", "--min-speedup", 2), "nowhere"),
    ],
)
def test_one_line_for_what_cannot_be(arguments, message, tmp_path):
    told = run(*arguments, code=2).stderr
    assert message in " ".join(told.split()) and len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_folder_of_another_search(tmp_path):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "journal.jsonl").write_text('{"goal": "another"}\n')
    told = run("--min-speedup", 2, *SMALL, "--out", "found", code=2).stderr
    assert "holds a search with" in told and "choose another folder" in told
