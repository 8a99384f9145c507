"""Judging ways of drawing on the same samples: against the user's own pictures, and against a many-step solution."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..calibrate.setup import Setup, check_uncached
from ..evaluate import metrics
from ..evaluate.comparison import Comparison
from ..evaluate.measure import Instruments, Look, measure
from ..evaluate.rows import Row, Run, run_row, run_rows, uncached
from ..evaluate.summary import summarise

OWN, SOLUTION = "own", "solution"
SMALLEST = 11  # pixels of a picture that structural similarity is defined for
Before = Callable[[Row], None]


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

    def score(self, rows: Sequence[Row], share: float = 1.0, before: Before = lambda row: None) -> list[dict[str, Any]]:
        """Numbers of every row on a share of the samples: psnr, ssim, latent, fd (with features), speed-up, its spread.

        Those against the other reference bear its name: `psnr solution`.
        """
        drawn = self._drawn(rows, max(1, round(share * len(self.parts))), before)
        return self._scored(drawn)

    def warm(self) -> int:
        """Draws the first uncached pictures; pixels of their shorter side."""
        (runs,) = self._drawn([], 1)
        return min(runs[0].pictures.shape[1:3])

    def compare(
        self, rows: Sequence[Row], labels: Sequence[str], provenance: Mapping[str, Any], baseline: str
    ) -> tuple[Comparison, list[dict[str, Any]]]:
        """A comparison with the uncached row, for the report, with intervals; and the numbers of `score`."""
        drawn = self._drawn(rows, len(self.parts))
        instruments = Instruments(ssim=_structured(drawn[0][0]), look=self.look)
        everything = [self.own, *rows]
        batches = [
            measure(everything, runs, part, self._asked(part)[0], instruments)
            for runs, part in zip(drawn, self.parts, strict=True)
        ]
        seeds = [seed for part in self.parts for seed in self._asked(part)[1]]
        return summarise(everything, batches, labels, seeds, provenance, baseline=baseline), self._scored(drawn)

    def _drawn(self, rows: Sequence[Row], count: int, before: Before = lambda row: None) -> list[list[Run]]:
        """[parts][1 + rows], the uncached row first."""
        return [
            run_rows(self.pipe, [self.own, *rows], *self._asked(part), self.setup.guidance_scale, number, before)
            for number, part in enumerate(self.parts[:count])
        ]

    def _scored(self, drawn: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
        own, *found = zip(*drawn, strict=True)
        references = {OWN: own}
        if self.many is not None:
            references[SOLUTION] = tuple(self._solution(n) for n in range(len(drawn)))
        return [self._numbers(runs, own, references) for runs in found]

    def _asked(self, part: Sequence[int]) -> tuple[list[Any], list[int]]:
        return [self.setup.condition(self.pipe, j) for j in part], [self.setup.seed + j for j in part]

    def _solution(self, number: int) -> Run:
        if number not in self.solved and self.many is not None:
            asked = self._asked(self.parts[number])
            self.solved[number] = run_row(self.pipe, self.many, *asked, self.setup.guidance_scale)
        return self.solved[number]

    def _numbers(
        self, runs: Sequence[Run], own: Sequence[Run], references: Mapping[str, Sequence[Run]]
    ) -> dict[str, Any]:
        ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(runs, own, strict=True)]
        numbers: dict[str, Any] = {
            "speedup": statistics.median(ratios),
            "speedup_low": min(ratios),
            "speedup_high": max(ratios),
            "compute_fraction": statistics.fmean(run.compute_fraction for run in runs),
        }
        for name, reference in references.items():
            for measured, value in self._against(runs, reference).items():
                numbers[measured if name == self.against else f"{measured} {name}"] = value
        return numbers

    def _against(self, runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, float]:
        rows = [Row("reference", "reference", 1), Row("row", "row", 1)]
        instruments = Instruments(ssim=_structured(runs[0]), look=self.look)
        columns: dict[str, list[float]] = {}
        features: list[list[np.ndarray]] = [[], []]
        for part, run, wanted in zip(self.parts, runs, reference, strict=False):
            found = measure(rows, [wanted, run], part, self._asked(part)[0], instruments)
            for name, values in found.table.items():
                columns.setdefault(name, []).extend(values[len(part) :])
            for row in (0, 1):
                if self.look is not None:
                    features[row].append(found.arrays[f"features/{row}"])
        numbers = {
            "psnr": metrics.decibels(torch.tensor(columns["squared error"]).mean().item()),
            "latent": statistics.fmean(columns["latent error"]),
        }
        if "ssim" in columns:
            numbers["ssim"] = statistics.fmean(columns["ssim"])
        if self.look is not None:
            both = [torch.from_numpy(np.concatenate(one)) for one in features]
            numbers["fd"] = metrics.frechet_distance(both[1], both[0]) if len(both[0]) > 1 else float("nan")
        return numbers


def _structured(run: Run) -> bool:
    """Whether pictures are large enough for structural similarity."""
    return min(run.pictures.shape[1:3]) >= SMALLEST
