"""Recipes that were tuned for glyphs: they come with the package, and stand in the benchmarks with their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dittocache
from dittocache import Recipe, bundled
from dittocache.evaluate.rows import tuned_rows

HERE = Path(__file__).parents[1]
BENCHMARKS = HERE / "benchmarks" / "tuned"


@pytest.mark.parametrize("speed", ["2x", "3x", "4x"])
def test_a_tuned_recipe(speed):
    """It skips what its name says, and is far closer than fewer steps are."""
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)

    def drawn(steps: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(n) for n in range(5)]
        found = pipe(list(range(0, 35, 7)), num_inference_steps=steps, generator=generators, output_type="pt").images
        return torch.as_tensor(found).double()

    plain = drawn(50)
    with dittocache.enable(pipe, bundled.tuned("glyphs")[speed]) as cache:
        close = drawn(50)
        report = cache.report()
    assert report.ideal_speedup >= 0.95 * float(speed[:-1]) and not report.warnings
    fewer = drawn(round(50 / report.ideal_speedup))
    assert (close - plain).square().mean() < 0.25 * (fewer - plain).square().mean()


def test_those_of_the_package_are_those_of_the_benchmarks():
    assert list(bundled.tuned("glyphs")) == ["2x", "3x", "4x"] and not bundled.tuned("emoji")
    for speed, path in bundled.tuned("glyphs").items():
        assert Recipe.from_pretrained(path) == Recipe.from_pretrained(BENCHMARKS / speed)


def test_rows_are_for_their_number_of_steps():
    assert [row.label for row in tuned_rows("glyphs")] == ["tuned 2x", "tuned 3x", "tuned 4x"]
    assert tuned_rows("glyphs", 20) == tuned_rows("emoji") == []
