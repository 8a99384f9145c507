"""What a comparison says: its measures, and caching against the plain alternative, fewer steps in the same time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .comparison import FEWER_STEPS, OPTIONAL, UNCACHED, Comparison, Result


# ---- measures -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measure:
    """What is measured of a row's pictures.

    Args:
        name: in `Result.scores`, or a field of `Result`.
        title: for people. unit: after a number.
        lower: less is better.
        digits: behind the point.
        share: a share of one, written in per cent.
        error: is zero for no error and may span magnitudes.
    """

    name: str
    title: str
    unit: str = ""
    lower: bool = False
    digits: int = 3
    share: bool = False
    error: bool = False

    @property
    def full_title(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, value: float | None) -> str:
        """A value without its unit; a dash where there is none."""
        if value is None:
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        if self.share:
            return f"{100 * value:.0f} %"
        small = self.error and 0 < abs(value) < 10**-self.digits
        return (f"{value:.1e}" if small else f"{value:.{self.digits}f}").replace("-", "−")


MEASURES = (
    Measure("psnr", "PSNR", "dB", digits=1),
    Measure("ssim", "SSIM", digits=4),
    Measure("lpips", "LPIPS", lower=True, error=True),
    Measure("latent error", "Latent error", lower=True, error=True),
    Measure("frechet", "Fréchet distance", lower=True, digits=2, error=True),
    Measure("fid", "FID", lower=True, digits=2, error=True),
    Measure("sfid", "sFID", lower=True, digits=2, error=True),
    Measure("inception score", "Inception score", digits=1),
    Measure("precision", "Precision"),
    Measure("recall", "Recall"),
    Measure("accuracy", "Read as its label", share=True),
    Measure("clip score", "CLIP score", digits=2),
    Measure("image reward", "ImageReward"),
)


def measures(comparison: Comparison) -> list[Measure]:
    """What was measured of the rows: the known measures in their order, then others by their name.

    `provenance["measures"]` may tell more of the others: {name: {"title", "unit", "better": "higher" or "lower"}}.
    """
    rows = comparison.results
    found = [name for name in OPTIONAL if any(row.score(name) for row in rows)]
    found += [name for row in rows for name in row.scores]
    known = {measure.name: measure for measure in MEASURES}
    told = comparison.provenance.get("measures", {})
    for name in found:
        if name not in known:
            more = told.get(name, {})
            title, lower = str(more.get("title", name)), more.get("better") == "lower"
            known[name] = Measure(name, title, str(more.get("unit", "")), lower)
    return [measure for name, measure in known.items() if name in found]


# ---- against fewer steps --------------------------------------------------------------------------------------------


def caching_rows(comparison: Comparison) -> list[Result]:
    """The rows that are a caching method."""
    return [r for r in comparison.results if r.method not in (UNCACHED, FEWER_STEPS)]


def fewer_steps_psnr(comparison: Comparison, speedup: float) -> float | None:
    """PSNR in dB that fewer steps reach at a measured speed-up: linear in log(speed-up) between the measured rows.

    Rows that another one beats in both speed and PSNR are left out: nobody would take them. (A number of steps that
    divides the reference's shares its timesteps and may be both faster and closer than a larger one, which then counts
    in place of it.) None outside the measured range: nothing is extrapolated.
    """
    rows = _fewer_steps(comparison)
    line = sorted(a for a in rows if not any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in rows))
    x = math.log(speedup)
    if line and min(rows)[0] <= x < line[0][0]:
        return line[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _fewer_steps(comparison: Comparison) -> list[tuple[float, float]]:
    """(log of the speed-up, PSNR in dB) of the rows with fewer steps."""
    return [
        (math.log(r.speedup), r.psnr)
        for r in comparison.results
        if r.method == FEWER_STEPS and r.psnr is not None and math.isfinite(r.psnr)
    ]


def gain(comparison: Comparison, result: Result, speedup: float | None = None) -> float | None:
    """Decibels by which a row is closer to the reference than fewer steps in the same time; None if not comparable."""
    if result.psnr is None:
        return None
    there = fewer_steps_psnr(comparison, speedup or result.speedup)
    if there is None:  # a row that fewer steps beat in both speed and PSNR has lost, wherever it stands
        x = math.log(speedup or result.speedup)
        there = max((y for at, y in _fewer_steps(comparison) if at >= x and y > result.psnr), default=None)
    return None if there is None else result.psnr - there


def best(comparison: Comparison) -> tuple[Result, float] | None:
    """The caching row with the largest gain over fewer steps, and the gain in dB; of a search, its winner."""
    rows = _winner(comparison) or caching_rows(comparison)
    found = [(r, g) for r in rows if (g := gain(comparison, r)) is not None]
    return max(found, key=lambda pair: pair[1], default=None)


def _winner(comparison: Comparison) -> list[Result]:
    """What a search found, if it is a plan."""
    return [r for r in caching_rows(comparison) if r.label == comparison.provenance.get("winner")]


def headline(comparison: Comparison) -> str:
    """The best finding in one sentence, whichever way it went.

    A gain counts only if it survives the row's lowest measured speed-up, a loss only if it survives the highest.
    """
    count, found = comparison.provenance.get("samples", len(comparison.labels)), best(comparison)
    if not _fewer_steps(comparison) or (found is None and _winner(comparison)):
        fastest = max(_winner(comparison) or comparison.results, key=lambda r: r.speedup)
        there = "" if fastest.psnr is None else f", {fastest.psnr:.1f} dB from the originals"
        return f"{count} pictures, drawn up to {fastest.speedup:.1f}× faster: {fastest.label}{there}."
    if found is None:
        return f"No caching row of these {count} pictures ran at a speed that fewer steps were measured at."
    row, decibels = found
    at_worst, at_best = (gain(comparison, row, speed) for speed in (row.speedup_low, row.speedup_high))
    best_row = f"{row.label}, the best caching row at {row.speedup:.1f}×,"
    if decibels > 0 and (at_worst is None or at_worst > 0):
        return (
            f"{row.label} draws {count} pictures {row.speedup:.1f}× faster, and {decibels:.1f} dB closer to the "
            "originals than fewer steps in the same time."
        )
    if decibels > 0 or (at_best is not None and at_best > 0):
        ahead = f"{abs(decibels):.1f} dB {'ahead' if decibels > 0 else 'behind'}"
        return f"Caching and fewer steps come out even here: {best_row} is {ahead}, less than the clock can tell."
    return (
        f"Taking fewer steps wins here: {best_row} is {-decibels:.1f} dB further from the originals in the same time."
    )
