"""Named tensors that a recipe carries: calibrated tables, factors, learned scores."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .parts import show


class Tensors(Mapping[str, Tensor]):
    """Tensors by name: fixed once made, kept on the CPU, finite, compared by value.

    Args:
        tensors: name -> tensor, array or nested list.

    Raises:
        ValueError: a name that is no text, something that is no array of numbers, or an entry that is not finite.
    """

    def __init__(self, tensors: Any) -> None:
        if isinstance(tensors, Mapping) and set(tensors) == {"safetensors"} and isinstance(tensors["safetensors"], str):
            tensors = _decode(tensors["safetensors"])
        if not isinstance(tensors, Mapping):
            raise ValueError(f"tensors come as a mapping of names to arrays; got {show(tensors)}")
        self._tensors = {name: _tensor(name, value) for name, value in sorted(tensors.items(), key=lambda x: str(x[0]))}
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensors):
            return NotImplemented
        same = list(self) == list(other)
        return same and all(t.dtype == o.dtype and torch.equal(t, o) for t, o in zip(self.values(), other.values()))

    def __hash__(self) -> int:
        return hash(tuple((name, tuple(t.shape)) for name, t in self.items()))

    def __repr__(self) -> str:
        return f"Tensors({len(self)} tensors, {self.bytes / 2**20:.2f} MiB)"

    def only(self, names: Iterable[str]) -> Tensors:
        """Some of them, which are shared, not copied."""
        made = Tensors({})
        made._tensors = {name: self[name] for name in sorted(names)}
        made._placed = self._placed
        return made

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.values())

    def like(self, name: str, other: Tensor) -> Tensor:
        """A tensor in the device and dtype of another; converted once for each."""
        key = (name, other.device, other.dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # an inference tensor could not be used with gradients on later
                self._placed[key] = self._tensors[name].to(other.device, other.dtype)
        return self._placed[key]

    def to_dict(self) -> dict[str, Any]:
        """A JSON value: the bytes of a safetensors file as base64 text."""
        return {"safetensors": base64.b64encode(save(dict(self))).decode()}


def _decode(text: str) -> dict[str, Tensor]:
    try:
        return load(base64.b64decode(text, validate=True))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"damaged tensors: {show(error)}") from None


def _tensor(name: Any, value: Any) -> Tensor:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a tensor's name is a text; got {show(name)}")
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name!r} must be an array of numbers; got {show(value)}") from None
    if tensor.is_complex() or tensor.is_quantized:
        raise ValueError(f"{name!r} must be an array of real numbers; it is {tensor.dtype}")
    wide = tensor.float() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
    if tensor.is_floating_point() and not torch.isfinite(wide).all():
        bad = int((~torch.isfinite(wide)).sum())
        raise ValueError(f"{name!r} has {bad} of {tensor.numel()} entries that are not finite")
    return tensor
