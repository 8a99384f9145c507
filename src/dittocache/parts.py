"""What every when, which, fill and fix shares: parameters that can be checked, written as JSON and read back."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

PartType = TypeVar("PartType", bound="Part")


class Part:
    """Base of the four answers (when, which, fill, fix): a frozen dataclass whose fields are JSON values or plans.

    Subclasses are registered under their class name, so that a saved recipe can be read back.
    """

    registry: ClassVar[dict[str, type[Part]]] = {}

    def __post_init__(self) -> None:
        """Numbers of numpy become plain ones, lists tuples: what a caller changes later does not reach the part."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Part.registry[cls.__name__] = cls

    def fields(self) -> dict[str, Any]:
        """The part's type and parameters as they are: plans and tensors not yet written out."""
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {"type": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {name: jsonable(value) for name, value in self.fields().items()}

    @classmethod
    def from_dict(cls: type[PartType], data: Any) -> PartType:
        """Inverse of `to_dict`.

        Raises:
            ValueError: unknown type or parameter, or a value out of range.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("type"), str):
            raise ValueError(f"a {cls.__name__.lower()} is saved as an object with a 'type', not {show(data)}")
        known = answers(cls)
        part = known.get(data["type"])
        if part is None:
            raise ValueError(f"unknown {cls.__name__.lower()} {data['type']!r}; known: {', '.join(sorted(known))}")
        names = {f.name for f in dataclasses.fields(part)}  # type: ignore[arg-type]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "type"}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"{data['type']} has no parameter {unknown[0]!r}; known: {', '.join(sorted(names))}")
        try:
            return part(**values)
        except TypeError as error:
            raise ValueError(f"damaged {data['type']}: {error}") from None


def answers(kind: type[PartType]) -> dict[str, type[PartType]]:
    """The parts of a kind by name, without the interface itself."""
    found = {n: c for n, c in Part.registry.items() if issubclass(c, kind) and c is not kind}
    return {name: part for name, part in found.items() if dataclasses.is_dataclass(part)}


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's own, lists and arrays as tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return tuple(plain(v) for v in value)
    return value


def jsonable(value: Any) -> Any:
    """A parameter as a JSON value."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [jsonable(v) for v in value] if isinstance(value, (tuple, list)) else value


def show(value: Any) -> str:
    """A value in a message: one line, not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises a ValueError that names the value unless it is a whole number in [low, high]."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limit = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number, {limit}; got {show(value)}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises a ValueError that names the value unless it is a finite number in [low, high]."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    # a whole number too large for a float is not finite either
    finite = number and (abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value))
    inside = finite and low <= value <= high
    if not inside:
        limit = f"between {low:g} and {high:g}"
        if not math.isfinite(high):
            limit = f"at least {low:g}" if math.isfinite(low) else "that is finite"
        raise ValueError(f"{name} must be a number {limit}; got {show(value)}")


def check_ints(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises a ValueError that names the value unless it is a list of whole numbers in [low, high]."""
    if not isinstance(value, (list, tuple, range, np.ndarray)) or not np.ndim(value):
        raise ValueError(f"{name} must be a list of whole numbers; got {show(value)}")
    for one in value:
        check_int(f"every entry of {name}", one, low, high)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises a ValueError that names the value and the choices unless it is one of them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {show(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raises a ValueError that names the value unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False; got {show(value)}")
