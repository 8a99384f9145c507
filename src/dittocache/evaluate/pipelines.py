"""Pipelines by name: bundled ones, folders, and models of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from .. import bundled

HELD = (".json", ".safetensors", ".bin", ".txt", ".model")  # files that make a model what it is
SAMPLED = 2**20  # bytes at both ends of a large file that stand for it


def locate(name: str) -> Path:
    """The folder of a pipeline: a bundled model's, a folder as it is, or what the Hub has under this name.

    Raises:
        ValueError: there is no such model.
        OSError: the Hub cannot be reached, and the model is not in its cache.
    """
    if name not in bundled.names() and Path(name).is_dir():
        return Path(name)
    if name in bundled.names() or "/" not in name:
        return bundled.folder(name)
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name))


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline, quiet.

    Raises:
        ValueError: there is no such model, or the folder holds no pipeline; see `locate`.
    """
    from diffusers.utils import logging

    folder = locate(name)
    logging.disable_progress_bar()
    try:
        pipe = bundled.load(name, dtype) if name in bundled.names() else _saved(folder)
    finally:
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)


def classes(name: str) -> int:
    """Classes of a class-conditional pipeline, whose weights are not loaded; 0 for one that draws from prompts."""
    folder = locate(name)
    if "class_labels" not in inspect.signature(_class(folder).__call__).parameters:
        return 0
    return int(json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))["num_embeds_ada_norm"])


def _class(folder: Path) -> Any:
    """The class of the pipeline in a folder: one of ours, which diffusers does not know, or of diffusers."""
    import diffusers

    from ..bundled.pipeline import PIPELINES

    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{str(folder)!r} holds no pipeline: model_index.json is missing or damaged") from None
    found = {pipeline.__name__: pipeline for pipeline in PIPELINES.values()}.get(name) or getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"{str(folder)!r} holds a {name}, which diffusers {diffusers.__version__} does not know")
    return found


def _saved(folder: Path) -> Any:
    pipeline = _class(folder)
    ours = {"low_cpu_mem_usage": False} if pipeline.__module__.startswith(bundled.__name__) else {}
    try:
        return pipeline.from_pretrained(folder, local_files_only=True, **ours)
    except AttributeError as error:
        raise ValueError(
            f"{str(folder)!r} holds a pipeline that cannot be loaded: {str(error).splitlines()[0]}"
        ) from None


def fingerprint(folder: Path) -> str:
    """Digest of the configurations and weights in a folder, or of one file; of large files the size and both ends."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in HELD) if folder.is_dir() else [folder]:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED))
            if size > SAMPLED:
                file.seek(max(SAMPLED, size - SAMPLED))
                digest.update(file.read())
    return digest.hexdigest()
