"""The interface of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..parts import Part
from ..plan import COMPUTE, Site


class When(Part):
    """Says for every step and site whether it is computed.

    Steps are counted k = 0 .. T-1 from the noisiest; authors who count down use i = T-1-k.
    """

    uses_stack: ClassVar[bool] = False  # also wants the stack sites, to skip whole stacks of blocks

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """Float array [num_steps, len(sites)] of COMPUTE, REUSE, PARTIAL, a share of tokens, or OPEN."""
        raise NotImplementedError

    def fits(self, sites: Sequence[Site]) -> None:
        """Raises a ValueError if the schedule is not one for these sites; asked before anything is changed."""

    def decide(self, step: int, site: Site, args: tuple[Any, ...], memory: dict[str, Any]) -> float | Tensor:
        """Share for an entry that `table` left OPEN, asked when the forward reaches the site.

        A bool tensor [batch] decides for every sample on its own (True = compute), so that a picture does not depend
        on what else is in the batch; a number decides for the whole batch, and is all that stack sites understand.

        Args:
            step: k.
            site: the column.
            args: positional inputs of the site's module, hidden states first, [batch, tokens, channels].
            memory: the site's and branch's own dictionary, empty at the start of a run, kept until its end.
        """
        return COMPUTE
