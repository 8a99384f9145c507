"""One self-contained HTML page of a comparison: no network, no fonts from elsewhere, readable without JavaScript."""

from __future__ import annotations

import json
import math
import re
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..plan import Plan
from . import charts, findings
from .comparison import FEWER_STEPS, UNCACHED, Comparison, Result, Score
from .findings import Measure
from .sheet import DIFFERENCE_RANGE, chosen, data_uri, difference_map, layout, sheet

SIZES = (("wide", 1080, 480), ("narrow", 380, 480))  # every chart is drawn twice, for laptops and for telephones
SPAN = 20  # an error that spans more than so many times its least value gets a logarithmic axis
# of the provenance, what the page says in a line of its own
SAID = (
    *("command", "date", "model", "network", "scheduler", "steps", "guidance_scale", "chunk", "machine", "threads"),
    *("cores", "load", "versions", "baseline", "tried", "measures", "others", "name"),
)
Look = tuple[str, str]  # CSS class of the colour, shape of the marker


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Writes the page to `path` and returns it.

    Raises:
        ValueError: the comparison does not say how it was made.
    """
    from jinja2 import UndefinedError

    try:
        text = render(comparison)
    except UndefinedError as error:
        raise ValueError(f"damaged comparison: its provenance is incomplete ({error})") from None
    path = Path(path)
    path.write_text(text, encoding="utf-8")
    return path


def render(comparison: Comparison) -> str:
    """The page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "size": size, "pretty": pretty}
    looks, measures, made = method_looks(comparison), findings.measures(comparison), comparison.provenance
    pictures = comparison.pictures[comparison.reference.label]
    columns, lines = layout(max(pictures.shape[1:3]))
    shown = chosen(len(pictures), columns * lines)
    rows = [_row(comparison, result, looks[result.method], measures, shown, columns) for result in comparison.results]
    best = findings.best(comparison)
    return environment.get_template("report.html.j2").render(
        headline=findings.headline(comparison),
        best=next((row for row in rows if best and row["result"] is best[0]), None),
        rows=rows,
        shown=[comparison.labels[j] for j in shown],
        count=len(comparison.labels),
        reference=comparison.reference,
        measures=measures,
        has_intervals=any(s["low"] is not None for r in comparison.results for s in r.scores.values()),
        has_fewer=any(result.method == FEWER_STEPS for result in comparison.results),
        charts=_charts(comparison, looks, measures),
        tiny=max(pictures.shape[1:3]) < 128,
        tried=made.get("tried", []),
        step_charts=_step_charts(comparison, looks),
        plans=_plans(comparison, looks),
        most_bytes=max(result.bytes_peak for result in comparison.results),
        deltas=_deltas(comparison, measures),
        difference_range=f"{100 * DIFFERENCE_RANGE:.0f} %",
        seeds=_ranges(comparison.seeds),
        provenance=made,
        runs=[made, *made.get("others", [])],
        more={name: v for name, v in made.items() if name not in SAID and isinstance(v, (str, int, float))},
        data=_script(comparison.to_dict()),
    )


