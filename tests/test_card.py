"""Model cards: what the Hub reads of them, a snippet that runs, and text from outside that stays text."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import dittocache
from dittocache import Plan, Recipe, origin, recipe, saved
from dittocache.calibrate import Setup
from dittocache.card import fenced, table, text
from dittocache.fill import Chosen, Hold, Taylor, Trend
from dittocache.when import ReuseSteps, SignalChange, Table

MEASURED = [
    {"label": "this one", "speedup": 2.5, "speedup_low": 2.25, "speedup_high": 2.75, "psnr": 41.0},
    {"label": "fora(interval=3)", "speedup": 2.0, "seconds": 1.5},
]


def card(made, folder, **kwargs):
    made.save_pretrained(folder, **kwargs)
    return (folder / saved.CARD).read_text(encoding="utf-8")


def full():
    """A recipe with everything that a card can show, for a run of 6 steps of the bundled model."""
    pipe = dittocache.bundled.load("glyphs")
    setup = Setup(num_steps=6, guidance_scale=1.5)
    pipe.scheduler.set_timesteps(6)
    return Recipe(
        ReuseSteps((1, 3, 4)),
        fill=Chosen((Hold(), Taylor(1)), (0, 0, 0, 1, 1, 0)),
        provenance={"model": "glyphs", "setup": setup.to_dict(), "measured": MEASURED},
        made_for=origin.made_for(pipe.transformer, pipe.scheduler, pipe.scheduler.timesteps.tolist()),
    )


def rows(written, head):
    """Cells of the table of a section."""
    section = written.partition(f"\n## {head}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (lines[0], *lines[2:])]


def test_the_hub_reads_it(tmp_path):
    made = Recipe(recipe("fora").when, provenance={"model": "facebook/DiT-XL-2-256"})
    card(made, tmp_path)
    read = ModelCard.load(tmp_path / saved.CARD)
    assert read.data.library_name == "dittocache" and read.data.base_model == "facebook/DiT-XL-2-256"
    assert {"dittocache", "diffusion"} <= set(read.data.tags) and read.data.license is None
    assert "DiffusionPipeline.from_pretrained('facebook/DiT-XL-2-256')" in read.text


@pytest.mark.parametrize("name", sorted(dittocache.methods()))
def test_every_method_has_one(name, tmp_path):
    made = recipe(name, **tiny.data_for(name))
    written, method = card(made, tmp_path), dittocache.methods()[name]
    read = ModelCard.load(tmp_path / saved.CARD)
    assert name in read.data.tags and read.data.base_model is None
    assert method.bibtex.strip() in written and (not method.arxiv or f"arxiv.org/abs/{method.arxiv}" in written)
    assert "## Measured" not in written and "None" not in written
    assert ("## Made for" in written) == (made.num_steps is not None)


def test_the_snippet_runs(tmp_path):
    """From the folder in which the recipe's lies, as it says."""
    written = card(full(), tmp_path / "half")
    (code,) = re.findall(r"```python\n(.*?)```", written, re.S)
    assert "Recipe.from_pretrained('half')" in code and "num_inference_steps=6, guidance_scale=1.5" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"steps +6\n", done.stdout) and re.search(r"compute share +5[0-9]\.", done.stdout)


def test_tables(tmp_path):
    written = card(full(), tmp_path)
    assert rows(written, "Measured") == [
        ["label", "speedup", "psnr", "seconds"],
        ["this one", "2.5 (2.25 to 2.75)", "41", ""],
        ["fora(interval=3)", "2", "", "1.5"],
    ]
    made_for = dict(rows(written, "Made for"))
    assert made_for["steps"] == "6" and made_for["scheduler"] == "DDIMScheduler" and made_for["guidance"] == "1.5"
    assert "Another model or scheduler or number of steps is refused." in written
    provenance = dict(rows(written, "Provenance"))
    assert provenance["dittocache"] == dittocache.__version__ and provenance["setup.num\\_steps"] == "6"
    assert "measured" not in provenance


def test_the_plan_is_shown(tmp_path):
    assert "3 of 6 steps are computed" in card(full(), tmp_path) and "\n#0#11#\n" in card(full(), tmp_path)
    rule = Recipe(recipe("fora", interval=2).when, provenance={"setup": {"num_steps": 6}})
    assert "\n##.#.#\n" in card(rule, tmp_path)
    assert "## Plan" not in card(recipe("fora"), tmp_path)  # nobody knows how many steps
    assert "## Plan" not in card(Recipe(SignalChange()), tmp_path)
    for made_for in ([2.0, 1.0], [1.0] * 2000):  # it does not fit, or is too long to be read
        assert "## Plan" not in card(Recipe(ReuseSteps((3,)), made_for={"timesteps": made_for}), tmp_path)


