"""The interface of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ..parts import Part
from ..plan import COMPUTE, REUSE, Site


def columns(computed: np.ndarray, sites: Sequence[Site], otherwise: float = REUSE) -> np.ndarray:
    """A table [steps, sites] of which all columns are alike: computed where the mask [steps] is True."""
    return np.repeat(np.where(computed, COMPUTE, otherwise)[:, None], len(sites), axis=1)


class Look(NamedTuple):
    """What a decision is made from. Tensors are [samples, values, channels]: guidance branches belong to their sample.

    Attributes:
        step: k, counted from the noisiest.
        num_steps: T.
        site: the column that is decided; of all stacks together, the first.
        state: what enters the site: a module's first input, or the hidden states before a stack's first block.
        signal: what the schedule's `signal` names; None if it names nothing.
        forced: it is computed whatever the answer is, because nothing that fits is kept. Note it in the memory.
    """

    step: int
    num_steps: int
    site: Site
    state: Tensor
    signal: Tensor | None
    forced: bool


class When(Part):
    """Says for every step and site whether it is computed.

    Steps are counted k = 0 .. T-1 from the noisiest; authors who count down use i = T-1-k.

    A dynamic schedule leaves entries OPEN and answers for every sample on its own, so that a picture does not depend on
    what else is in the batch; with `batch = "batch"` the whole batch counts as one sample, as in the authors' codes.
    All stacks of a model are decided together, where the first of them begins, or after its `head`.
    """

    uses_stack: ClassVar[bool] = False  # also wants the stack sites, to skip whole stacks of blocks
    # what a stack is decided by: "state" after the head; "modulated", the input of its first attention, after norm,
    # scale and shift; "embedding", the time embedding that its first block is given
    signal: ClassVar[str] = ""
    head: int = 0  # blocks that are computed in every step, before the rest is decided
    batch: str = "sample"

    def timed(self, timesteps: Sequence[float] | None) -> When:
        """The schedule for a run with these timesteps; itself, unless it goes by time rather than by steps.

        Raises:
            ValueError: it goes by time, and the run has no timesteps.
        """
        return self

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Float array [num_steps, len(sites)] of COMPUTE, REUSE, PARTIAL, a share of tokens, or OPEN."""
        raise NotImplementedError

    def fits(self, sites: Sequence[Site]) -> None:
        """Raises a ValueError if the schedule is not one for these sites; asked before anything is changed."""

    def decide(self, look: Look, memory: dict[str, Any]) -> float | Tensor:
        """Answer for an entry that `table` left OPEN, asked when the forward reaches the site.

        Args:
            look: what is seen there.
            memory: the site's and branch's own dictionary, empty at the start of a run, kept until its end.

        Returns:
            A bool tensor [samples], True = compute; or a number for all of them.
        """
        return COMPUTE
