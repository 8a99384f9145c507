"""How the rows of a batch belong to samples: a picture and its guidance branches are decided about as one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """The layout [halves, samples, rows of a sample] of a batch.

    Attributes:
        size: number of samples.
        halves: how often batched guidance repeats them, 1 without it.
        together: the whole batch counts as one sample, as the authors' codes have it.
    """

    size: int = 1
    halves: int = 1
    together: bool = False

    def gather(self, x: Tensor) -> Tensor:
        """Rows [rows, ..., channels] by sample, [samples, values, channels].

        Args:
            x: first dimension halves * samples * r, with any r (frames, for one); at least 2 dimensions. Where it is
                no such multiple (all samples in one row), or all are together, they are one sample.
        """
        if self.together or len(x) % (self.halves * self.size):
            return x.reshape(1, -1, x.shape[-1])
        x = x.unflatten(0, (self.halves, self.size, -1)).transpose(0, 1)
        return x.reshape(self.size, -1, x.shape[-1])

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """One value for every row [rows], from one for every sample [samples]."""
        if len(values) == 1:
            return values.expand(rows)
        each = rows // (self.halves * self.size)
        return values.repeat_interleave(each).repeat(self.halves)

    def like(self, values: Tensor, x: Tensor) -> Tensor:
        """`spread`, in a shape that goes with x [rows, ...]."""
        return self.spread(values, len(x)).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def guidance_halves(sample: Tensor | None) -> int:
    """How many times the batch holds the same latents one after another, as batched guidance does: 4, 3, 2 or 1."""
    for halves in (4, 3, 2):
        if sample is not None and len(sample) % halves == 0:
            first, *others = sample.chunk(halves)
            if all(torch.equal(first, other) for other in others):
                return halves
    return 1
