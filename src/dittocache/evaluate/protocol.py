"""The protocol for class-conditional ImageNet on finished shards: FID, sFID, Inception score, precision, recall.

The numbers, and what they are compared with, are in `adm`; here they are taken of every row of an evaluation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..work import Folder, Shard
from . import adm, features
from .comparison import Comparison, Score
from .task import ADM_KEPT, Evaluation

TITLES = {
    "fid": "fid",
    "sfid": "sfid",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
}


def with_numbers(
    comparison: Comparison, task: Evaluation, folder: Folder, shards: Sequence[Shard], reference: str | Path
) -> Comparison:
    """The comparison with the five numbers of every row against a reference batch (npz).

    Args:
        task: one that keeps what is needed (`adm`).
        reference: as published with guided-diffusion.
    """
    inception: Any = features.load("inception", task.weights, task.device)
    wanted = adm.read_reference(reference, inception)
    seen = [adm.Activations() for _ in task.rows]
    for shard in shards:
        arrays = folder.read(shard).arrays
        for number, row in enumerate(seen):
            row.add({name: torch.from_numpy(arrays[f"{name}/{number}"]) for name in ADM_KEPT})
    results = []
    for result, row in zip(comparison.results, seen, strict=True):
        numbers = dataclasses.asdict(adm.evaluate(row, wanted, task.device))
        found = {title: numbers[name] for name, title in TITLES.items() if numbers[name] is not None}
        scores = {title: Score(value=value, low=None, high=None) for title, value in found.items()}
        results.append(dataclasses.replace(result, scores=result.scores | scores))
    told = comparison.provenance | {"reference": Path(reference).name}
    return dataclasses.replace(comparison, results=tuple(results), provenance=told)


def write_samples(task: Evaluation, folder: Folder, shards: Sequence[Shard], out: Path) -> list[Path]:
    """Writes the pictures of every row as a sample batch for the authors' own evaluator; returns the files."""
    count = sum(len(shard.samples) for shard in shards)
    files = []
    for number, row in enumerate(task.rows):
        name = re.sub(r"[^A-Za-z0-9]+", "-", row.label).strip("-")
        files.append(out / f"samples-{number}-{name}.npz")
        adm.write_pictures(files[-1], _pictures(folder, shards, number), count)
    return files


def _pictures(folder: Folder, shards: Sequence[Shard], number: int) -> Iterator[Tensor]:
    for shard in shards:
        levels = torch.from_numpy(folder.read(shard).arrays[f"pictures/{number}"])
        yield levels.permute(0, 3, 1, 2).float() / 255
