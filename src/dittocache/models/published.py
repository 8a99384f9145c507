"""Weights of published releases, into networks of ours that bear the same names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def load(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Gives a network that was made on the meta device the weights of a state dict: on the CPU, in eval mode.

    Nothing is allocated before all tensors are known to fit.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; `name` says of which network.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(key) != shapes.get(key):
            found, right = shapes.get(key, "missing"), wanted.get(key, "no such tensor")
            raise ValueError(f"not a state dict of {name}: {key!r} is {found}, where {right} was expected")
    model.to_empty(device="cpu").load_state_dict(state)
    model.eval()
