"""Small diffusion transformers that come with the package, really trained, for examples and measurements.

>>> pipe = load("glyphs")
>>> pipe("DITTO", num_inference_steps=20).images  # five PIL pictures
>>> load("emoji")(["red heart", "cat face"], num_inference_steps=20).images  # two more
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


def emoji_names(held_out: bool = False) -> list[str]:
    """The names that the model "emoji" was trained on, or with `held_out` those that were kept from it."""
    from .noto import read_index

    return [e.name for e in read_index(folder("emoji")) if e.held_out == held_out]


class Questions(NamedTuple):
    """What to ask of a bundled model, one of each for every picture.

    Attributes:
        conditions: class numbers or prompts, the first argument of its pipeline.
        names: how they are written.
        classes: what its judge should read.
    """

    conditions: list[int] | list[str]
    names: list[str]
    classes: list[int]


def questions(name: str, count: int) -> Questions:
    """So many questions, spread evenly over all that a bundled model was trained on, and again if they are more."""
    from .data import CHARACTERS
    from .noto import read_index

    path = folder(name)
    if name == "emoji":
        known = [(i, e.name) for i, e in enumerate(read_index(path)) if not e.held_out]
    else:
        known = list(enumerate(CHARACTERS))
    chosen = [known[j % len(known) if count > len(known) else j * len(known) // count] for j in range(count)]
    classes, names = [i for i, _ in chosen], [text for _, text in chosen]
    return Questions(names if name == "emoji" else classes, names, classes)


def tuned(name: str) -> dict[str, Path]:
    """Folders of the recipes that `dittocache tune` found for a bundled model, by how much faster they are.

    >>> dittocache.enable(pipe, bundled.tuned("glyphs")["3x"])
    """
    return {path.parent.name: path.parent for path in sorted(folder(name).glob("tuned/*/recipe.json"))}


def load(
    name: str, torch_dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> DiffusionPipeline:
    """The pipeline of a bundled model, moved to `device` if one is given (weights are stored in float16)."""
    path = folder(name)
    from .pipeline import PIPELINES  # diffusers takes seconds to import

    # The options avoid a warning on every load: the low-memory path needs `accelerate`, and 6 MB need no such path;
    # the argument for the precision changes its name between versions of diffusers.
    pipe = PIPELINES[name].from_pretrained(str(path), local_files_only=True, low_cpu_mem_usage=False)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            torch.nn.Module.to(module, torch_dtype)  # diffusers' own `to` warns about layers that do not exist here
    return pipe if device is None else pipe.to(device)
