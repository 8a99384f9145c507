"""One self-contained HTML page of a comparison: no network, no fonts from elsewhere, readable without JavaScript."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..plan import Plan
from . import charts, findings
from .comparison import FEWER_STEPS, UNCACHED, Comparison, Result

CARD_COLUMNS, CARD_ROWS = 4, 3  # pictures on a card
DIFFERENCE_RANGE = 0.25  # difference at which the colours of a difference map end
DARKER, LIGHTER = (84, 39, 136), (217, 119, 6)  # ends of the diverging colours; white is no difference


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
    environment.filters |= {"number": number, "signed": signed, "size": size}
    looks = method_looks(comparison)
    rows = [_row(comparison, result, *looks[result.method]) for result in comparison.results]
    points = _points(comparison, looks)
    best = findings.best(comparison)
    return environment.get_template("report.html.j2").render(
        headline=findings.headline(comparison),
        best=next((row for row in rows if best and row["result"] is best[0]), None),
        rows=rows,
        shown=[comparison.labels[j] for j in shown_pictures(len(comparison.labels))],
        count=len(comparison.labels),
        reference=comparison.reference,
        has_judge=any(result.accuracy is not None for result in comparison.results),
        charts=[
            ("wide", charts.pareto(points, FEWER_STEPS, 1080, 460)),
            ("narrow", charts.pareto(points, FEWER_STEPS, 380, 460)),
        ]
        if points
        else [],
        plans=_plans(comparison, looks),
        difference_range=f"{DIFFERENCE_RANGE:.0%}",
        seeds=_ranges(comparison.seeds),
        provenance=comparison.provenance,
        data=_script(comparison.to_dict()),
    )


def method_looks(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Colour class and marker shape of every method, the same all over the page."""
    looks = {UNCACHED: ("plain", "circle"), FEWER_STEPS: ("plain", "circle")}
    methods = [r.method for r in comparison.results if r.method not in looks]
    for j, method in enumerate(dict.fromkeys(methods)):
        looks[method] = (f"m{j % charts.PALETTE_SIZE}", charts.SHAPES[1 + j % (len(charts.SHAPES) - 1)])
    return looks


def _row(comparison: Comparison, result: Result, look: str, shape: str) -> dict[str, Any]:
    pictures = comparison.pictures[result.label]
    reference = comparison.pictures[comparison.reference.label]
    chosen = shown_pictures(len(pictures))
    return {
        "result": result,
        "look": look,
        "icon": charts.icon(look, shape),
        "is_reference": result is comparison.reference,
        "gain": findings.gain(comparison, result) if result.method not in (UNCACHED, FEWER_STEPS) else None,
        "pictures": data_uri(sheet(pictures[chosen])),
        "differences": data_uri(sheet(difference_map(pictures[chosen], reference[chosen]))),
        "seconds": sum(result.seconds),
    }


def _points(comparison: Comparison, looks: dict[str, tuple[str, str]]) -> list[charts.Point]:
    return [
        charts.Point(
            label=result.label,
            method=result.method,
            look=looks[result.method][0],
            shape=looks[result.method][1],
            x=result.speedup,
            x_low=result.speedup_low,
            x_high=result.speedup_high,
            y=result.psnr,
            details=f"{result.label} ({result.summary}): {result.speedup:.2f}× measured "
            f"({result.speedup_low:.2f} to {result.speedup_high:.2f}), {result.psnr:.1f} dB, "
            f"{result.compute_fraction:.0%} of the compute",
        )
        for result in comparison.results
        if result.psnr is not None and math.isfinite(result.psnr)
    ]


def _plans(comparison: Comparison, looks: dict[str, tuple[str, str]]) -> list[list[dict[str, Any]]]:
    """The heat maps, one list for every method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in comparison.results:
        if result.plan is None:
            continue
        plan = Plan.from_dict(result.plan)
        look, shape = looks[result.method]
        words = charts.step_kinds(plan)
        title = f"Plan of {result.label}: {words}, {result.compute_fraction:.0%} of the compute"
        groups.setdefault(result.method, []).append(
            {
                "result": result,
                "icon": charts.icon(look, shape),
                "words": words,
                "svg": charts.heat_map(plan, look, title),
            }
        )
    return list(groups.values())


# ---- pictures -------------------------------------------------------------------------------------------------------
def shown_pictures(count: int) -> list[int]:
    """Indices of the pictures on a card: evenly spaced, none chosen by hand."""
    room = CARD_COLUMNS * CARD_ROWS
    return list(range(count)) if count <= room else [j * count // room for j in range(room)]


def sheet(pictures: np.ndarray, columns: int = CARD_COLUMNS) -> np.ndarray:
    """Pictures uint8 [n, h, w, c] in rows of so many: one picture [rows * h, columns * w, c], white where empty."""
    n, h, w, c = pictures.shape
    rows = -(-n // columns)
    full = np.full((rows * columns, h, w, c), 255, dtype=np.uint8)
    full[:n] = pictures
    return full.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def difference_map(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Where pictures are darker or lighter than their references: uint8 [n, h, w, c] twice -> colours [n, h, w, 3]."""
    difference = (pictures.astype(np.float64) - references).mean(-1, keepdims=True) / 255
    strength = np.clip(np.abs(difference) / DIFFERENCE_RANGE, 0, 1)
    ends = np.where(difference < 0, np.array(DARKER), np.array(LIGHTER))
    return np.rint(255 + strength * (ends - 255)).astype(np.uint8)


def data_uri(picture: np.ndarray) -> str:
    """A PNG of a uint8 array [h, w, 1 or 3], as text that an `<img>` shows."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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


def _ranges(seeds: tuple[int, ...]) -> str:
    """Seeds in words, short where they count up."""
    if len(seeds) > 2 and seeds == tuple(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}, one for each picture"
    return ", ".join(map(str, seeds))


def _script(data: dict[str, Any]) -> Markup:
    """JSON that can stand inside a `<script>` element."""
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
