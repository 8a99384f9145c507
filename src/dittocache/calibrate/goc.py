"""GOC's inflection detector: the reused steps at which features go on as they went (arXiv 2503.05156)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..fill import At
from ..parameters import Int, Number
from ..recipe import Recipe, recipe
from .base import OnSchedule, See, Seen, add
from .setup import Setup, timesteps
from .statistics import Statistics
from .trial import Trial


@dataclass(frozen=True)
class CalibrateGOC(OnSchedule):
    """Finds GOC's position list P; the authors' own detector is not public, this one is ours.

    Recorded are, for every site and step, the inner product of a feature's last two changes, and the square of the
    last. By "cosine", a reused step is corrected if the cosine of the two changes, averaged over the sites, is above
    `limit`: where it is negative, features turn back, and going on along their last change leads away. By "trial", of
    these steps only those are corrected that bring trial runs on calibration samples closer to the uncached pictures.
    With eta above 1 that matters: a stand-in's error enters the next one times -eta, and grows until a step without a
    correction ends it.
    """

    method = "goc"

    eta: Annotated[float | None, Number(-float("inf"), help="strength; None for the authors' 1.2, on L2C 0.8")] = None
    limit: Annotated[float, Number(-1, 1, help="least mean cosine of two changes in a row at a corrected step")] = 0.0
    judge: Annotated[Literal["cosine", "trial"], "by the limit alone, or also by trial runs"] = "trial"
    trial_samples: Annotated[int, Int(1, help="calibration samples in every trial run")] = 16

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        self.reused(pipe, len(timesteps(pipe, setup)))  # refuses what does not go together
        changes: dict[str, Tensor] = {}

        def see(at: At, new: Seen, old: Seen | None) -> None:
            if old is None:
                return
            change, before = new.output.float() - old.output.float(), changes.get(at.site.name)
            column = torch.zeros(2, at.num_steps, dtype=torch.float64)
            column[0, at.step] = 0.0 if before is None else float((change * before).sum())
            column[1, at.step] = float(change.square().sum())
            add(sums, at.site.name, column)
            changes[at.site.name] = change

        return see

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        cosines = self.cosines(statistics)
        table = self.reused(pipe, len(cosines))
        steps = {k for some in table.values() for k in some}
        positions = {k for k in steps if k > 1 and float(cosines[k]) > self.limit}
        base = "static" if self.router_logits is None else "l2c"

        def correcting(steps: set[int]) -> Recipe:
            return recipe("goc", eta=self.eta, base=base, correct_steps=sorted(steps), **self.schedule)

        if self.judge == "trial":
            trial = Trial(pipe, setup, statistics.samples[: self.trial_samples])
            positions = trial.worth(positions, correcting)
        return correcting(positions)

    @staticmethod
    def cosines(statistics: Statistics) -> Tensor:
        """Cosine of the change into step k and the one before, mean over the sites: [steps], 0 for k < 2."""
        inner, square = torch.stack([statistics.sums[name] for name in sorted(statistics.sums)]).unbind(1)
        cosine = torch.zeros_like(inner)
        cosine[:, 1:] = inner[:, 1:] / (square[:, 1:] * square[:, :-1]).sqrt().clamp(min=1e-30)
        return cosine.mean(0)
