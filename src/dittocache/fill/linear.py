"""Linear predictors: at every step the last outputs times factors that were fitted for that step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..parts import check_number, show
from .base import At, Entry, Features
from .taylor import Forecast


@dataclass(frozen=True)
class Linear(Forecast):
    """The last outputs times factors of the step: sum_i c[k, i] F[i], fitted by least squares (`tune.Predictors`).

    At a computed step the newest output is that step's own, so that what is handed on can be corrected there, too; by
    a row 1, 0, ... it is not. Published relative: L2P (arXiv 2604.26365) learns factors of filled steps by gradient
    descent.

    Args:
        coefficients: [T, H], newest output first. Outputs that are not there yet have the factor 0.
    """

    coefficients: tuple[tuple[float, ...], ...] = ((1.0,),)

    name = "linear"
    mixes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.coefficients
        if not isinstance(rows, tuple) or not rows or not all(isinstance(r, tuple) and r for r in rows):
            raise ValueError(f"coefficients are a table of numbers [steps, outputs]; got {show(rows)}")
        if len({len(row) for row in rows}) > 1:
            raise ValueError("coefficients are a table of numbers [steps, outputs], but its rows differ in length")
        for row in rows:
            for factor in row:
                check_number("every coefficient", factor)

    @property
    def depth(self) -> int:
        return len(self.coefficients[0])

    def factors(self, steps: Sequence[int], at_step: int) -> list[float]:
        """Raises a ValueError for a step beyond the table."""
        if at_step >= len(self.coefficients):
            raise ValueError(
                f"coefficients are for {len(self.coefficients)} steps, but this run has step {at_step}: "
                "dittocache.tune.resample makes some for other steps"
            )
        return list(self.coefficients[at_step][: len(steps)])

    def mix(self, entry: Entry, value: Features, at: At) -> Features:
        return self.fill(entry, at)
