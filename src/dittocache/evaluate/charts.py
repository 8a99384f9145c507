"""Inline SVG: the chart of speed against quality, the heat maps of plans, and the markers that stand for methods.

Colours are CSS classes of the page (`m0`, `m1`, ... for methods in order of appearance, `plain` for fewer steps), so
that one picture serves the light and the dark scheme. Lengths are SVG user units, about one CSS pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from ..plan import Plan

SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "star", "hexagon")
PALETTE_SIZE = 7


@dataclass(frozen=True)
class Point:
    """One row of a comparison in the chart: x the measured speed-up with its spread, y the PSNR in dB."""

    label: str
    method: str
    look: str  # CSS class of the colour
    shape: str
    x: float
    x_low: float
    x_high: float
    y: float
    details: str


# ---- markers --------------------------------------------------------------------------------------------------------
def marker(shape: str, x: float, y: float, r: float = 5.5) -> str:
    """SVG of a filled marker around (x, y); shapes are of about equal area."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    star = [(n * math.pi / 5, 0.6 if n % 2 else 1.5) for n in range(10)]
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.25), (1.2, 0.85), (-1.2, 0.85)),
        "down": ((0, 1.25), (1.2, -0.85), (-1.2, -0.85)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "plus": (
            (-0.45, -1.2), (0.45, -1.2), (0.45, -0.45), (1.2, -0.45), (1.2, 0.45), (0.45, 0.45),
            (0.45, 1.2), (-0.45, 1.2), (-0.45, 0.45), (-1.2, 0.45), (-1.2, -0.45), (-0.45, -0.45),
        ),
        "star": [(out * math.sin(turn), -out * math.cos(turn)) for turn, out in star],
        "hexagon": [(1.1 * math.sin(n * math.pi / 3), -1.1 * math.cos(n * math.pi / 3)) for n in range(6)],
    }[shape]  # fmt: skip
    return '<path d="M' + "L".join(f"{x + a * r:.1f} {y + b * r:.1f}" for a, b in corners) + 'Z"/>'


def icon(look: str, shape: str) -> Markup:
    """A method's marker as a small picture of its own, to stand in running text."""
    return Markup(f'<svg class="icon {look}" viewBox="0 0 16 16" aria-hidden="true">{marker(shape, 8, 8)}</svg>')


