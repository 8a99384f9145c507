"""What a router is trained on: the pipeline's own uncached samples, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..calibrate.setup import Setup, draw
from ..parts import show

if TYPE_CHECKING:
    from ..evaluate.compare import Progress

CHUNK = 36  # samples drawn at once


def check(x0: Tensor, labels: Tensor, shape: tuple[int, ...], classes: int, source: str) -> None:
    """Raises a ValueError unless x0 is a finite [n, *shape] and labels are n whole numbers below `classes`."""
    wanted = f"x0 must be [n, {', '.join(map(str, shape))}] with at least one sample"
    if x0.ndim != len(shape) + 1 or tuple(x0.shape[1:]) != shape or not len(x0) or not x0.is_floating_point():
        raise ValueError(f"{source}: {wanted}, of floats; got {list(x0.shape)} of {x0.dtype}")
    if labels.shape != (len(x0),) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"{source}: labels must be [{len(x0)}] whole numbers; got {list(labels.shape)} of {labels.dtype}"
        )
    bad = int((~torch.isfinite(x0)).sum())
    if bad:
        raise ValueError(f"{source}: x0 has {bad} of {x0.numel()} entries that are not finite")
    out = labels[(labels < 0) | (labels >= classes)]
    if len(out):
        raise ValueError(f"{source}: labels must lie from 0 to {classes - 1}; got {int(out[0])}")


def read(path: Path, shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    """x0 [n, *shape] and labels [n] of a safetensors file with these names.

    Raises:
        ValueError: no such file, a damaged one, or tensors that do not fit the network.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or no safetensors file: {show(str(error))}") from None
    missing = sorted({"x0", "labels"} - set(found))
    if missing:
        raise ValueError(f"{str(path)!r} has no tensor {missing[0]!r}; it has {', '.join(sorted(found)) or 'none'}")
    check(found["x0"], found["labels"], shape, classes, repr(str(path)))
    return found["x0"], found["labels"].long()


@torch.no_grad()
def network_space(pipe: Any, pictures: Tensor) -> Tensor:
    """What the network sees of pictures [n, channels, height, width] in [0, 1]: latents, or pixels from -1 to 1."""
    vae, x = getattr(pipe, "vae", None), 2 * pictures - 1
    if vae is None:
        return x
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    encoded = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode()
    return ((encoded - shift) * vae.config.scaling_factor).float().cpu()


def own(pipe: Any, setup: Setup, count: int, progress: Progress | None = None) -> dict[str, Tensor]:
    """x0 and labels of samples that the pipeline draws."""
    drawn = []
    for first in range(0, count, CHUNK):
        chunk = range(first, min(first + CHUNK, count))
        pictures = torch.from_numpy(draw(pipe, setup, chunk, "np")).permute(0, 3, 1, 2)
        drawn.append(network_space(pipe, pictures))
        if progress is not None:
            progress(chunk.stop, count, "samples")
    return {"x0": torch.cat(drawn), "labels": torch.tensor([setup.condition(pipe, j) for j in range(count)])}
