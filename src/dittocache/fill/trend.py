"""Trend: the kept output, changed element by element by a calibrated trend."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..parts import check_bool, check_number, show
from ..tensors import Tensors
from .base import At, Entry, Features, Fill


@dataclass(frozen=True)
class Trend(Fill):
    """out = c (1 + theta E[site, k]), elementwise (EOC, arXiv 2501.19243); or c + theta E[site, k].

    Args:
        trend: "site@step" -> E = A[k] - A[k-1], the difference of the mean features of two adjacent steps,
            [tokens, channels]. A site or step that is missing is held: the judgment table M is what is there.
        theta: strength of the correction.
        write_back: the corrected output takes the kept one's place, as in the authors' code, so that
            reused steps in a row compound; False corrects the last computed output every time.
        additive: c + theta E, which is not EOC: with theta 1 and `write_back`, the mean change since the kept output.
    """

    trend: Tensors
    theta: float = 0.01
    write_back: bool = True
    additive: bool = False

    name = "trend"
    depth = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("theta", self.theta)
        check_bool("write_back", self.write_back)
        check_bool("additive", self.additive)
        if not isinstance(self.trend, Tensors):
            object.__setattr__(self, "trend", Tensors(self.trend))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self.trend.items():
            if re.fullmatch(r".+@(0|[1-9][0-9]*)", name) is None or tensor.ndim != 2:
                raise ValueError(
                    f"a trend is named SITE@STEP and is [tokens, channels]; got {show(name)} {list(tensor.shape)}"
                )
            site, shape = name.rpartition("@")[0], tuple(tensor.shape)
            if shapes.setdefault(site, shape) != shape:
                raise ValueError(
                    f"the trends of one site have one shape; {show(name)} is {list(shape)}, others are "
                    f"{list(shapes[site])}"
                )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name.rpartition("@")[0]: tuple(tensor.shape) for name, tensor in self.trend.items()}

    def names(self) -> set[str]:
        return set(self._shapes)

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        wanted = self._shapes.get(at.site.name)
        if wanted is not None and tuple(value[0].shape[-2:]) != wanted:
            found = " x ".join(map(str, value[0].shape[-2:]))
            raise ValueError(
                f"the trend of {at.site.name!r} is for {' x '.join(map(str, wanted))} tokens x channels; "
                f"this run has {found}: calibrate for this size"
            )
        entry.values, entry.steps = [value], [at.step]

    def of(self, steps: Iterable[int]) -> Trend:
        """The same with the trends of these steps alone."""
        wanted = set(steps)
        return replace(self, trend=self.trend.only(n for n in self.trend if int(n.rpartition("@")[2]) in wanted))

    def fill(self, entry: Entry, at: At) -> Features:
        first, *others = entry.values[0]
        start = entry.steps[0] + 1 if self.write_back else at.step
        for name in (f"{at.site.name}@{k}" for k in range(start, at.step + 1)):
            if name in self.trend:
                first = self._moved(first, self.trend.like(name, first))
        if first is entry.values[0][0]:
            return entry.values[0]
        filled = (first, *others)
        if self.write_back:
            entry.values, entry.steps = [filled], [at.step]
        return filled

    def _moved(self, value: Tensor, trend: Tensor) -> Tensor:
        """1 + theta E would be 1 in half precision, so that it is never formed."""
        if self.additive:
            return torch.add(value, trend, alpha=self.theta)
        return torch.addcmul(value, value, trend, value=self.theta)
