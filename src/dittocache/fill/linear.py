"""Linear predictors: at every step the last outputs times factors that were fitted for that step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts import check_number, show
from .base import At, Entry, Features
from .taylor import Forecast


@dataclass(frozen=True)
class Linear(Forecast):
    """The last outputs and the module's input, times factors of the step: sum_i c[k, i] F[i] + d[k] x, fitted by least
    squares (`tune.Predictors`).

    At a computed step the newest output is that step's own, so that what is handed on can be corrected there, too; by
    a row 1, 0, ... it is not. The input costs nothing, and says where the latents are by now, as a preconditioned
    network's skip connection does. Published relative: L2P (arXiv 2604.26365) learns factors of the outputs at filled
    steps by gradient descent.

    Args:
        coefficients: [T, H], newest output first. A row that needs outputs that are not there yet holds the newest.
        inputs: [T] factors d of the input; none: it is not used. Where input and output have other numbers of channels
            (or of tokens, if latents are packed), the first ones: the rest are masks, pictures to go by, or variances.
    """

    coefficients: tuple[tuple[float, ...], ...] = ((1.0,),)
    inputs: tuple[float, ...] = ()

    name = "linear"
    mixes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.coefficients
        if not isinstance(rows, tuple) or not rows or not all(isinstance(r, tuple) and r for r in rows):
            raise ValueError(f"coefficients are a table of numbers [steps, outputs]; got {show(rows)}")
        if len({len(row) for row in rows}) > 1:
            raise ValueError("coefficients are a table of numbers [steps, outputs], but its rows differ in length")
        if not isinstance(self.inputs, tuple):
            raise ValueError(f"inputs are a list of numbers [steps]; got {show(self.inputs)}")
        if self.inputs and len(self.inputs) != len(rows):
            raise ValueError(f"inputs are {len(rows)} numbers, one a step like coefficients; got {len(self.inputs)}")
        for row in (*rows, self.inputs):
            for factor in row:
                check_number("every coefficient", factor)

    @property
    def keeps_inputs(self) -> bool:  # type: ignore[override]
        return bool(self.inputs)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return len(self.coefficients[0])

    def factors(self, steps: Sequence[int], at_step: int) -> list[float]:
        """Holds where outputs are missing that the row needs: a part of them would be far from the whole.

        Raises:
            ValueError: a step beyond the table.
        """
        if at_step >= len(self.coefficients):
            raise ValueError(
                f"coefficients are for {len(self.coefficients)} steps, but this run has step {at_step}: "
                "dittocache.tune.resample makes some for other steps"
            )
        row = self.coefficients[at_step]
        return list(row[: len(steps)]) if not any(row[len(steps) :]) else [1.0] + [0.0] * (len(steps) - 1)

    def fill(self, entry: Entry, at: At) -> Features:
        factor = self.inputs[at.step] if at.step < len(self.inputs) else 0.0
        if not factor or any(self.coefficients[at.step][len(entry.steps) :]):
            return self._made(entry, at, ())
        newest = entry.values[0]
        if at.inputs is None or not fits(at.inputs, newest[at.main]):
            shape = None if at.inputs is None else list(at.inputs.shape)
            raise ValueError(
                f"{at.site.name} has an input of the shape {shape} and an output of {list(newest[at.main].shape)}: its "
                "predictors cannot use the input, so leave out `inputs`"
            )
        inputs = [torch.zeros_like(output) for output in newest]
        count = min(newest[at.main].shape[1], at.inputs.shape[1])
        inputs[at.main][:, :count] = at.inputs[:, :count]
        return self._made(entry, at, [(tuple(inputs), factor)])

    def mix(self, entry: Entry, value: Features, at: At) -> Features:
        return self.fill(entry, at)

    # ---- tables -----------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, table: Tensor) -> Linear:
        """From factors [T, H + 1], the last of them that of the input."""
        inputs = tuple(table[:, -1].tolist()) if table[:, -1].any() else ()
        return cls(tuple(map(tuple, table[:, :-1].tolist())), inputs)

    @property
    def table(self) -> Tensor:
        """[T, H + 1] float64, see `of`."""
        inputs = self.inputs or [0.0] * len(self.coefficients)
        rows = [[*row, factor] for row, factor in zip(self.coefficients, inputs, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)


def fits(inputs: Tensor, output: Tensor) -> bool:
    """Whether two tensors differ in their second dimension at most: channels, or tokens of packed latents."""
    return (*inputs.shape[:1], *inputs.shape[2:]) == (*output.shape[:1], *output.shape[2:]) and inputs.ndim > 1