def method_looks(comparison: Comparison) -> dict[str, Look]:
    """Colour class and marker shape of every method, the same all over the page; no two alike up to 49 of them."""
    looks = {UNCACHED: ("plain", "circle"), FEWER_STEPS: ("plain", "circle")}
    shapes = charts.SHAPES[1:]
    methods = [r.method for r in comparison.results if r.method not in looks]
    for j, method in enumerate(dict.fromkeys(methods)):
        looks[method] = (f"m{j % charts.PALETTE_SIZE}", shapes[(j + j // charts.PALETTE_SIZE) % len(shapes)])
    return looks


def _row(
    comparison: Comparison, result: Result, look: Look, measures: list[Measure], shown: list[int], columns: int
) -> dict[str, Any]:
    pictures = comparison.pictures[result.label][shown]
    reference = comparison.pictures[comparison.reference.label][shown]
    is_reference = result is comparison.reference
    scores = [(measure, result.score(measure.name)) for measure in measures]
    return {
        "result": result,
        "look": look[0],
        "icon": charts.icon(*look),
        "is_reference": is_reference,
        "gain": findings.gain(comparison, result) if result.method not in (UNCACHED, FEWER_STEPS) else None,
        "scores": [{"text": m.text(s["value"] if s else None), "interval": _interval(m, s)} for m, s in scores],
        "first": next((f"{m.text(s['value'])} {m.unit}".strip() for m, s in scores if s), ""),
        "pictures": data_uri(sheet(pictures, columns)),
        "differences": None if is_reference else data_uri(sheet(difference_map(pictures, reference), columns)),
        "seconds": sum(result.seconds),
    }


def _interval(measure: Measure, score: Score | None) -> str:
    if score is None or score["low"] is None or score["high"] is None:
        return ""
    return f"{measure.text(score['low'])} to {measure.text(score['high'])}"


# ---- charts ---------------------------------------------------------------------------------------------------------
def _charts(comparison: Comparison, looks: dict[str, Look], measures: list[Measure]) -> list[dict[str, Any]]:
    """The chart of speed against quality for every measure, in both sizes."""
    reference = comparison.reference
    seconds = sum(reference.seconds) / len(comparison.labels)
    result = []
    for measure in measures:
        points = _points(comparison, looks, measure)
        if not points:
            continue
        values = [end for p in points for end in (p.y, p.y_low, p.y_high)]
        log = measure.error and min(values) > 0 and max(values) > SPAN * min(values)
        axis = charts.Axis(measure.full_title, measure.lower, log, measure.share)
        tried = [charts.Tried(t["x"], t["y"], str(t["label"])) for t in comparison.provenance.get("tried", [])]
        tried = tried if measure.name == "psnr" else []
        line = (UNCACHED, FEWER_STEPS)
        svgs = [(name, charts.pareto(points, axis, line, w, h, seconds, tried)) for name, w, h in SIZES]
        result.append({"measure": measure, "svgs": svgs})
    return result


def _points(comparison: Comparison, looks: dict[str, Look], measure: Measure) -> list[charts.Point]:
    points = []
    for result in comparison.results:
        score = result.score(measure.name)
        if score is None or not math.isfinite(score["value"]):
            continue
        low, high = score["low"], score["high"]
        inside = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
        look, shape = looks[result.method]
        points.append(
            charts.Point(
                label=result.label,
                method=result.method,
                look=look,
                shape=shape,
                x=result.speedup,
                x_low=result.speedup_low,
                x_high=result.speedup_high,
                y=score["value"],
                y_low=low if inside and low is not None else score["value"],
                y_high=high if inside and high is not None else score["value"],
                recipe=result.summary,
                numbers=_numbers(result, measure, score),
            )
        )
    return points if any(p.label != comparison.reference.label for p in points) else []


def _numbers(result: Result, measure: Measure, score: Score) -> str:
    """What a point of the chart says, in words."""
    interval = _interval(measure, score)
    return (
        f"{result.speedup:.2f}× measured ({result.speedup_low:.2f} to {result.speedup_high:.2f}), "
        + f"{measure.title} {measure.text(score['value'])} {measure.unit}".rstrip()
        + (f" (95 %: {interval})" if interval else "")
        + f", {100 * result.compute_fraction:.0f} % of the compute, cache memory {size(result.bytes_peak)}"
    )


def _step_charts(comparison: Comparison, looks: dict[str, Look]) -> list[tuple[str, Markup]]:
    """Error against step, in both sizes; empty where nothing was measured."""
    found = [(r, r.step_errors) for r in comparison.results if r.step_errors and max(r.step_errors) > 0]
    found = [(r, errors) for r, errors in found if len(errors) == comparison.reference.steps]
    if not found:
        return []
    numbers = {method: count() for method in looks}
    lines = [
        charts.Line(
            label=r.label,
            look=looks[r.method][0],
            shape=looks[r.method][1],
            dash=next(numbers[r.method]) % charts.DASHES,
            values=errors,
            recipe=r.summary,
            numbers=f"relative error {_share(errors[-1])} after the last step, "
            f"at most {_share(max(errors))}, after step {errors.index(max(errors)) + 1}",
        )
        for r, errors in found
    ]
    return [(name, charts.step_lines(lines, width, height - 60)) for name, width, height in SIZES]


def _plans(comparison: Comparison, looks: dict[str, Look]) -> list[list[dict[str, Any]]]:
    """The heat maps, one list for every method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in comparison.results:
        if result.plan is None:
            continue
        plan = Plan.from_dict(result.plan)
        look, shape = looks[result.method]
        words = charts.step_kinds(plan)
        title = f"Plan of {result.label}: {words}, {100 * result.compute_fraction:.0f} % of the compute"
        groups.setdefault(result.method, []).append(
            {
                "result": result,
                "icon": charts.icon(look, shape),
                "words": words,
                "svg": charts.heat_map(plan, look, title),
            }
        )
    return list(groups.values())


# ---- paired differences ---------------------------------------------------------------------------------------------
def _deltas(comparison: Comparison, measures: list[Measure]) -> dict[str, Any] | None:
    """The table of paired differences to the baseline: measures, and by label a cell for each; None without any."""
    known = {measure.name: measure for measure in measures}
    names = [name for name in known if any(name in r.deltas for r in comparison.results)]
    if not names:
        return None
    cells = {
        r.label: [_delta(known[name], r.deltas.get(name)) for name in names] for r in comparison.results if r.deltas
    }
    return {"measures": [known[name] for name in names], "cells": cells}


def _delta(measure: Measure, delta: Score | None) -> dict[str, str]:
    """Text, interval and verdict of a paired difference: better or worse only if the interval leaves zero out."""
    if delta is None:
        return {"text": "–", "interval": "", "verdict": ""}
    low, high, value = delta["low"], delta["high"], delta["value"]
    verdict = ""
    if low is not None and high is not None:
        up, down = ("worse", "better") if measure.lower else ("better", "worse")
        verdict = up if low > 0 else down if high < 0 else "even"
    sign = "+" if value > 0 else ""
    return {"text": sign + measure.text(value), "interval": _interval(measure, delta), "verdict": verdict}


# ---- text -----------------------------------------------------------------------------------------------------------
def number(value: float | None, digits: int = 2, none: str = "–") -> str:
    """A number for the table; a dash where there is none."""
    if value is None:
        return none
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign, a true minus."""
    return number(value) if value is None else f"{value:+.{digits}f}".replace("-", "−")


def size(count: int) -> str:
    """Bytes in words."""
    for unit, amount in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= amount:
            return f"{count / amount:.1f} {unit}"
    return f"{count} B" if count else "–"


def pretty(data: Any) -> str:
    """JSON for people: indented, but lists of plain values in one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 1 else f"{100 * value:.0f} %"


def _ranges(seeds: tuple[int, ...]) -> str:
    """Seeds in words, short where they count up."""
    if len(seeds) > 2 and seeds == tuple(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}, one for each picture"
    return ", ".join(map(str, seeds))


def _script(data: dict[str, Any]) -> Markup:
    """JSON that can stand inside a `<script>` element."""
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
