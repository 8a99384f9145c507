"""Every method on every model, and what must hold over runs: design, section 4."""

from __future__ import annotations

import json
import warnings

import diffusers
import matrix
import pytest
import torch
from zoo import ZOO, Entry, prediction

import dittocache

MODELS = list(matrix.models())
COLUMNS = list(matrix.METHODS)
EXACT = 0.02  # of the shares in the table: torch's FLOP formulas differ a little between versions


@pytest.fixture(scope="module")
def cells() -> dict:
    return json.loads(matrix.CELLS.read_text(encoding="utf-8"))


def test_the_table_names_every_model_and_method(cells) -> None:
    assert [m for m in cells if hasattr(diffusers, m) or m in MODELS] == MODELS, "run make compat"
    assert all(list(row) == COLUMNS for row in cells.values()), "run make compat"
    methods = {method for method, _ in matrix.METHODS.values()}
    assert methods == set(dittocache.methods()) - {"none"}, "a method has no column"
    assert matrix.TABLE.read_text(encoding="utf-8") == matrix.page(cells), "run make compat"


@pytest.mark.parametrize("model", MODELS)
def test_row(cells, model: str) -> None:
    found = matrix.row(model)
    for column in COLUMNS:
        check(column, found[column], cells[model][column])


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("model", MODELS)
def test_cell(cells, model: str, column: str) -> None:
    """Alone: that no method shows in what the next one does, and counts, is a part of it."""
    net, predict, tolerance = matrix.models()[model]()
    check(column, matrix.measure(net, predict, column, tolerance), cells[model][column])


def check(column: str, found: dict, listed: dict) -> None:
    assert found.keys() == listed.keys(), f"{column}: {found} instead of {listed}: run make compat"
    if "computed" in found:
        assert found["computed"] == pytest.approx(listed["computed"], abs=EXACT), f"{column}: run make compat"
    else:
        assert found == listed, f"{column}: run make compat"


# ---- runs -----------------------------------------------------------------------------------------------------------
def moving(entry: Entry, model, cache, steps: int = 5, **kwargs) -> list[torch.Tensor]:
    """The predictions of a run whose inputs drift."""
    with torch.no_grad(), cache.run(steps, timesteps=[900 - 100 * k for k in range(steps)]):
        outputs = []
        for k in range(steps):
            cache.step(k)
            outputs.append(prediction(model, entry.inputs(model, k=k, steps=steps, **kwargs)))
    return outputs


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# what is made for one number of steps, or of tokens
ONE_LENGTH, ONE_SIZE = ("l2c", "eoc", "block-caching", "dpcache", "lemica"), ("eoc",)
# one method a model in `make test`, in turn; all of them in `make test-all`
ALL_RUNS = [[(name, column) for column in COLUMNS if column != "deepcache"] for name in ZOO]
SOME_RUNS = [row[n % len(row)] for n, row in enumerate(ALL_RUNS)]
OTHER_RUNS = [one for row in ALL_RUNS for one in row if one not in SOME_RUNS]


@pytest.mark.parametrize(("name", "column"), SOME_RUNS)
@pytest.mark.filterwarnings("ignore:dittocache")
def test_runs(cells, name: str, column: str) -> None:
    runs(cells, name, column)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "column"), OTHER_RUNS)
@pytest.mark.filterwarnings("ignore:dittocache")
def test_other_runs(cells, name: str, column: str) -> None:
    runs(cells, name, column)


def runs(cells, name: str, column: str) -> None:
    """All-compute is the plain model; two runs are equal; what was interrupted, or of another shape, leaves nothing."""
    entry = ZOO[name]
    model = entry.build(0)
    with torch.no_grad():
        plain = [prediction(model, entry.inputs(model, k=k, steps=5)) for k in range(5)]
    with dittocache.enable(model, "none") as cache:
        assert equal(moving(entry, model, cache), plain), "an all-compute run differs from the plain model"
    if "refused" in cells[name][column]:
        column = "fora"
    recipe = matrix.recipe_for(column, model, lambda: plain[0])
    with dittocache.enable(model, recipe) as cache:
        first = moving(entry, model, cache)
        assert equal(moving(entry, model, cache), first), f"two runs of {column} differ"
        with warnings.catch_warnings(), torch.no_grad(), cache.run(5, timesteps=[900, 800, 700, 600, 500]):
            cache.step(0)
            prediction(model, entry.inputs(model, k=0, steps=5, seed=9))
            cache.step(1)
            prediction(model, entry.inputs(model, k=1, steps=5, seed=9))
        moving(entry, model, cache, steps=5 if column in ONE_LENGTH else 4, batch=1)
        if len(entry.sizes) > 1 and column not in ONE_SIZE:
            moving(entry, model, cache, size=entry.sizes[1])
        assert equal(moving(entry, model, cache), first), f"{column}: a run before this one shows"
    with torch.no_grad():
        after = [prediction(model, entry.inputs(model, k=k, steps=5)) for k in range(5)]
    assert equal(after, plain), "disable did not restore the model"
