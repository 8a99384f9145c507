"""Linear predictors: at every step the last outputs times factors that were fitted for that step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        coefficients: [T, H], newest output first. Outputs that are not there yet have the factor 0.
        inputs: [T] factors d of the input; none: it is not used. Of an input with more channels than the output, or
            less, the first ones: other channels are masks, pictures to go by, or predicted variances.
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
    def depth(self) -> int:
        return len(self.coefficients[0])

    def factors(self, steps: Sequence[int], at_step: int) -> list[float]:
        """Raises a ValueError for a step beyond the table."""
        if at_step >= len(self.coefficients):
            raise ValueError(
                f"coefficients are for {len(self.coefficients)} steps, but this run has step {at_step}: "
                "dittocache.tune.resample makes some for other steps"
            )
        return list(self.coefficients[at_step][: len(steps)])

    def fill(self, entry: Entry, at: At) -> Features:
        made = super().fill(entry, at)
        factor = self.inputs[at.step] if self.inputs else 0.0
        if not factor:
            return made
        if at.inputs is None or not fits(at.inputs, made[at.main]):
            shape = None if at.inputs is None else list(at.inputs.shape)
            raise ValueError(
                f"{at.site.name} has an input of the shape {shape} and an output of {list(made[at.main].shape)}: its "
                "predictors cannot use the input, so leave out `inputs`"
            )
        changed = made[at.main].clone()
        count = min(changed.shape[1], at.inputs.shape[1])
        changed[:, :count] += factor * at.inputs[:, :count]
        return (*made[: at.main], changed, *made[at.main + 1 :])

    def mix(self, entry: Entry, value: Features, at: At) -> Features:
        return self.fill(entry, at)


def fits(inputs: Tensor, output: Tensor) -> bool:
    """Whether two tensors differ in their second dimension at most."""
    return (*inputs.shape[:1], *inputs.shape[2:]) == (*output.shape[:1], *output.shape[2:]) and inputs.ndim > 1
