"""What a search found, and its files: the recipe with its model card, the comparison, all numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic
from ..evaluate.comparison import Comparison
from ..evaluate.rows import Row
from .contender import told_numbers
from .goal import Goal

FILE = "tune.json"
PICTURES = 8  # on the model card


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        row: the winner; its recipe is None if fewer steps of a scheduler are best.
        numbers: of the winner on held-out samples.
        met: whether they meet the goal.
        tried: everything that was judged, with its numbers.
        comparison: the winner beside the uncached pipeline and the best of the others, on held-out samples.
    """

    row: Row
    numbers: dict[str, Any]
    met: bool
    tried: list[dict[str, Any]]
    comparison: Comparison


def _pairs(tuned: Tuned) -> np.ndarray:
    """[2 n, h, w, c] some pictures in pairs, uncached and tuned."""
    both = [tuned.comparison.pictures[label][:PICTURES] for label in ("uncached", tuned.row.label)]
    return np.stack(both, 1).reshape(-1, *both[0].shape[1:])


def save(tuned: Tuned, goal: Goal, out: str | Path, model: str = "") -> Path:
    """Writes what was found: the recipe with its model card, the comparison for the report, and `tune.json`."""
    out = Path(out)
    tuned.comparison.save(out)
    whole = {
        "goal": goal.text(),
        "met": tuned.met,
        "winner": tuned.row.config(),
        "held_out": told_numbers(tuned.numbers),
        "tried": tuned.tried,
        "provenance": dict(tuned.comparison.provenance),
    }
    atomic.write(out / FILE, (json.dumps(whole, indent=1) + "\n").encode())
    if tuned.row.recipe is not None:
        measured = [result.to_dict() for result in tuned.comparison.results]
        names = ("label", "speedup", "speedup_low", "speedup_high", "psnr", "ssim", "frechet")
        rows = [{name: row[name] for name in names if row.get(name) is not None} for row in measured]
        how = {k: v for k, v in tuned.comparison.provenance.items() if k != "tried"}
        told: dict[str, Any] = {
            "goal": goal.text(),
            "model": model,
            "scheduler": tuned.row.scheduler,
            "measured": rows,
            "made": how,
        }
        told = {**tuned.row.recipe.provenance, **told}
        replace(tuned.row.recipe, provenance=told).save_pretrained(out, grid=_pairs(tuned))
    return out
