"""Small diffusion transformers that come with the package, really trained, for examples and measurements.

>>> pipe = load("glyphs")
>>> pipe("DITTO", num_inference_steps=20).images  # five PIL pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled models."""
    return sorted(p.parent.name for p in _FOLDER.glob("*/model_index.json"))


def folder(name: str) -> Path:
    """Folder of a bundled model, in diffusers' layout."""
    if name not in names():
        raise ValueError(f"unknown bundled model {name!r}; known: {', '.join(names()) or 'none'}")
    return _FOLDER / name


def load(
    name: str, torch_dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> DiffusionPipeline:
    """The pipeline of a bundled model, moved to `device` if one is given (weights are stored in float16)."""
    path = folder(name)
    from .pipeline import GlyphsPipeline  # diffusers takes seconds to import

    # The options avoid a warning on every load: the low-memory path needs `accelerate`, and 6 MB need no such path;
    # the argument for the precision changes its name between versions of diffusers.
    pipe = GlyphsPipeline.from_pretrained(str(path), local_files_only=True, low_cpu_mem_usage=False)
    torch.nn.Module.to(pipe.transformer, torch_dtype)  # diffusers' own `to` warns about layers that do not exist here
    return pipe if device is None else pipe.to(device)