# ---- speed against quality ------------------------------------------------------------------------------------------
def pareto(points: Sequence[Point], line: str, width: int, height: int) -> Markup:
    """Measured speed-up (x) against PSNR (y). The best points of the method `line` bound the shaded area: no better.

    Points of one method are joined; every point has its label beside it, its spread as a thin bar, and a `<title>`.
    """
    left, right, top, bottom = 46, 14, 40, 46
    x_start = min(1.0, math.floor(4 * min(p.x_low for p in points)) / 4)
    highest = max(1.1, *(p.x_high for p in points))
    x_end = highest + 0.06 * (highest - 1)
    low, high = min(p.y for p in points), max(p.y for p in points)
    y_start, y_end = low - 0.1 * (high - low) - 0.5, high + 0.1 * (high - low) + 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_start) / (x_end - x_start) * (width - left - right),
            top + (y_end - y) / (y_end - y_start) * (height - top - bottom),
        )

    floor, edge = height - bottom, width - right
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="group" class="chart" '
        'aria-label="Measured speed-up against PSNR; one point for every way of drawing">'
    ]
    for tick in ticks(x_start, x_end, width / 60):
        x, _ = at(tick, y_start)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{tick:g}×</text>')
    for tick in ticks(y_start, y_end, height / 70):
        _, y = at(1, tick)
        out.append(f'<line class="grid" x1="{left}" x2="{edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    out.append(f'<text class="axis" x="{edge}" y="{height - 9}" text-anchor="end">measured speed-up →</text>')
    out.append(f'<text class="axis" x="{left - 28}" y="13">↑ PSNR in dB, against uncached</text>')

    segments: list[tuple[float, float, float, float]] = []
    placed = [at(p.x, p.y) for p in points]
    for method in dict.fromkeys(p.method for p in points):
        run = sorted(at(p.x, p.y) for p in points if p.method == method)
        if method == line:  # what is slower and further than another of them is nobody's choice
            run = [a for a in run if not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in run)]
        look = next(p.look for p in points if p.method == method)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in run)
        if method == line and len(run) > 1:
            slow, _ = at(1, y_end)
            area = f"M{slow:.1f} {floor}L{slow:.1f} {run[0][1]:.1f}L{path}L{run[-1][0]:.1f} {floor}Z"
            out.append(f'<path class="worse" d="{area}"/>')
        out.append(f'<path class="join {look}" d="M{path}"/>')
        segments += [(*a, *b) for a, b in itertools.pairwise(run)]
        if method == line:
            (x0, _), y0, (x1, y1) = at(1, y_end), float(top), run[0]
            out.append(f'<line class="origin" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y0}" y2="{y1:.1f}"/>')
            out.append(f'<text class="tick" x="{x0 + 5:.1f}" y="{top - 6}">uncached, 1×</text>')
            segments += [(x0, y0, x1, y1), (x0, top - 10, x0 + 90, top - 10)]
    segments += [(*at(p.x_low, p.y), *at(p.x_high, p.y)) for p in points]

    labels = place_labels([p.label for p in points], placed, segments, (left, top, edge, floor))
    for p, (x, y), (text_x, text_y, anchor) in zip(points, placed, labels, strict=True):
        (x0, _), (x1, _) = at(p.x_low, p.y), at(p.x_high, p.y)
        out.append(
            f'<g class="point {p.look}" tabindex="0" role="img" aria-label="{escape(p.details)}" '
            f'data-details="{escape(p.details)}"><title>{escape(p.details)}</title>'
            f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="13"/>'
            f'<line class="spread" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{marker(p.shape, x, y)}'
            f'<text x="{text_x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}">{escape(p.label)}</text></g>'
        )
    out.append("</svg>")
    return Markup("".join(out))


def ticks(start: float, end: float, about: float) -> list[float]:
    """Round numbers in [start, end], about so many of them."""
    rough = (end - start) / max(about, 2)
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = math.ceil(start / step - 1e-9)
    return [round(k * step, 6) for k in range(first, math.floor(end / step + 1e-9) + 1)]


Box = tuple[float, float, float, float]  # left, top, right, bottom


