"""What a search compares: ways of drawing with their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluate.rows import Row

SOLVER = "solver"  # as the method of rows


@dataclass
class Contender:
    """A way of drawing, and what was measured of it last."""

    row: Row
    numbers: dict[str, Any] = field(default_factory=dict)
    grid: int | None = None  # of the solver's

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


def told(label: str, numbers: Mapping[str, Any]) -> str:
    """Numbers in one line."""
    close = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("psnr", "ssim", "latent", "fd") if name in numbers)
    return f"{label}: {numbers['speedup']:.2f}x, {close}"


def told_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON can write them: others than finite ones by name."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
