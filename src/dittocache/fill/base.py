"""The interface of a fill, and what is remembered of one site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..parts import Part

Features = tuple[Tensor, ...]


@dataclass
class Entry:
    """What a run remembers of one site and guidance branch.

    Attributes:
        values: the outputs that are kept, newest first; each a tuple of tensors (one, unless the module returns more).
        steps: the steps k at which they were computed.
        versions: change counters of the tensors when they were stored.
        single: the module returns one tensor, not a tuple.
        signature: shape, dtype and device of the inputs they belong to; other inputs make the entry worthless.
        ages: [batch, tokens] float32, partial calls since a token was computed; None before the first partial call.
        observed: the token score of the last full attention, [batch, tokens].
        memory: free space for the recipe's own decisions.
    """

    values: list[Features] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    versions: tuple[int, ...] = ()
    single: bool = True
    signature: tuple[Any, ...] = ()
    ages: Tensor | None = None
    observed: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of all tensors kept, in bytes."""
        tensors = [t for value in self.values for t in value]
        tensors += [t for t in (self.ages, self.observed, *self.memory.values()) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class Fill(Part):
    """Keeps computed outputs and makes up the missing ones from them."""

    name: ClassVar[str] = ""  # as a plan names the fill of a step

    def keep(self, entry: Entry, value: Features, step: int) -> None:
        """Stores what was computed at step k."""
        raise NotImplementedError

    def ready(self, entry: Entry) -> bool:
        """Whether enough is kept to fill."""
        return bool(entry.values)

    def fill(self, entry: Entry, step: int) -> Features:
        """The stand-in at step k; must not be changed in place by the caller."""
        raise NotImplementedError

    def write(self, entry: Entry, index: Tensor, rows: Tensor) -> Tensor:
        """Writes newly computed tokens into the newest output that is kept, and returns it.

        Args:
            entry: keeps one tensor [batch, tokens, channels].
            index: [batch, count, channels], token numbers.
            rows: [batch, count, channels].
        """
        (held,) = entry.values[0]
        if torch.is_grad_enabled() or held.is_inference() != torch.is_inference_mode_enabled():
            entry.values[0] = (held.scatter(1, index, rows.detach()),)
        else:
            held.scatter_(1, index, rows)
        return entry.values[0][0]