def test_a_table_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plan = Plan(np.eye(5), tuple("abcde"))
    assert f"]({saved.PLAN})" in card(Recipe(Table(plan)), tmp_path)
    assert np.asarray(Image.open(tmp_path / saved.PLAN)).std() > 10
    assert f"]({saved.PLAN})" not in card(recipe("fora"), tmp_path) and not (tmp_path / saved.PLAN).exists()


def test_pictures_lie_in_pairs(tmp_path):
    pictures = np.stack([np.full((3, 5, 1), 40 * n, np.uint8) for n in range(4)])
    assert f"]({saved.GRID})" in card(recipe("fora"), tmp_path, grid=pictures)
    sheet = np.asarray(Image.open(tmp_path / saved.GRID))
    assert sheet.shape == (6, 10, 3)
    assert [sheet[y, x].tolist() for y in (0, 5) for x in (0, 9)] == [[v] * 3 for v in (0, 80, 40, 120)]
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / "mine.bmp")
    assert "Above" not in card(recipe("fora"), tmp_path, grid=tmp_path / "mine.bmp")
    with Image.open(io.BytesIO((tmp_path / saved.GRID).read_bytes())) as picture:
        assert picture.format == "PNG" and np.asarray(picture).max() == 7


def test_text_from_outside_stays_text(tmp_path):
    """No markup, no cells, no code fence and no entry of the head can be forged."""
    evil = "a|b\n# x\n---\nlicense: mit\n```\n<script>alert(1)</script> ![i](javascript:x) _y_ `z`"
    made = Recipe(
        recipe("fora").when,
        method=evil,
        provenance={
            "model": f"me/x\nlicense: mit {evil}",
            "note": evil,
            evil: {"x": [evil]},
            "setup": {"conditions": [evil], "num_steps": evil, "guidance_scale": evil},
            "measured": [{"label": evil, evil: 1.0}, "no row", {"label": None}],
        },
        made_for={"model": evil},
    )
    written = card(made, tmp_path, repo_id=evil)
    data = yaml.safe_load(written.split("---")[1])
    assert set(data) == {"library_name", "tags"} and data["tags"] == ["dittocache", "diffusion", "feature-caching"]
    outside = re.sub(r"(`{3,})\w*\n.*?\n\1\n", "", written.partition(saved.MARK)[2], flags=re.S)
    assert "<script" not in outside and not re.search(r"(?<!\\)!\[", outside) and "\n# x" not in outside
    assert all(re.search(r"(?<!\\)_", line) is None for line in outside.splitlines())
    for head in ("Measured", "Provenance"):
        assert len({len(row) for row in rows(outside, head)}) == 1
    (code,) = re.findall(r"`{3,}python\n(.*?)\n`{3,}", written, re.S)
    compile(code, "snippet", "exec")


def test_a_provenance_of_any_form_is_saved(tmp_path):
    """It is free JSON: what a card cannot show it leaves out."""
    for value in (None, 3, "x", [1], {"a": 1}, [[1]], {}, [], [None]):
        entries = dict.fromkeys(("model", "setup", "measured", "solver", "resampled"), value)
        made = Recipe(recipe("fora").when, provenance=entries)
        made.save_pretrained(tmp_path)
        assert Recipe.from_pretrained(tmp_path) == made
        ModelCard.load(tmp_path / saved.CARD)


def test_markdown():
    assert text(" a\n| b_c <i> ") == "a \\| b\\_c &lt;i&gt;"
    assert fenced("x ``` y") == "````\nx ``` y\n````" and fenced("x", "python") == "```python\nx\n```"
    assert table(["a", ""], [("1|2", 3)]) == "| a |  |\n| --- | --- |\n| 1\\|2 | 3 |"


def test_the_plan_tells_fills_apart(tmp_path):
    trend = {"a.attn@1": torch.ones(2, 1)}
    fills = (Trend(trend, 1.0), Trend(trend, 1.0, additive=True), Taylor(2))
    made = Recipe(ReuseSteps((1, 2, 3)), fill=Chosen(fills, (0, 0, 1, 2)), provenance={"setup": {"num_steps": 4}})
    written = card(made, tmp_path)
    assert "\n#012\n" in written and "additive=True" in written and "Taylor(order=2)" in written
    assert written.count("theta=1.0") == 2
    many = replace(made, fill=Chosen(tuple(Taylor(n) for n in range(11)), (0, 0, 10, 3)))
    written = card(many, tmp_path)
    assert "\n#...\n" in written and "`.`: filled" in written and "`10`" not in written
