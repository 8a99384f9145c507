"""Low-rank increment: the kept output of a linear layer plus a low-rank map of how its input has changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from ..parts import show
from ..plan import Site
from ..tensors import Tensors
from .base import At, Entry, Features, Fill


@dataclass(frozen=True)
class LowRankIncrement(Fill):
    """y = y_c + A B (x - x_c) for a linear layer with kept input x_c and output y_c (ICC, arXiv 2505.05829).

    Args:
        factors: "site/A" -> [out, rank] and "site/B" -> [rank, in] for every linear layer; one that is missing is held.
    """

    factors: Tensors

    name = "increment"
    keeps_inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.factors, Tensors):
            object.__setattr__(self, "factors", Tensors(self.factors))
        for name, tensor in self.factors.items():
            site, _, letter = name.rpartition("/")
            pair = [self.factors.get(f"{site}/{which}") for which in "AB"]
            fits = all(t is not None and t.ndim == 2 for t in pair) and pair[0].shape[1] == pair[1].shape[0]  # type: ignore[union-attr]
            if letter not in ("A", "B") or not fits:
                raise ValueError(
                    f"factors come in pairs SITE/A [out, rank] and SITE/B [rank, in]; {show(name)} is "
                    f"{list(tensor.shape)} and has no partner that fits"
                )

    def names(self) -> set[str]:
        return {name.rpartition("/")[0] for name in self.factors}

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        a, b = (self.factors.get(f"{at.site.name}/{letter}") for letter in "AB")
        if a is not None and b is not None and at.inputs is not None:
            found, wanted = (value[0].shape[-1], at.inputs.shape[-1]), (a.shape[0], b.shape[1])
            if found != wanted:
                raise ValueError(
                    f"the factors of {at.site.name!r} are for {wanted[0]} x {wanted[1]} channels (out x in); this "
                    f"layer has {found[0]} x {found[1]}: calibrate for this model"
                )
        entry.values, entry.steps, entry.inputs = [value], [at.step], at.inputs

    def fill(self, entry: Entry, at: At) -> Features:
        (held,) = entry.values[0]
        if f"{at.site.name}/A" not in self.factors or at.inputs is None or entry.inputs is None:
            return (held,)
        a, b = (self.factors.like(f"{at.site.name}/{letter}", held) for letter in "AB")
        return (held + F.linear(F.linear(at.inputs - entry.inputs, b), a),)

    def cost(self, site: Site) -> float:
        a, b = (self.factors.get(f"{site.name}/{letter}") for letter in "AB")
        if a is None or b is None:
            return 0.0
        (out, rank), width = a.shape, b.shape[1]
        return rank * (out + width) / (out * width)
