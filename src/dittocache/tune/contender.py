"""What a search compares: ways of drawing with their numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluate.rows import Row

SOLVER = "solver"  # as the method of rows


@dataclass
class Contender:
    """A way of drawing, and what was measured of it last.

    Attributes:
        numbers: its speed-up and how close its pictures are.
        grid: number of the solver's scheduler and steps; None for other ways.
        alone: its own speed-up, before `share_speeds`.
    """

    row: Row
    numbers: dict[str, Any] = field(default_factory=dict)
    grid: int | None = None
    alone: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        row = self.row
        summary = f"{row.steps} steps" if row.recipe is None else row.recipe.describe()
        return {
            "label": row.label,
            "method": row.method,
            "steps": row.steps,
            "scheduler": row.scheduler,
            "summary": summary,
        } | told_numbers(self.numbers)


def distinct(rows: Sequence[Row]) -> list[Row]:
    return list({row.label: row for row in reversed(rows)}.values())[::-1]


def is_fewer(contender: Contender) -> bool:
    return contender.row.recipe is None


def is_published(contender: Contender) -> bool:
    return contender.row.recipe is not None and contender.row.method != SOLVER


def computed_of(row: Row) -> int:
    return row.steps - len(row.recipe.when.steps)  # type: ignore[union-attr]


def share_speeds(contenders: Sequence[Contender]) -> None:
    """Plans that compute as many of the same steps are equally fast: each is given the median of what was measured."""
    alike: dict[tuple[int, int], list[Contender]] = {}
    for contender in contenders:
        if contender.grid is not None:
            alike.setdefault((contender.grid, computed_of(contender.row)), []).append(contender)
    for group in alike.values():
        speed = statistics.median(contender.alone for contender in group)
        for contender in group:
            contender.numbers = {**contender.numbers, "speedup": speed}


def told(label: str, numbers: Mapping[str, Any]) -> str:
    """Numbers in one line."""
    close = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("psnr", "ssim", "latent", "fd") if name in numbers)
    return f"{label}: {numbers['speedup']:.2f}x, {close}"


def told_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON can write them: others than finite ones by name."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
