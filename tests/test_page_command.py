"""`dittocache report`: one folder or several, opened in a browser, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import comparison  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from dittocache.cli import app
from dittocache.evaluate import Comparison


@pytest.fixture
def folder(comparison, tmp_path) -> Path:  # noqa: F811
    return comparison.save(tmp_path / "demo")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


def report(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["report", *arguments])
    assert done.exit_code == code, done.output
    return done


def test_the_page_stands_in_the_folder(folder):
    assert "demo/index.html" in report("demo").stdout
    assert "<!doctype html>" in (folder / "index.html").read_text()


def test_several_folders_are_one_page(folder, comparison, tmp_path):  # noqa: F811
    tuned = (comparison.results[0], dataclasses.replace(comparison.results[-1], label="tuned"))
    pictures = comparison.pictures | {"tuned": comparison.pictures["duca strong"]}
    dataclasses.replace(comparison, results=tuned, pictures=pictures).save(tmp_path / "found")
    found = json.loads(report("demo", "found", "--json").stdout)
    assert [r["label"] for r in found["results"]][-2:] == ["duca strong", "tuned"]
    assert found["page"] == "report.html" and "tuned" in (tmp_path / "report.html").read_text()


def test_open_hands_the_page_to_the_browser(folder, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "dittocache.cli", "report", "demo", "--open"]
    subprocess.run(command, env=os.environ | {"BROWSER": f"{browser} %s"}, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "opened").read_text().strip() == (folder / "index.html").as_uri()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "demo"], "names of their own; got demo, demo"),
        (["demo", "other"], "demo and other cannot stand side by side: they drew from other seeds"),
        (["demo", "nowhere"], "nowhere holds no comparison: comparison.json is missing"),
        (["cut"], "pictures.safetensors is damaged"),
        (["small"], "pictures of row 'duca strong' are uint8 [36, 2, 2, 1], expected uint8 [36, 32, 32, 1]"),
        (["demo", "--out", "no/such/page.html"], "no/such/page.html"),
    ],
)
def test_what_cannot_be_shown_is_one_line(folder, comparison, tmp_path, arguments, message):  # noqa: F811
    dataclasses.replace(comparison, seeds=tuple(range(1, 37))).save(tmp_path / "other")
    small = comparison.pictures | {"duca strong": np.zeros((36, 2, 2, 1), np.uint8)}
    dataclasses.replace(comparison, pictures=small).save(tmp_path / "small")
    pictures = comparison.save(tmp_path / "cut") / "pictures.safetensors"
    pictures.write_bytes(pictures.read_bytes()[:-1000])
    done = report(*arguments, code=2)
    assert done.stdout == "" and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_saved_page_has_all_that_was_measured(folder, comparison):  # noqa: F811
    assert Comparison.load(folder).results == comparison.results
