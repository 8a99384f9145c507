"""Judging ways of drawing on the same samples: against the user's own pictures, and against a many-step solution."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..calibrate.setup import Setup, check_uncached
from ..evaluate import metrics
from ..evaluate.comparison import Comparison
from ..evaluate.measure import Instruments, Look, measure
from ..evaluate.rows import Row, Run, run_row, run_rows, uncached
from ..evaluate.summary import summarise
from ..work import Results

OWN, SOLUTION = "own", "solution"
SMALLEST = 11  # pixels of a picture that structural similarity is defined for


class Judge:
    """Draws rows beside the uncached one, and says how fast and how close they are.

    Args:
        pipe: without a cache.
        setup: how the samples are drawn, and the steps of the uncached row.
        samples: their numbers.
        batch: how many at once.
        solution: steps of a run that stands for the exact solution; None for none.
        against: which of the two references counts, `own` or `solution`.
        look: features for Frechet distances.
    """

    def __init__(
        self,
        pipe: Any,
        setup: Setup,
        samples: Sequence[int],
        *,
        batch: int = 12,
        solution: int | None = None,
        against: str = OWN,
        look: Look | None = None,
    ) -> None:
        check_uncached(pipe)
        self.pipe, self.setup, self.against, self.look = pipe, setup, against, look
        self.parts = [list(samples[n : n + batch]) for n in range(0, len(samples), batch)]
        self.own = uncached(setup.num_steps)
        self.many = None if solution is None else Row("solution", "reference", solution)
        self.solved: dict[int, Run] = {}

    def score(self, rows: Sequence[Row], share: float = 1.0) -> list[dict[str, Any]]:
        """Numbers of every row on a share of the samples: psnr, ssim, latent, fd (with features), speed-up, its spread.

        Those against the other reference bear its name: `psnr solution`.
        """
        drawn = self._drawn(rows, max(1, round(share * len(self.parts))))
        return self._scored(rows, drawn, self._measured(rows, drawn, [runs[0] for runs in drawn]))

    def warm(self) -> int:
        """Draws the first uncached pictures; pixels of their shorter side."""
        (runs,) = self._drawn([], 1)
        return min(runs[0].pictures.shape[-3:-1])

    def compare(
        self, rows: Sequence[Row], labels: Sequence[str], provenance: Mapping[str, Any], baseline: str
    ) -> tuple[Comparison, list[dict[str, Any]]]:
        """A comparison with the uncached row, for the report, with intervals; and the numbers of `score`."""
        drawn = self._drawn(rows, len(self.parts))
        batches = self._measured(rows, drawn, [runs[0] for runs in drawn])
        seeds = [seed for part in self.parts for seed in self._asked(part)[1]]
        comparison = summarise([self.own, *rows], batches, labels, seeds, provenance, baseline=baseline)
        return comparison, self._scored(rows, drawn, batches)

    def _drawn(self, rows: Sequence[Row], count: int) -> list[list[Run]]:
        """[parts][1 + rows], the uncached row first."""
        return [
            run_rows(self.pipe, [self.own, *rows], *self._asked(part), self.setup.guidance_scale, number)
            for number, part in enumerate(self.parts[:count])
        ]

    def _measured(
        self, rows: Sequence[Row], drawn: Sequence[Sequence[Run]], references: Sequence[Run]
    ) -> list[Results]:
        """Every part against its reference, which is row 0 of the results."""
        instruments = Instruments(ssim=_structured(references[0]), look=self.look)
        return [
            measure([self.own, *rows], [wanted, *runs[1:]], part, self._asked(part)[0], instruments)
            for part, runs, wanted in zip(self.parts, drawn, references, strict=False)
        ]

    def _scored(
        self, rows: Sequence[Row], drawn: Sequence[Sequence[Run]], own: Sequence[Results]
    ) -> list[dict[str, Any]]:
        found = {OWN: own}
        if self.many is not None:
            solved = [self._solution(n) for n in range(len(drawn))]
            found[SOLUTION] = self._measured(rows, drawn, solved)
        numbers = []
        for row in range(1, len(rows) + 1):
            numbers.append(_speed([runs[row] for runs in drawn], [runs[0] for runs in drawn]))
            for name, batches in found.items():
                for measured, value in _closeness(batches, row).items():
                    numbers[-1][measured if name == self.against else f"{measured} {name}"] = value
        return numbers

    def _asked(self, part: Sequence[int]) -> tuple[list[Any], list[int]]:
        return [self.setup.condition(self.pipe, j) for j in part], [self.setup.seed + j for j in part]

    def _solution(self, number: int) -> Run:
        if number not in self.solved and self.many is not None:
            asked = self._asked(self.parts[number])
            self.solved[number] = run_row(self.pipe, self.many, *asked, self.setup.guidance_scale)
        return self.solved[number]


def _speed(runs: Sequence[Run], own: Sequence[Run]) -> dict[str, Any]:
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(runs, own, strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "compute_fraction": statistics.fmean(run.compute_fraction for run in runs),
    }


def _closeness(batches: Sequence[Results], row: int) -> dict[str, float]:
    """Of a row to row 0, over all batches."""

    def column(name: str) -> list[float]:
        return [
            value
            for batch in batches
            for number, value in zip(batch.table["row"], batch.table[name], strict=True)
            if number == row
        ]

    numbers = {
        "psnr": metrics.decibels(torch.tensor(column("squared error")).mean().item()),
        "latent": statistics.fmean(column("latent error")),
    }
    if "ssim" in batches[0].table:
        numbers["ssim"] = statistics.fmean(column("ssim"))
    if f"features/{row}" in batches[0].arrays:
        features, wanted = (
            torch.from_numpy(np.concatenate([batch.arrays[f"features/{n}"] for batch in batches])) for n in (row, 0)
        )
        numbers["fd"] = metrics.frechet_distance(features, wanted) if len(features) > 1 else float("nan")
    return numbers


def _structured(run: Run) -> bool:
    """Whether pictures are large enough for structural similarity."""
    return min(run.pictures.shape[-3:-1]) >= SMALLEST
