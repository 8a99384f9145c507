"""Gradient queue: the newest output plus a multiple of its difference to the one before."""

from __future__ import annotations

from dataclasses import dataclass

from ..parts import check_bool, check_ints, check_number
from .base import At, Entry, Features, Fill


@dataclass(frozen=True)
class GradientQueue(Fill):
    """F1 + eta (F1 - F2) at chosen reused steps, else F1 (GOC, arXiv 2503.05156).

    F1 and F2 are the two newest outputs, computed or made up, so F1 is as a rule the full output of the step before
    and F2 what stood in for it two steps before.

    Args:
        eta: strength of the correction.
        positions: steps k that are corrected; None corrects every reused step.
        require_both: correct only where all sites of the block are reused in the step.
        computed_only: keep the last two *computed* outputs instead (an extension: in longer runs of reused steps the
            authors' queue goes on along its own corrections, or, after a step without one, holds two equal outputs).
    """

    eta: float = 1.2
    positions: tuple[int, ...] | None = None
    require_both: bool = False
    computed_only: bool = False

    name = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta)
        check_bool("require_both", self.require_both)
        check_bool("computed_only", self.computed_only)
        if self.positions is not None:
            check_ints("positions", self.positions, 0)

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        self._push(entry, value, at)

    def fill(self, entry: Entry, at: At) -> Features:
        newest = entry.values[0]
        if not self.computed_only and entry.steps[0] == at.step:
            return newest
        chosen = self.positions is None or at.step in self.positions
        if chosen and len(entry.values) > 1 and (at.together or not self.require_both):
            newest = tuple(f1 + self.eta * (f1 - f2) for f1, f2 in zip(*entry.values, strict=True))
        if not self.computed_only:
            self._push(entry, newest, at)
        return newest

    @staticmethod
    def _push(entry: Entry, value: Features, at: At) -> None:
        older = slice(1, 2) if entry.steps[:1] == [at.step] else slice(0, 1)  # a second output of a step replaces it
        entry.values, entry.steps = [value, *entry.values[older]], [at.step, *entry.steps[older]]
