"""The interface of a fill, and what is remembered of one site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..parts import Part
from ..plan import Site
from ..samples import Samples

Features = tuple[Tensor, ...]


class At(NamedTuple):
    """Where a run stands when a fill is asked.

    Attributes:
        step: k, counted from the noisiest.
        num_steps: T.
        site: the column.
        inputs: first input of the site's module, [batch, tokens, channels]; None where a fill does not ask for it.
        together: every site of the block is reused in this step.
        samples: how the rows of the batch belong to samples.
        main: which of the outputs is in the sample's stream; the others are in those of text and the like.
    """

    step: int
    num_steps: int
    site: Site
    inputs: Tensor | None = None
    together: bool = False
    samples: Samples = Samples()
    main: int = 0


@dataclass
class Entry:
    """What a run remembers of one site and guidance branch.

    Attributes:
        values: the outputs that are kept, newest first; each a tuple of tensors (one, unless the module returns more).
        steps: the steps k at which they were computed, or made up by a fill that goes on from its own outputs. Where a
            fill is `rowwise` and rows differ: a tuple with the step of every row, None for a row without that value.
        inputs: the input that the newest output was computed from, for fills that ask for it.
        versions: change counters of the tensors when they were stored.
        form: how the module returned them: None for one tensor, else what puts the tensors back into their place.
        signature: shape, dtype and device of the inputs they belong to; other inputs make the entry worthless.
        ages: [batch, tokens] float32, partial calls since a token was computed; None before the first partial call.
        observed: the token score of the last full attention, [batch, tokens].
        memory: free space for the recipe's own decisions.
    """

    values: list[Features] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    inputs: Tensor | None = None
    versions: tuple[int, ...] = ()
    form: Any = None
    signature: tuple[Any, ...] = ()
    ages: Tensor | None = None
    observed: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> list[Tensor]:
        """The features that fills work with."""
        return [t for value in self.values for t in value] + ([] if self.inputs is None else [self.inputs])

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are kept."""
        more = [t for t in (self.ages, self.observed, *self.memory.values()) if isinstance(t, Tensor)]
        return self.kept + more


class Fill(Part):
    """Keeps computed outputs and makes up the missing ones from them."""

    name: ClassVar[str] = ""  # as a plan names the fill of a step
    depth: ClassVar[int] = 0  # computed outputs that it goes on from, where these and their steps are all it needs
    keeps_inputs: ClassVar[bool] = False  # wants the module's input, at computed steps and at reused ones
    mixes: ClassVar[bool] = False  # also changes what a computed module hands on
    rowwise: ClassVar[bool] = False  # wants to know the steps of every row, where rows are computed at their own steps

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        """Stores what was computed."""
        raise NotImplementedError

    def ready(self, entry: Entry) -> bool:
        """Whether enough is kept to fill."""
        return bool(entry.values)

    def fill(self, entry: Entry, at: At) -> Features:
        """The stand-in; must not be changed in place by the caller. Asked again in the same step, it is the same."""
        raise NotImplementedError

    def mix(self, entry: Entry, value: Features, at: At) -> Features:
        """What a computed module hands on, if the fill `mixes`: its output, as a rule."""
        return value

    def names(self) -> set[str]:
        """The sites that the fill has data for; a model must have them all."""
        return set()

    def cost(self, site: Site) -> float:
        """FLOPs of filling a site, as a share of computing it."""
        return 0.0

    def write(self, entry: Entry, index: Tensor, rows: Tensor) -> Tensor:
        """Writes newly computed tokens into the newest output that is kept, and returns it.

        Args:
            entry: keeps one tensor [batch, tokens, channels].
            index: [batch, count, channels], token numbers.
            rows: [batch, count, channels].
        """
        (held,) = entry.values[0]
        shared = any(held is older for value in entry.values[1:] for older in value)
        if shared or torch.is_grad_enabled() or held.is_inference() != torch.is_inference_mode_enabled():
            entry.values[0] = (held.scatter(1, index, rows.detach()),)
        else:
            held.scatter_(1, index, rows)
        return entry.values[0][0]


def push(entry: Entry, value: Features, step: int, depth: int) -> None:
    """Keeps a computed output beside older ones, so many at most; a second output of a step replaces it."""
    older = slice(1 if entry.steps[:1] == [step] else 0, None)
    entry.values = [value, *entry.values[older]][:depth]
    entry.steps = [step, *entry.steps[older]][:depth]
