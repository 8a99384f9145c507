"""Tasks of plain numpy for the tests of the work queue; workers import them by name."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dittocache.evaluate.task import Evaluation
from dittocache.work import Results, run


@dataclass(frozen=True)
class Noise:
    """Noise by sample, and its mean."""

    scale: float = 1.0

    def config(self) -> dict[str, Any]:
        return {"task": "noise", "scale": self.scale, "rows": [{"label": "a"}, {"label": "b"}]}

    def open(self) -> None:
        pass

    def run(self, samples: Any) -> Results:
        noise = np.stack([np.random.default_rng(j).normal(0, self.scale, 50) for j in samples])
        table = {"sample": list(samples), "mean": noise.mean(1), "name": [f"sample {j}" for j in samples]}
        return Results(table, {"noise": noise, "turned": noise.T}, {"count": len(samples)}, {"pid": os.getpid()})


@dataclass(frozen=True)
class Once(Noise):
    """Before it computes sample `at` it sends SIGKILL to itself or its parent: once, or (no mark) every time."""

    mark: Path | None = None
    at: int = 4
    whom: str = "self"

    def run(self, samples: Any) -> Results:
        if self.at in samples and not (self.mark and self.mark.exists()):
            if self.mark:
                self.mark.write_text(str(os.getpid()))
            os.kill(os.getpid() if self.whom == "self" else int(os.environ["DRIVER"]), signal.SIGKILL)
        return super().run(samples)


@dataclass(frozen=True)
class Failing(Noise):
    """Raises an error of its own."""

    def run(self, samples: Any) -> Results:
        raise ValueError(f"nothing can be done about {samples[0]}")


@dataclass
class KilledEvaluation(Evaluation):
    """Sends SIGKILL to itself before sample 2, once."""

    mark: Path | None = None

    def run(self, samples: Any) -> Results:
        if self.mark and 2 in samples and not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(samples)


if __name__ == "__main__":  # a driver that is to be killed: jobs.py MARK OUT ENGINE WORKERS
    os.environ["DRIVER"] = str(os.getpid())
    sys.modules["jobs"] = sys.modules["__main__"]
    mark, out, engine, workers = sys.argv[1:]
    import jobs

    run(jobs.Once(mark=Path(mark), whom="driver"), 10, 2, out, engine, int(workers))
