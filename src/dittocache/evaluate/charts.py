"""Inline SVG: speed against quality, error against step, the heat maps of plans, the markers that stand for methods.

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
DASHES = 4  # patterns of lines, CSS classes d0 to d3


@dataclass(frozen=True)
class Axis:
    """An axis that points upwards to the better.

    Args:
        title: name and unit of the measure.
        lower: less is better, so that the axis is turned round.
        log: logarithmic, for errors of several magnitudes.
        share: values are written in per cent.
    """

    title: str
    lower: bool = False
    log: bool = False
    share: bool = False

    def up(self, value: float) -> float:
        """Height of a value: larger is better."""
        height = math.log10(value) if self.log else value
        return -height if self.lower else height

    def ticks(self, bottom: float, top: float, about: float) -> list[tuple[float, str]]:
        """(height, text) of about so many round values between two heights."""
        if self.lower:
            bottom, top = -top, -bottom
        if self.log:
            whole = range(math.floor(bottom), math.ceil(top) + 1)
            within = (1, 2, 5) if (top - bottom) * 3 <= 1.5 * about else (1,)
            values = [float(f"{d}e{n}") for n in whole for d in within]
            values = [value for value in values if bottom <= math.log10(value) <= top]
        else:
            values = ticks(bottom, top, about)
        return [(self.up(value), f"{100 * value:g} %" if self.share else f"{value:g}") for value in values]


@dataclass(frozen=True)
class Point:
    """One row of a comparison in the chart: x the measured speed-up with its spread, y a measure with its interval."""

    label: str
    method: str
    look: str  # CSS class of the colour
    shape: str
    x: float
    x_low: float
    x_high: float
    y: float
    y_low: float
    y_high: float
    recipe: str  # in one line
    numbers: str  # in words


@dataclass(frozen=True)
class Tried:
    """A further point of a search: speed-up, measure, what it was."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """Error after every step of one row; `dash` numbers the rows of a method."""

    label: str
    look: str
    shape: str
    dash: int
    values: Sequence[float]
    recipe: str
    numbers: str


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
def pareto(
    points: Sequence[Point],
    axis: Axis,
    line: Sequence[str],
    width: int,
    height: int,
    seconds: float,
    tried: Sequence[Tried] = (),
) -> Markup:
    """Measured speed-up (x) against a measure (y, the better the higher).

    Points of one method are joined; every point has its label beside it, its spreads as thin bars, and a `<title>`.

    Args:
        points: one for every row, all of finite values.
        axis: of the measure.
        line: methods, in order, that are joined to one line; its best points bound the shaded area: no better.
        width, height: in pixels.
        seconds: what a picture takes at 1x, for the second line of the scale.
        tried: faint marks without label.
    """
    left, right, top, bottom = 54, 16, 40, 60
    slowest, fastest = min(1.0, *(p.x for p in points)), max(1.1, *(p.x for p in points), *(t.x for t in tried))
    reach = fastest + 0.25 * (fastest - slowest)  # one bad outlier of the clock must not squeeze all points together
    x_start = max(math.floor(4 * min(1.0, *(p.x_low for p in points))) / 4, slowest - 0.25 * (fastest - slowest))
    x_end = min(max(fastest, *(p.x_high for p in points)), reach) + 0.06 * (fastest - slowest)
    heights = [axis.up(y) for p in points for y in (p.y, p.y_low, p.y_high)] + [axis.up(t.y) for t in tried]
    low, high = min(heights), max(heights)
    pad = 0.1 * (high - low) or 0.05 * abs(high) or 0.5
    y_start, y_end = low - 1.3 * pad, high + pad

    def at(x: float, y: float) -> tuple[float, float]:
        x = min(max(x, x_start), x_end)  # of spreads that leave the chart
        return (
            left + (x - x_start) / (x_end - x_start) * (width - left - right),
            top + (y_end - axis.up(y)) / (y_end - y_start) * (height - top - bottom),
        )

    floor, edge = height - bottom, width - right
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="group" class="chart" '
        f'aria-label="Measured speed-up against {escape(axis.title)}; one point for every way of drawing">'
    ]
    for tick in ticks(x_start, x_end, width / 80):
        x = left + (tick - x_start) / (x_end - x_start) * (edge - left)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        out.append(_text(f"{tick:g}×", x, floor + 18, "middle"))
        if tick > 0:
            out.append(_text(_seconds(seconds / tick), x, floor + 34, "middle", "tick faint"))
    for tick, text in axis.ticks(y_start, y_end, height / 70):
        y = top + (y_end - tick) / (y_end - y_start) * (floor - top)
        out.append(f'<line class="grid" x1="{left}" x2="{edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(text, left - 8, y + 4, "end"))
    out.append(_text("measured speed-up, and about the time for a picture →", edge, height - 7, "end", "axis"))
    out.append(_text(f"↑ {axis.title}" + (", less is better" if axis.lower else ""), 6, 13, "start", "axis"))

    segments: list[tuple[float, float, float, float]] = []
    placed = [at(p.x, p.y) for p in points]
    for methods in dict.fromkeys(tuple(line) if p.method in line else (p.method,) for p in points):
        run = sorted((at(p.x, p.y) for p in points if p.method in methods), key=lambda a: (a[0], -a[1]))
        look = next(p.look for p in points if p.method in methods)
        if methods == tuple(line):  # what is slower and further than another of them is nobody's choice
            run = [a for a in run if not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in run)]
            slow = left + (1 - x_start) / (x_end - x_start) * (edge - left)
            joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in run)
            begin = min(slow, run[0][0])
            area = f"M{begin:.1f} {floor}L{begin:.1f} {run[0][1]:.1f}L{joined}L{run[-1][0]:.1f} {floor}Z"
            out.append(f'<path class="worse" d="{area}"/>')
            if run[0][0] > slow + 1:  # the reference itself stands nowhere: it is infinitely good
                out.append(
                    f'<line class="origin" x1="{slow:.1f}" x2="{run[0][0]:.1f}" y1="{top}" y2="{run[0][1]:.1f}"/>'
                )
                out.append(_text("uncached, 1×", slow + 5, top - 6))
                segments += [(slow, top, *run[0]), (slow, top - 10, slow + 90, top - 10)]
        out.append(f'<path class="join {look}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in run)}"/>')
        segments += [(*a, *b) for a, b in itertools.pairwise(run)]
    segments += [(*at(p.x_low, p.y), *at(p.x_high, p.y)) for p in points]
    segments += [(*at(p.x, p.y_low), *at(p.x, p.y_high)) for p in points]

    for t in tried:
        x, y = at(t.x, t.y)
        out.append(
            f'<g class="tried" {_data(t.label, "tried by the search", f"{t.x:.2f}×, {axis.title} {t.y:.4g}")}>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
        )
    labels = place_labels([p.label for p in points], placed, segments, (left, top, edge, floor))
    for p, (x, y), (text_x, text_y, anchor) in zip(points, placed, labels, strict=True):
        (x0, _), (x1, _), (_, y0), (_, y1) = at(p.x_low, p.y), at(p.x_high, p.y), at(p.x, p.y_low), at(p.x, p.y_high)
        out.append(
            f'<g class="point {p.look}" tabindex="0" role="img" {_data(p.label, p.recipe, p.numbers)}>'
            f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="13"/>'
            f'<line class="spread" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="spread" x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/>{marker(p.shape, x, y)}'
            f'<text x="{text_x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}">{escape(p.label)}</text></g>'
        )
    out.append("</svg>")
    return Markup("".join(out))


def _data(label: str, recipe: str, numbers: str) -> str:
    """Attributes of a mark: what is read aloud, and what the page shows when it is pointed at."""
    words = f"{label}: {recipe}; {numbers}"
    parts = {"aria-label": words, "data-label": label, "data-recipe": recipe, "data-numbers": numbers}
    return " ".join(f'{name}="{escape(text)}"' for name, text in parts.items())


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.{0 if value >= 0.01 else 1}f} ms"


def _text(text: str, x: float, y: float, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


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


# ---- error against step ---------------------------------------------------------------------------------------------
DECADES = 3  # of errors in the chart; smaller ones lie below it


def step_lines(lines: Sequence[Line], width: int, height: int) -> Markup:
    """Error after every step (logarithmic), one line for every row, with its label at its end.

    Args:
        lines: of one length; at least one value is above zero.
        width, height: in pixels; the height grows with the number of lines.
    """
    height = max(height, 100 + 17 * len(lines))
    room = 18 + 7.2 * max(len(line.label) for line in lines)
    left, right, top, bottom = 54.0, width - room, 34.0, height - 46.0
    values = [value for line in lines for value in line.values if value > 0]
    high = math.log10(max(values))
    low = max(math.log10(min(values)), high - DECADES) - 0.05
    high = max(high, low + 0.3) + 0.1
    steps = len(lines[0].values)
    axis = Axis("", log=True, share=True)

    def at(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step / (steps - 1) if steps > 1 else 0.5)
        return x, top + (high - math.log10(value)) / (high - low) * (bottom - top)

    out = [
        f'<svg viewBox="0 0 {width} {height}" role="group" class="chart lines" '
        'aria-label="Relative error of the latents after every step; one line for every row">'
    ]
    for tick, text in axis.ticks(low, high, height / 70):
        _, y = at(0, 10**tick)
        out.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(text, left - 8, y + 4, "end"))
    for step in dict.fromkeys([0, *(round(n) - 1 for n in ticks(1, steps, width / 130) if n > 1)]):
        x, _ = at(step, 10**high)
        out.append(_text(str(step + 1), x, bottom + 18, "middle"))
    out.append(_text("denoising step →", right, height - 7, "end", "axis"))
    out.append(_text("↑ relative error of the latents", 6, 13, "start", "axis"))

    drawn = [[(*at(n, v), v) for n, v in enumerate(line.values) if v > 0 and math.log10(v) >= low] for line in lines]
    ends = [(run[-1][:2] if run else (right, bottom)) for run in drawn]
    for j, (line, run, end, label_y) in enumerate(
        zip(lines, drawn, ends, spread([y for _, y in ends], 16), strict=True)
    ):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in run)
        every = max(1, len(run) // 5)
        marks = "".join(marker(line.shape, x, y, 3.6) for x, y, _ in run[(2 * j) % every :: every])
        out.append(
            f'<g class="line {line.look} d{line.dash}" tabindex="0" role="img" '
            f"{_data(line.label, line.recipe, line.numbers)}>"
            f'<path class="wide-hit" d="M{path}"/><path class="stroke" d="M{path}"/>{marks}'
            f'<path class="leader" d="M{end[0]:.1f} {end[1]:.1f}L{right + 14:.1f} {label_y:.1f}"/>'
            f'<text x="{right + 18:.1f}" y="{label_y + 4:.1f}">{escape(line.label)}</text></g>'
            if path
            else ""
        )
    out.append("</svg>")
    return Markup("".join(out))


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Places moved as little as they must be to stand so far apart, in the same order (pool adjacent violators)."""
    order = sorted(range(len(places)), key=lambda j: places[j])
    pools: list[tuple[float, int]] = []  # mean of place - rank * apart, members
    for rank, j in enumerate(order):
        mean, count = places[j] - rank * apart, 1
        while pools and pools[-1][0] > mean:
            other, members = pools.pop()
            mean, count = (mean * count + other * members) / (count + members), count + members
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    result = [0.0] * len(places)
    for rank, j in enumerate(order):
        result[j] = flat[rank] + rank * apart
    return result


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
                texts.append(_text(str(row), left - 5, y + height / 2 + 3.5, "end"))
        top += len(columns) * height + gap
    last = len(plan.steps) - 1
    for step in range(0, last, max(1, round(len(plan.steps) / 50) * 10)):
        if last - step > 0.08 * last:
            texts.append(_text(str(plan.steps[step]), left + (step + 0.5) * cell_w, top + 5, "middle"))
    texts.append(_text(str(plan.steps[last]), float(width), top + 5, "end"))
    paths = [
        f'<path d="{"".join(parts)}" fill-opacity="{shade(share):.2f}"/>' for share, parts in sorted(cells.items())
    ]
    return Markup(
        f'<svg viewBox="0 0 {width} {top + 10:.0f}" role="img" class="heat {look}"><title>{escape(title)}</title>'
        + "".join(paths + texts)
        + "</svg>"
    )


def step_kinds(plan: Plan) -> str:
    """How many steps computed all, some and nothing, in words."""
    full = (plan.table == 1).all(1)
    none = (plan.table == 0).all(1)
    counts = ((int(full.sum()), "full"), (int((~full & ~none).sum()), "partial"), (int(none.sum()), "reused"))
    return " · ".join(f"{count} {name}" for count, name in counts if count) + " steps"
