"""The parameters of a method: annotations of a builder's arguments, and what is checked by them."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .parts import check_bool, check_choice, check_int, check_ints, check_number, show
from .when.soft import check_window


@dataclass(frozen=True)
class Int:
    """Annotation of a whole-number parameter."""

    low: int
    high: int | None = None
    help: str = ""


@dataclass(frozen=True)
class Number:
    """Annotation of a real parameter."""

    low: float
    high: float = float("inf")
    help: str = ""


@dataclass(frozen=True)
class Steps:
    """Annotation of a list of whole numbers, such as steps."""

    low: int
    high: int | None = None
    help: str = ""


@dataclass(frozen=True)
class PerKind:
    """Annotation of a number that may differ by kind of site or layer: {kind: number}, or one for all.

    `kinds` are those that are known, any if empty; `every` of them must be given, and then one for all is refused.
    """

    each: Int | Number
    kinds: tuple[str, ...] = ()
    help: str = ""
    every: bool = False

    def check(self, name: str, value: Any) -> None:
        if self.every and (not isinstance(value, Mapping) or set(value) != set(self.kinds)):
            raise ValueError(f"{name} must be a number for each of {', '.join(self.kinds)}; got {show(value)}")
        for kind, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
            if kind is not None and self.kinds:
                check_choice(f"a kind in {name}", kind, self.kinds)
            of = name if kind is None else f"{name} of {show(kind)}"
            if isinstance(self.each, Int):
                check_int(of, number, self.each.low, self.each.high)
            else:
                check_number(of, number, self.each.low, self.each.high)


@dataclass(frozen=True)
class Numbers:
    """Annotation of a list of real numbers; `count` of them, if it is fixed."""

    low: float = -float("inf")
    high: float = float("inf")
    count: int | None = None
    help: str = ""

    def check(self, name: str, value: Any) -> None:
        flat = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)
        listed = [*value] if flat else []
        if not listed or self.count not in (None, len(listed)):
            raise ValueError(f"{name} must be a list of {self.count or 'real'} numbers; got {show(value)}")
        for one in listed:
            check_number(f"every entry of {name}", one, self.low, self.high)


@dataclass(frozen=True)
class Data:
    """Annotation of calibrated or learned tensors, or the file that holds them; the method's part checks them.

    `held` is where the recipe holds them, such as `fill.trend`.
    """

    help: str = ""
    held: str = ""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method: its type in words, default, help, and the values it takes."""

    name: str
    type: str
    default: Any
    help: str
    valid: str
    check: Callable[[Any], None] = field(repr=False)
    held: str = ""


def parameter(name: str, hint: Any, default: Any) -> Parameter:
    """Reads `Annotated[type, Int | Number | help text]`; `| None` makes a parameter optional."""
    base, *notes = typing.get_args(hint)
    note = notes[0]
    help_text = note if isinstance(note, str) else note.help
    options = [a for a in typing.get_args(base) if a is not types.NoneType] if _is_union(base) else [base]
    optional, kind = _is_union(base), options[0]
    check: Callable[[Any], None]
    if isinstance(note, PerKind):
        kinds = ", ".join(note.kinds) or "KIND"
        valid = f"{{{kinds}: number}}" + ("" if note.every else ", one number for all") + ", or None"
        check = lambda v: None if v is None else note.check(name, v)  # noqa: E731
        return Parameter(name, "numbers", default, help_text, valid, check)
    if isinstance(note, Data):
        valid = "tensors by name, or a file"
        return Parameter(name, "data", default, help_text, valid, lambda v: None, held=note.held)
    if isinstance(note, Steps):
        valid = f"whole numbers, {note.low} or more" if note.high is None else f"numbers {note.low} to {note.high}"
        type_name, check = "steps", lambda v: check_ints(name, v, note.low, note.high)
    elif isinstance(note, Numbers):
        valid = "real numbers" if note.count is None else f"{note.count} numbers"
        type_name, check = "numbers", lambda v: note.check(name, v)
    elif isinstance(note, Int):
        valid = f"{note.low} or more" if note.high is None else f"{note.low} to {note.high}"
        type_name, check = "int", lambda v: check_int(name, v, note.low, note.high)
    elif isinstance(note, Number):
        valid = f"{note.low:g} or more" if note.high == float("inf") else f"{note.low:g} to {note.high:g}"
        valid = "any finite number" if note.low == -float("inf") else valid
        type_name, check = "float", lambda v: check_number(name, v, note.low, note.high)
    elif typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        type_name, valid, check = "choice", ", ".join(choices), lambda v: check_choice(name, v, choices)
    elif kind is bool:
        type_name, valid, check = "bool", "True, False", lambda v: check_bool(name, v)
    else:
        type_name, valid, check = "pair", "(low, high) within 0 to 1", lambda v: check_window(name, v)
    if optional:
        inner = check
        valid, check = f"{valid}, or None", lambda v: None if v is None else inner(v)
    return Parameter(name, type_name, default, help_text, valid, check)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
