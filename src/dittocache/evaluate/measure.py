"""What is measured of one batch of pictures: how close each is to its reference, and what networks see in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..work import Results
from . import metrics
from .features import Score
from .rows import Row, Run

Look = Callable[[Tensor], Mapping[str, Tensor]]  # pictures [n, c, h, w] -> features [n, d], probabilities [n, classes]


@dataclass(frozen=True)
class Instruments:
    """What pictures are measured with, beside their squared error and the error of their latents.

    Args:
        ssim: whether structural similarity is measured, too.
        look: features for distances between sets, and probabilities of classes.
        keep: which of them are kept; the class with the largest probability always is.
        scores: learned metrics by name.
    """

    ssim: bool = True
    look: Look | None = None
    keep: tuple[str, ...] = ("features",)
    scores: Mapping[str, Score] = field(default_factory=dict)


def measure(
    rows: Sequence[Row],
    runs: Sequence[Run],
    samples: Sequence[int],
    conditions: Sequence[Any],
    instruments: Instruments,
    facts: Mapping[str, Any] | None = None,
) -> Results:
    """A batch as a shard's results; the first row is the reference.

    The table has a line for every row and sample; arrays are `pictures/0` (uint8 [n, h, w, c]), `latents/0`, and
    `features/0` (and what else is kept) of row 0, and so on. Of a video, squared error and structural similarity are
    means over its frames; networks look at its middle frame, which is also the one that is kept.

    Args:
        facts: more that is known of the batch, as JSON values.
    """
    columns: dict[str, list[Any]] = {"row": [], "sample": []}
    arrays: dict[str, np.ndarray] = {}
    wanted, stills = _tensor(runs[0].pictures), _tensor(middle(runs[0].pictures))
    frames = {"frames": runs[0].pictures.shape[1]} if runs[0].pictures.ndim == 5 else {}
    for number, run in enumerate(runs):
        pictures, still = _tensor(run.pictures), _tensor(middle(run.pictures))
        found: dict[str, Any] = {
            "squared error": metrics.squared_errors(pictures, wanted),
            "latent error": metrics.latent_errors(run.latents, runs[0].latents),
        }
        if instruments.ssim:
            found["ssim"] = metrics.ssims(pictures, wanted)
        for name, score in instruments.scores.items():
            beside = stills if score.beside == "references" else [str(condition) for condition in conditions]
            found[name] = score(still, beside)
        if instruments.look is not None:
            with torch.no_grad():
                seen = instruments.look(still)
            found["class"] = seen["probabilities"].argmax(1)
            arrays |= {f"{name}/{number}": seen[name].numpy() for name in instruments.keep}
        arrays[f"pictures/{number}"] = uint8(middle(run.pictures))
        arrays[f"latents/{number}"] = run.latents.float().numpy()
        columns["row"] += [number] * len(samples)
        columns["sample"] += samples
        for name, values in found.items():
            columns.setdefault(name, []).extend(values.tolist())
    return Results(
        columns,
        arrays,
        {"rows": [_facts(row, run) for row, run in zip(rows, runs, strict=True)], **frames, **(facts or {})},
        {"seconds": [run.seconds for run in runs]},
    )


def _facts(row: Row, run: Run) -> dict[str, Any]:
    return {
        "label": row.label,
        "compute_fraction": run.compute_fraction,
        "bytes_peak": run.bytes_peak,
        "plan": None if run.plan is None else run.plan.to_dict(),
        "warnings": list(run.warnings),
    }


def middle(pictures: np.ndarray) -> np.ndarray:
    """The middle frame of videos [n, frames, h, w, c]; pictures [n, h, w, c] as they are."""
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures


def _tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).movedim(-1, -3).float()


def uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] as 256 levels."""
    return np.rint(pictures.clip(0, 1) * 255).astype(np.uint8)
