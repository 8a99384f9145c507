"""Where the goldens are, and one test per case."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from . import pack

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--goldens", help="folder with a cases.json: every case in it becomes a test")


def default_folder() -> Path:
    """The full pack if it is at hand, else the few cases that come with the tests."""
    beside = HERE.parents[2] / "shared" / "goldens"
    named = os.environ.get("DITTOCACHE_GOLDENS")
    if named:
        return Path(named)
    return beside if (beside / "cases.json").is_file() else HERE / "goldens"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--goldens")
    goldens = pack.Pack(Path(named) if named else default_folder())
    # without --goldens, what is known to be missing is listed and checked by test_missing instead
    cases = [c for c in goldens.cases if named or goldens.missing(c) is None]
    metafunc.parametrize(("goldens", "case"), [(goldens, c) for c in cases], ids=[c["id"] for c in cases])


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """The goldens were made with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
