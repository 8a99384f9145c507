"""What goes into a block and what comes out: the same token streams, changed; told apart here, and passed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Key = int | str  # a positional or a named argument
POSITIONAL = ("rotary", "rope", "freqs", "pos_", "ids")  # arguments [tokens, ...] without a dimension for the batch


# ---- outputs --------------------------------------------------------------------------------------------------------
def pack(output: Any) -> tuple[Tensor, ...]:
    """The tensors of an output, however they are nested.

    Raises:
        TypeError: there are none.
    """
    if isinstance(output, Tensor):
        return (output,)
    values = tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    if not values:
        raise TypeError(f"cannot keep an output of type {type(output).__name__}: expected tensors")
    return values


def form_of(output: Any) -> Any:
    """What `unpack` needs to put tensors back into the form of an output; None for a tensor alone."""
    if isinstance(output, Tensor):
        return None
    leaves, spec = pytree.tree_flatten(output)
    return [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec


def unpack(values: tuple[Tensor, ...], form: Any) -> Any:
    """Inverse of `pack`."""
    if form is None:
        return values[0]
    left = iter(values)
    return pytree.tree_unflatten([next(left) if leaf is None else leaf[0] for leaf in form[0]], form[1])


# ---- inputs ---------------------------------------------------------------------------------------------------------
def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Key, Any]:
    """All arguments by position or name."""
    return dict([*enumerate(args), *kwargs.items()])


def main_stream(arguments: Mapping[Key, Any], position: int = 0) -> Tensor:
    """The tokens of the sample: `hidden_states`, or the argument at a position other than the first, or the first
    tensor."""
    named = arguments.get("hidden_states", arguments.get(position) if position else None)
    return named if isinstance(named, Tensor) else next(v for v in arguments.values() if isinstance(v, Tensor))


@dataclass(frozen=True)
class Passage:
    """How the outputs of a block continue its inputs.

    Attributes:
        keys: for every output the argument that it continues; None where nothing fits.
        known: the mapping was seen in the arguments of the next block, not guessed from shapes.
    """

    keys: tuple[Key | None, ...]
    known: bool = False

    @property
    def whole(self) -> bool:
        return None not in self.keys

    def through(self, arguments: Mapping[Key, Any]) -> tuple[Tensor, ...]:
        """The streams as they came in, in the order of the outputs."""
        return tuple(arguments[key] for key in self.keys if key is not None)


class Blank:
    """The passage of a block that changes shapes: zeros in the shapes of its outputs, which nothing may depend on."""

    keys: tuple[Key | None, ...] = ()
    known = whole = True

    def __init__(self) -> None:
        self.shapes: dict[Any, list[tuple[torch.Size, torch.dtype, torch.device]]] = {}  # by the inputs' shapes

    @staticmethod
    def _shapes(arguments: Mapping[Key, Any]) -> tuple[Any, ...]:
        """All that the shape of an output can depend on: those of the tensors, and sizes."""
        tensors = ((v.shape, v.dtype, v.device) for v in arguments.values() if isinstance(v, Tensor))
        return *tensors, *(tuple(v) for v in arguments.values() if isinstance(v, (tuple, list)))

    def learn(self, outputs: tuple[Tensor, ...], arguments: Mapping[Key, Any]) -> None:
        self.shapes[self._shapes(arguments)] = [(t.shape, t.dtype, t.device) for t in outputs]

    def through(self, arguments: Mapping[Key, Any]) -> tuple[Tensor, ...]:
        """Real memory, not one expanded zero: some models write into what a block returns."""
        made = self.shapes[self._shapes(arguments)]
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in made)


def guess(outputs: tuple[Tensor, ...], arguments: Mapping[Key, Any]) -> Passage:
    """The passage as shapes tell it: an output continues the first argument of its shape that is not yet taken."""
    keys: list[Key | None] = []
    for output in outputs:
        fits = (
            key
            for key, value in arguments.items()
            if isinstance(value, Tensor) and value.shape == output.shape and key not in keys
        )
        keys.append(next(fits, None))
    return Passage(tuple(keys))


def continued(outputs: tuple[Tensor, ...], arguments: Mapping[Key, Any]) -> Passage | None:
    """The passage as the arguments of the next block tell it: they are the very outputs. None if they are not."""
    keys = tuple(next((key for key, value in arguments.items() if value is output), None) for output in outputs)
    return None if None in keys else Passage(keys, known=True)


# ---- rows -----------------------------------------------------------------------------------------------------------
def pick(arguments: Mapping[Key, Any], mask: Callable[[int], Tensor | None]) -> dict[Key, Any]:
    """Some rows of every argument that has a dimension for the batch.

    Args:
        mask: bool [length] for tensors with `length` rows; None where these are no rows of the batch.
    """

    def rows(value: Any, tokens: bool) -> Any:
        if isinstance(value, Tensor):
            chosen = mask(len(value)) if value.ndim and not (tokens and value.ndim < 3) else None
            return value if chosen is None else value[chosen.to(value.device)]
        if isinstance(value, (tuple, list)):
            return type(value)(rows(one, tokens) for one in value)
        return {name: rows(one, tokens) for name, one in value.items()} if isinstance(value, dict) else value

    return {k: rows(v, any(word in str(k) for word in POSITIONAL)) for k, v in arguments.items()}


def put(mask: Tensor, computed: Tensor, rest: Tensor) -> Tensor:
    """A whole batch: `computed` at the rows of the bool mask [rows], `rest` elsewhere."""
    whole = rest.to(computed.dtype, copy=True)
    whole[mask.to(whole.device)] = computed
    return whole


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of `yes` where the bool mask [rows] is True, of `no` elsewhere."""
    return torch.where(mask.to(yes.device).view(-1, *[1] * (yes.ndim - 1)), yes, no)
