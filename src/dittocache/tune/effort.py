"""How much a search draws, and about what that costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..parts import check_int, check_number
from .predictor import OUTPUTS
from .refine import cost

POLISHED = 0.3  # share of computed steps that a plan is thought to have


@dataclass(frozen=True)
class Effort:
    """How much is drawn.

    Args:
        samples: that predictors are fitted to, all at once.
        trial: samples that plans are searched on, in the same batch.
        judged: samples that contenders are compared on.
        held_out: samples of the last check, which nothing has seen before.
        batch: pictures drawn at once by contenders.
        tries: plans that the local search draws, if they compute three tenths of the steps: more cheaper ones, fewer of
            the others.
        methods: settings of published methods that are judged; 0 for none.
        seconds: time budget; what was found by then is checked and saved.
    """

    samples: int = 24
    trial: int = 24
    judged: int = 24
    held_out: int = 48
    batch: int = 8
    tries: int = 24
    methods: int = 16
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "seconds":
                if value is not None:
                    check_number("the time budget in seconds", value, 0)
            else:
                check_int(name, value, 0 if name in ("tries", "methods") else 2 if name == "held_out" else 1)

    def recording(self, steps: int) -> float:
        """Of a scheduler and number of steps: uncached runs of a sample, about."""
        return self.samples + self.trial + 2 * (steps - 1)

    def made(self, share: float) -> float:
        """Of a plan that computes a share of the steps, fitted and tried."""
        return share * (self.samples + self.trial)

    def plans(self, share: float) -> int:
        """That a local search draws, if they compute a share of the steps."""
        return max(round(self.tries * POLISHED / share), min(self.tries, 1))

    def refining(self, budget: int, steps: int, outputs: int = OUTPUTS) -> float:
        """Of the factors of a plan."""
        return self.samples * cost(budget, outputs, True) / steps

    def polishing(self, budget: int, steps: int) -> float:
        """Of a local search, and of the factors of what it finds."""
        return self.tries * self.made(POLISHED) + (self.refining(budget, steps) if self.tries else 0)

    def runs(self, steps: int, grids: int) -> float:
        """Of everything."""
        planning = self.recording(steps) + 5 * self.made(0.4) + 6 * self.batch
        polishing = self.polishing(round(POLISHED * steps), steps)
        return grids * planning + polishing + 2 * self.batch * self.methods + 4 * self.judged + 3 * self.held_out
