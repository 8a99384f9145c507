"""Files of weights: read without running code, and put into a network whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from one of torch.save (.pth, .pt).

    Raises:
        ValueError: the file is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # these raise whatever the broken bytes lead them to
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from None


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Puts tensors into a network in evaluation; what the network does not have is left out.

    Raises:
        ValueError: one that the network needs is missing or of another shape.
    """
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):  # counts training steps; old files lack it
            continue
        if name not in tensors:
            raise ValueError(f"{path} does not hold the weights of {type(network).__name__}: no {name!r}")
        if tensors[name].shape != tensor.shape:
            shapes = f"{list(tensors[name].shape)} instead of {list(tensor.shape)}"
            raise ValueError(f"{path} does not hold the weights of {type(network).__name__}: {name!r} is {shapes}")
    network.load_state_dict({name: tensors[name] for name in wanted if name in tensors}, strict=False)
    network.eval().requires_grad_(False)
