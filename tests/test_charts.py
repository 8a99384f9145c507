"""The arithmetic of the charts: axes that point to the better, labels that keep apart, lines that stay in the frame."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dittocache.evaluate import charts


def point(label: str, x: float, y: float, method: str = "fora", **more) -> charts.Point:
    values = {"x_low": x, "x_high": x, "y_low": y, "y_high": y, "recipe": f"{method}()", "numbers": "words"} | more
    return charts.Point(label=label, method=method, look="m0", shape="square", x=x, y=y, **values)


def places(svg: str) -> dict[str, tuple[float, float]]:
    """Where the marks of a chart stand, by label: the middle of their halo."""
    found = re.findall(r'data-label="([^"]*)".*?class="halo" cx="([^"]*)" cy="([^"]*)"', svg)
    return {label: (float(x), float(y)) for label, x, y in found}


def chart(points, axis=None, **more) -> str:
    return str(charts.pareto(points, axis or charts.Axis("PSNR"), ("fewer",), 1000, 400, 1.0, **more))


def test_faster_is_right_and_better_is_up():
    higher = places(chart([point("a", 1.5, 40), point("b", 3, 20)]))
    assert higher["a"][0] < higher["b"][0] and higher["a"][1] < higher["b"][1]
    lower = places(chart([point("a", 1.5, 40), point("b", 3, 20)], charts.Axis("error", lower=True)))
    assert lower["a"][1] > lower["b"][1]


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios():
    axis = charts.Axis("error", lower=True, log=True)
    at = places(chart([point("a", 1, 0.001), point("b", 2, 0.01), point("c", 3, 0.1)], axis))
    assert at["a"][1] - at["b"][1] == pytest.approx(at["b"][1] - at["c"][1], abs=0.2)
    assert at["a"][1] < at["b"][1]
    assert axis.ticks(1, 3, 2) == [(3, "0.001"), (2, "0.01"), (1, "0.1")]


def test_ticks_of_tiny_values():
    found = [text for _, text in charts.Axis("error", log=True).ticks(-15.5, -13.5, 4)]
    assert found == ["5e-16", "1e-15", "2e-15", "5e-15", "1e-14", "2e-14"]


def test_shares_are_written_in_per_cent():
    assert [text for _, text in charts.Axis("accuracy", share=True).ticks(0.5, 1, 5)][-1] == "100 %"


def test_one_outlier_of_the_clock_does_not_squeeze_the_chart():
    calm = places(chart([point("a", 1.5, 40), point("b", 3, 20)]))
    wild = chart([point("a", 1.5, 40), point("b", 3, 20, x_high=40.0)])
    assert places(wild)["b"][0] > 0.75 * calm["b"][0]
    assert max(float(x) for x in re.findall(r'class="spread" x1="[^"]*" x2="([^"]*)"', wild)) <= 1000 - 16 + 0.1


def test_equal_values_are_a_chart():
    assert len(places(chart([point("a", 1, 1.0), point("b", 1, 1.0)]))) == 2


def test_what_was_tried_stands_in_the_same_axes():
    svg = chart([point("a", 1.5, 40), point("b", 3, 20)], tried=[charts.Tried(3, 20, "again"), charts.Tried(9, 1, "c")])
    mark = re.search(r'data-label="again".*?cx="([^"]*)" cy="([^"]*)"', svg)
    assert (float(mark[1]), float(mark[2])) == places(svg)["b"]


def test_names_are_escaped():
    assert "<x" not in chart([point("<x", 1, 2), point("b", 2, 1)], charts.Axis("<x"))


# ---- error against step ---------------------------------------------------------------------------------------------
def line(label: str, values) -> charts.Line:
    return charts.Line(label, "m0", "square", 0, values, "fora()", "words")


def test_lines_leave_out_zeros_and_what_lies_far_below():
    svg = str(charts.step_lines([line("a", (0.0, 1e-9, 0.01, 0.1)), line("none", (0.0,) * 4)], 1000, 400))
    strokes = re.findall(r'class="stroke" d="M([^"]*)"', svg)
    assert [len(stroke.split("L")) for stroke in strokes] == [2]


def test_larger_errors_are_higher_and_later_steps_right():
    svg = str(charts.step_lines([line("a", (0.01, 0.02, 0.1))], 1000, 400))
    stroke = re.search(r'class="stroke" d="M([^"]*)"', svg)[1]
    points = np.array([[float(v) for v in p.split()] for p in stroke.split("L")])
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) < 0).all()


def test_places_are_spread_apart_in_their_order_and_no_more_than_needed():
    assert charts.spread([10, 50, 90], 16) == [10, 50, 90]
    moved = charts.spread([50, 48, 52, 200], 16)
    assert moved == pytest.approx([50, 34, 66, 200])
    crowd = charts.spread([5.0] * 9, 16)
    assert np.diff(sorted(crowd)).min() == pytest.approx(16) and np.mean(crowd) == pytest.approx(5)
