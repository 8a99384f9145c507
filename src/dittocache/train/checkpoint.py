"""Checkpoints: one safetensors file, its state as JSON in the header, replaced as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import atomic
from ..parts import show


def write(path: Path, form: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes the file beside its place, then moves it there: a kill leaves the old one or the new one.

    Args:
        form: name of the format.
        state: JSON values.
    """
    header = {"format": form, "state": json.dumps(state)}
    atomic.write(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, header))


def read(path: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a file that `write` wrote.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != form:
                raise ValueError(f"its format is {show(header.get('format'))}, not {form!r}")
            state = json.loads(header["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or foreign: {show(str(error))}; begin anew with fresh (--fresh)"
        ) from None


def kept(
    path: Path, form: str, config: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]], again: bool = False
) -> Mapping[str, Tensor]:
    """The tensors of a file, which is made if it is not there, or (with `again`) of no use.

    Raises:
        ValueError: the file is damaged, or was made with another configuration.
    """
    if path.exists():
        try:
            tensors, state = read(path, form)
            same(path, state, config)
            return tensors
        except ValueError:
            if not again:
                raise
    tensors = dict(make())
    write(path, form, tensors, config)
    return tensors


def same(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first entry in which a saved configuration is not the wanted one."""
    plain = json.loads(json.dumps(wanted))
    for name in sorted(plain.keys() | saved.keys()):
        if saved.get(name) != plain.get(name):
            raise ValueError(
                f"{str(path)!r} is of another training: {name} is {show(saved.get(name))} there, "
                f"{show(plain.get(name))} here; begin anew with fresh (--fresh), or choose another folder"
            )
