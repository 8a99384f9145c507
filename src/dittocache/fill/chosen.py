"""A fill of its own for every step, chosen beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..parts import check_ints, show
from .base import At, Entry, Features, Fill, push
from .hold import Hold


@dataclass(frozen=True)
class Chosen(Fill):
    """At every step, one of several fills goes on from the last computed outputs (`tune.measure` finds which).

    None goes on from what another one made up, so that what a step is filled with depends on the computed steps alone.
    Tokens that a partial step computes count as being of the last step that was computed as a whole.

    Args:
        fills: each of computed outputs and their steps alone, such as `Hold`, `Taylor` and `Trend`.
        chosen: a number of these for every step of the run; those of computed steps are not read.
    """

    fills: tuple[Fill, ...] = (Hold(),)
    chosen: tuple[int, ...] = (0,)

    name = "chosen"
    rowwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "fills", checked(self.fills))
        check_ints("chosen", self.chosen, 0, len(self.fills) - 1)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return max(fill.depth for fill in self.fills)

    def names(self) -> set[str]:
        return set().union(*(fill.names() for fill in self.fills))

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        for fill in self.fills:
            fill.keep(Entry(), value, at)  # refused now if it does not go with the fill's data
        push(entry, value, at.step, self.depth)

    def fill(self, entry: Entry, at: At) -> Features:
        """Raises a ValueError for a step beyond those that there is a choice for."""
        if at.step >= len(self.chosen):
            raise ValueError(
                f"fills are chosen for {len(self.chosen)} steps, but this run has step {at.step}: "
                "dittocache.tune.resample makes a recipe for other steps"
            )
        fill = self.fills[self.chosen[at.step]]
        if fill.rowwise or not isinstance(entry.steps[0], tuple):
            return fill.fill(Entry(entry.values[: fill.depth], entry.steps[: fill.depth]), at)
        return _by_sample(fill, entry.values[0], entry.steps[0], at)


def checked(fills: Sequence[Fill | Mapping[str, object]]) -> tuple[Fill, ...]:
    """The fills, those that were saved read back.

    Raises:
        ValueError: none, or one that needs more than the last computed outputs and their steps.
    """
    if not isinstance(fills, (list, tuple)) or not fills:
        raise ValueError(f"fills are a list of one or more; got {show(fills)}")
    made = tuple(Fill.from_dict(fill) if isinstance(fill, Mapping) else fill for fill in fills)
    for fill in made:
        alone = isinstance(fill, Fill) and fill.depth and not (fill.mixes or fill.keeps_inputs)
        if not alone or (fill.depth > 1 and not fill.rowwise):
            raise ValueError(f"a fill of computed outputs alone is needed (Hold, Taylor, Trend, ...); got {show(fill)}")
    return made


def _by_sample(fill: Fill, value: Features, steps: Sequence[int], at: At) -> Features:
    """From an output whose samples were computed at different steps."""
    filled = value
    for step in sorted(set(steps)):
        those = torch.tensor([float(one == step) for one in steps])
        found = fill.fill(Entry([value], [step]), at)
        filled = tuple(
            torch.where(at.samples.like(those.to(new), new).bool(), new, old)
            for new, old in zip(found, filled, strict=True)
        )
    return filled