def place_labels(
    texts: Sequence[str],
    points: Sequence[tuple[float, float]],
    segments: Iterable[tuple[float, float, float, float]],
    frame: Box,
    size: float = 13.0,
) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of a text beside every point, where it covers least of other texts, points, lines and the frame.

    Greedy, crowded points first; widths are estimated from the number of characters.
    """
    dots: list[Box] = [(x - 9, y - 9, x + 9, y + 9) for x, y in points]
    for x0, y0, x1, y1 in segments:
        count = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
        along = ((x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1))
        dots += [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in along]

    def candidates(text: str, x: float, y: float) -> Iterable[tuple[float, float, str, Box]]:
        width, low = 0.6 * size * len(text), 0.35 * size
        for far in (0.0, 9.0, 20.0):
            for dx, dy, anchor in (
                (11 + far, low, "start"),
                (-11 - far, low, "end"),
                (0, -12 - far, "middle"),
                (0, 12 + size * 0.75 + far, "middle"),
                (8 + far, -8 - far / 2, "start"),
                (8 + far, 8 + size * 0.7 + far / 2, "start"),
                (-8 - far, -8 - far / 2, "end"),
                (-8 - far, 8 + size * 0.7 + far / 2, "end"),
            ):
                start = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
                yield x + dx, y + dy, anchor, (start, y + dy - 0.8 * size, start + width, y + dy + 0.25 * size)

    def crowd(j: int) -> float:
        return sum(math.dist(points[j], other) < 60 for other in points)

    taken: list[Box] = []
    result: dict[int, tuple[float, float, str]] = {}
    for j in sorted(range(len(texts)), key=lambda j: -crowd(j)):
        choices = []
        for rank, (x, y, anchor, box) in enumerate(candidates(texts[j], *points[j])):
            cost = 9.0 * sum(_overlap(box, other) for other in taken)
            cost += 3.0 * sum(_overlap(box, dot) for dot in dots)
            cost += 50.0 * (_area(box) - _overlap(box, frame))
            choices.append((cost + 2.0 * rank, rank, (x, y, anchor), box))
        _, _, result[j], box = min(choices)
        taken.append(box)
    return [result[j] for j in range(len(texts))]


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


# ---- plans ----------------------------------------------------------------------------------------------------------
def shade(share: float) -> float:
    """Opacity for a share of tokens computed: reused faint, partial in between, all full."""
    if share in (0.0, 1.0):
        return 0.07 + 0.93 * share
    return 0.26 + 0.44 * math.sqrt(share)  # shares are often a few per cent: the root keeps them apart


def heat_map(plan: Plan, look: str, title: str, width: int = 360) -> Markup:
    """A plan: one column a step, one row a site, sites in groups by kind, darker where more is computed."""
    left, gap, heading = 26.0, 9.0, 15.0
    kinds = list(dict.fromkeys(plan.kinds))
    cell_w = (width - left) / len(plan.steps)
    cell_h = min(9.0, max(2.5, 190 / len(plan.sites)))
    cells: dict[float, list[str]] = {}
    texts: list[str] = []
    top = 3.0
    for kind in kinds:
        columns = np.flatnonzero(np.array(plan.kinds) == kind)
        height = max(cell_h, 7.0) if len(columns) == 1 else cell_h
        caption = {"stack": "stack of blocks", "": "sites"}.get(kind, kind.replace("-", " "))
        texts.append(f'<text class="kind" x="{left:g}" y="{top + 10:.1f}">{escape(caption)}</text>')
        top += heading
        for row, column in enumerate(columns):
            y = top + row * height
            box = f"h{cell_w - 0.8:.1f}v{height - 0.8:.1f}h{0.8 - cell_w:.1f}z"
            for step, share in enumerate(plan.table[:, column]):
                corner = f"M{left + step * cell_w + 0.4:.1f} {y + 0.4:.1f}"
                cells.setdefault(round(float(share), 3), []).append(corner + box)
            if len(columns) > 1 and row in (0, len(columns) - 1):
                texts.append(_tick(row, left - 5, y + height / 2 + 3.5, "end"))
        top += len(columns) * height + gap
    last = len(plan.steps) - 1
    for step in range(0, last, max(1, round(len(plan.steps) / 50) * 10)):
        if last - step > 0.08 * last:
            texts.append(_tick(plan.steps[step], left + (step + 0.5) * cell_w, top + 5, "middle"))
    texts.append(_tick(plan.steps[last], float(width), top + 5, "end"))
    paths = [
        f'<path d="{"".join(parts)}" fill-opacity="{shade(share):.2f}"/>' for share, parts in sorted(cells.items())
    ]
    return Markup(
        f'<svg viewBox="0 0 {width} {top + 10:.0f}" role="img" class="heat {look}"><title>{escape(title)}</title>'
        + "".join(paths + texts)
        + "</svg>"
    )


def _tick(number: int, x: float, y: float, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{number}</text>'


def step_kinds(plan: Plan) -> str:
    """How many steps computed all, some and nothing, in words."""
    full = (plan.table == 1).all(1)
    none = (plan.table == 0).all(1)
    counts = ((int(full.sum()), "full"), (int((~full & ~none).sum()), "partial"), (int(none.sum()), "reused"))
    return " · ".join(f"{count} {name}" for count, name in counts if count) + " steps"
