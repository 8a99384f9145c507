"""A fill of its own for every step, chosen beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..parts import check_ints, show
from .base import At, Entry, Features, Fill, pushed
from .hold import Hold


@dataclass(frozen=True)
class Chosen(Fill):
    """At every step, one of several fills goes on from the last computed outputs (`tune.measure` finds which).

    None goes on from what another one made up, so that what a step is filled with depends on the computed steps alone.

    Args:
        fills: each of computed outputs and their steps alone, such as `Hold`, `Taylor` and `Trend`.
        chosen: a number of these for every step of the run; those of computed steps are not read.
    """

    fills: tuple[Fill, ...] = (Hold(),)
    chosen: tuple[int, ...] = (0,)

    name = "chosen"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fills, tuple) or not self.fills:
            raise ValueError(f"fills are a list of one or more; got {show(self.fills)}")
        made = tuple(Fill.from_dict(fill) if isinstance(fill, Mapping) else fill for fill in self.fills)
        object.__setattr__(self, "fills", made)
        for fill in made:
            check_follows(fill)
        check_ints("chosen", self.chosen, 0, len(made) - 1)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return max(fill.depth for fill in self.fills)

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return all(fill.rowwise for fill in self.fills)

    def names(self) -> set[str]:
        return set().union(*(fill.names() for fill in self.fills))

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        for fill in self.fills:
            fill.keep(Entry(), value, at)  # refused now if it does not go with the fill's data
        pushed(entry, value, at.step, self.depth)

    def fill(self, entry: Entry, at: At) -> Features:
        """Raises a ValueError for a step beyond those that there is a choice for."""
        if at.step >= len(self.chosen):
            raise ValueError(
                f"fills are chosen for {len(self.chosen)} steps, but this run has step {at.step}: "
                "dittocache.tune.resample makes a recipe for other steps"
            )
        fill = self.fills[self.chosen[at.step]]
        return fill.fill(Entry(entry.values[: fill.depth], entry.steps[: fill.depth]), at)


def check_follows(fill: Fill) -> None:
    """Raises a ValueError unless what it makes up follows from the last computed outputs and their steps."""
    if not isinstance(fill, Fill) or not fill.depth or fill.mixes or fill.keeps_inputs:
        raise ValueError(f"a fill of computed outputs alone is needed (Hold, Taylor, Trend, ...); got {show(fill)}")
