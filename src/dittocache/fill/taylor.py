"""Forecasts: the newest output plus multiples of its differences to older ones, such as TaylorSeer's series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any

import torch
from torch import Tensor

from ..parts import check_int
from .base import At, Entry, Features, Fill, push


def coefficients(steps: Sequence[int], at_step: int, order: int) -> list[float]:
    """TaylorSeer's forecast (arXiv 2503.06923) as factors of the outputs it is made from.

    The authors keep a ladder of differences: at a computed step k, h steps after the one before,

        D[0] = F,    D[j+1] = (D[j] - D[j] of before) / h    for j < order, where D[j] of before exists,

    and forecast sum_j D[j] d^j / j! at d steps after k. All of it is linear in the outputs F, so that outputs can be
    kept as they are. On even spacing, D[j] is the j-th difference quotient; after a change of spacing it is not, for
    j > 1: only the newest h enters. The factors add up to 1.

    Args:
        steps: at which the outputs were computed, newest first, falling.
        at_step: the step that is forecast.
        order: O, the highest power; as many outputs as there are limit it.

    Returns:
        One factor per output in float64; those beyond the newest O + 1 are 0.
    """
    count = len(steps)
    ladder: list[list[float]] = []  # D[j] after the output that is looked at, in terms of all outputs
    for n in reversed(range(count)):
        rung = [float(i == n) for i in range(count)]
        grown = [rung]
        for before in ladder[:order]:
            h = steps[n] - steps[n + 1]
            rung = [(new - old) / h for new, old in zip(rung, before, strict=True)]
            grown.append(rung)
        ladder = grown
    d = at_step - steps[0]
    powers = [d**j / factorial(j) for j in range(len(ladder))]
    return [sum(p * rung[i] for p, rung in zip(powers, ladder, strict=True)) for i in range(count)]


class Forecast(Fill):
    """A fill that is linear in the last outputs, with factors that follow from their steps alone.

    Subclasses say of how many outputs (`depth`), and what the factors are. Samples that were computed at other steps
    than their neighbours have factors of their own.
    """

    rowwise = True

    @property
    def depth(self) -> int:  # type: ignore[override]
        """How many outputs are kept."""
        raise NotImplementedError

    def factors(self, steps: Sequence[int], at_step: int) -> list[float]:
        """One factor per output.

        Args:
            steps: at which they were computed, newest first, falling; 1 to `depth` of them.
            at_step: the step that is filled.
        """
        raise NotImplementedError

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        push(entry, value, at.step, self.depth)

    def fill(self, entry: Entry, at: At) -> Features:
        return self._made(entry, at, ())

    def _made(self, entry: Entry, at: At, more: Sequence[tuple[Features, float]]) -> Features:
        """The outputs and what else there is, times their factors."""
        factors: list[Any] = []
        samples = next((len(step) for step in entry.steps if isinstance(step, tuple)), None)
        if samples is None:
            factors = self._of(entry.steps, at.step)
        else:
            each = [[s[i] if isinstance(s, tuple) else s for s in entry.steps] for i in range(samples)]
            columns = zip(*(self._of(steps, at.step) for steps in each), strict=True)
            factors = [torch.tensor(column, dtype=torch.float64) if any(column) else 0.0 for column in columns]
        pairs = zip(entry.values[1:], factors[1:], strict=True)
        older = [(value, factor) for value, factor in pairs if isinstance(factor, Tensor) or factor]
        older += more
        newest, missing = entry.values[0], 1 - sum(factors) - sum(factor for _, factor in more)
        if isinstance(missing, Tensor) or abs(missing) > 1e-9:  # more than rounding: that is the factor of a zero
            older.append((tuple(value.new_zeros(()) for value in newest), missing))
        if not older:
            return newest
        return tuple(_combined(newest[i], [(value[i], f) for value, f in older], at) for i in range(len(newest)))

    def _of(self, steps: Sequence[int | None], at_step: int) -> list[float]:
        """One factor for every value of one sample; 0 for those that it does not have."""
        has = [n for n, step in enumerate(steps) if step is not None and step not in steps[:n]]
        factors = dict(zip(has, self.factors([steps[n] for n in has], at_step), strict=True))  # type: ignore[misc]
        return [factors.get(n, 0.0) for n in range(len(steps))]


def _combined(newest: Tensor, older: Sequence[tuple[Tensor, Any]], at: At) -> Tensor:
    """The newest output plus what older ones differ from it, times their factors; in its dtype, rounded once.

    The factors of all add up to 1, so this is the sum of all outputs times their factors; but of small numbers, so that
    nothing is lost that a ladder of differences would keep.
    """
    if len(older) == 1 and not isinstance(older[0][1], Tensor):
        return torch.lerp(newest, older[0][0], older[0][1])
    wide = newest.to(torch.promote_types(newest.dtype, torch.float32))
    change = torch.zeros_like(wide)
    for output, factor in older:
        if isinstance(factor, Tensor):
            change += (output - wide) * at.samples.like(factor.to(wide), wide)
        else:
            change.add_(output - wide, alpha=factor)
    return change.add_(wide).to(newest.dtype)


@dataclass(frozen=True)
class Taylor(Forecast):
    """TaylorSeer's forecast (arXiv 2503.06923): a series in the step number, of differences of the last outputs.

    Args:
        order: O, the highest power; 0 holds the last output, 1 goes on along the last difference.
        start: no differences are formed at steps up to this one (the authors' guard: 1 where the first three steps of
            FLUX are computed, so that step 0 is left out).
    """

    order: int = 1
    start: int = 0

    name = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("order", self.order, 0)
        check_int("start", self.start, 0)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.order + 1

    def factors(self, steps: Sequence[int], at_step: int) -> list[float]:
        used = [step for n, step in enumerate(steps) if all(newer > self.start for newer in steps[:n])]
        return coefficients(used, at_step, self.order) + [0.0] * (len(steps) - len(used))
