"""The schedules that corrections are put on top of, and the files that their tensors come from."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..parameters import Data, Int, Number, Steps
from ..parts import show
from ..tensors import Tensors
from ..when import Every, ReuseSteps, Router, When

Interval = Annotated[int, Int(1, help="every interval-th step is computed, the first one included")]
ReuseList = Annotated[tuple[int, ...] | None, Steps(1, help="steps that are reused, instead of an interval")]
Threshold = Annotated[float, Number(0, 1, help="theta: a site is computed iff sigmoid(score) > theta")]
RouterLogits = Annotated[
    Any, Data("L2C's learned scores [steps, sites], or a file of them (the authors' as well)", held="when.logits")
]


def schedule(interval: int, reuse_steps: Any, router_logits: Any, threshold: float) -> When:
    """The base schedule: L2C's router if there is one, else listed steps, else every interval-th step."""
    if router_logits is not None:
        return Router(read_router(router_logits), threshold)
    return Every(interval, anchor="start") if reuse_steps is None else ReuseSteps(reuse_steps)


def read_router(source: Any) -> Tensors:
    """Router scores as `Tensors` with one table "logits" [rows, sites].

    Args:
        source: such a table, a safetensors file with one, or a checkpoint of the authors: a torch zip
            {"routers": {"<i>.prob": float[sites]}, ...}, read without running any code of it.

    Raises:
        ValueError: none of these.
    """
    if isinstance(source, (str, Path)):
        source = read_file(source)
        if isinstance(source, Mapping) and "routers" in source:
            source = source["routers"]
        if not isinstance(source, Mapping):
            raise ValueError(f"a router's file holds tables by name; got {show(source)}")
        rows = {
            int(m.group(1)): value
            for name, value in source.items()
            if isinstance(name, str) and (m := re.fullmatch(r"(?:.*\.)?([0-9]+)\.prob", name))
        }
        if rows:
            missing = next((i for i in range(len(rows)) if i not in rows), None)
            if missing is not None:
                raise ValueError(f"damaged router: row {missing} is missing")
            lengths = {tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in rows.values()}
            if len(lengths) > 1 or () in lengths:
                raise ValueError(f"damaged router: its rows are of shapes {show(sorted(lengths))}, not of one")
            source = torch.stack([rows[i] for i in range(len(rows))]).float()
    return Tensors(source if isinstance(source, Mapping) else {"logits": source})


def read_tensors(source: Any) -> Tensors:
    """Tensors by name, from a mapping or from the file that holds one.

    Raises:
        ValueError: neither, or a damaged file.
    """
    return Tensors(read_file(source) if isinstance(source, (str, os.PathLike)) else source)


def read_file(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a safetensors file or a torch zip holds; of the latter only tensors and plain containers.

    Raises:
        ValueError: there is no such file, or it is neither, or damaged.
    """
    try:
        if not Path(path).is_file():
            raise ValueError(f"there is no file {str(path)!r:.300}")
    except OSError as error:
        raise ValueError(f"there is no file {str(path)!r:.300}: {error.strerror}") from None
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # the authors saved their command line along: a plain namespace, which runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # torch's own words are long, and advise to load without its safeguards
        listed = isinstance(error, (SafetensorError, OSError)) and str(error)
        reason = str(error).splitlines()[0] if listed else "only tensors and plain containers are read"
        raise ValueError(f"{str(path)!r} is damaged, or not a file of tensors: {reason}") from None
