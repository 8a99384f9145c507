"""Plans against fewer steps with good solvers, at equal network calls, judged by a many-step solution.

    python benchmarks/solvers.py --threads 1
    python benchmarks/solvers.py --budgets 10 --calls 40 --held-out 12 --grids own:50:100    (a quick look)

Predictors are fitted towards a solution on some samples, plans are searched on others, and everything is judged on a
third set that nothing has seen, with 95 % bootstrap intervals, paired ones for gains over the best solver with as many
calls. Two measures: `psnr`, the mean over the pictures of their PSNR; and `pooled`, the PSNR of their mean squared
error, which the few pictures that come out altogether different decide.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dittocache
from dittocache import Recipe, bundled
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.evaluate.bootstrap import Statistic, difference, interval, mean_of, psnr_of
from dittocache.evaluate.metrics import decibels
from dittocache.evaluate.provenance import provenance
from dittocache.evaluate.rows import scheduled
from dittocache.tune import SCHEDULERS, Predictors, search
from dittocache.tune.search import computed_steps

HERE = Path(__file__).parent
SOLVERS = ("ddim", "dpm++2m", "unipc")


class Judge:
    """Squared error of every picture against the solution."""

    def __init__(self, pipe: Any, count: int, solution: int, batch: int = 24) -> None:
        self.pipe, self.count, self.batch = pipe, count, batch
        self.truth = self.pictures(solution, None)

    def pictures(self, steps: int, recipe: Any) -> torch.Tensor:
        setup = Setup(num_steps=steps, seed=0)
        parts = [range(n, min(n + self.batch, self.count)) for n in range(0, self.count, self.batch)]
        with contextlib.nullcontext() if recipe is None else dittocache.enable(self.pipe, recipe):
            return torch.cat([torch.as_tensor(draw(self.pipe, setup, part)) for part in parts]).double()

    def errors(self, steps: int, recipe: Any = None) -> list[float]:
        return (self.pictures(steps, recipe) - self.truth).square().flatten(1).mean(1).tolist()


MEASURES: dict[str, Callable[[list[float]], Statistic]] = {
    "psnr": lambda errors: mean_of([decibels(error) for error in errors]),
    "pooled": psnr_of,
}


def told(errors: list[float]) -> dict[str, Any]:
    """Both measures with their bounds."""
    return {name: bounded(interval(of(errors), len(errors))) for name, of in MEASURES.items()}


def gains(errors: list[float], others: dict[str, list[float]]) -> dict[str, Any]:
    """Over the solver that is best by the same measure."""
    every = np.arange(len(errors))
    found = {}
    for name, of in MEASURES.items():
        values = [of(other).of(every) for other in others.values()]
        best = list(others.values())[int(np.argmax(values))]
        found[name] = bounded(difference(of(errors), of(best), len(errors)))
    return found


def bounded(found: Any) -> list[float]:
    """[value, low, high] in dB."""
    return [round(x, 2) for x in (found.value, found.low, found.high)]


def plans(planner: Predictors, budget: int, tries: int) -> Iterator[tuple[str, tuple[Recipe, float]]]:
    """The path's plan, the searched one, and that with refined factors; each with its error on the trial's samples."""
    yield "path", search(planner, budget, 1)
    searched = search(planner, budget, tries)
    yield "searched", searched
    yield "refined", planner.refined(searched[0])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[17, 13, 10, 7])
    parser.add_argument(
        "--grids",
        nargs="+",
        default=["own:50:500", "unipc:30:250"],
        help="SCHEDULER:STEPS:FOLLOWED of the plans; predictors are fitted to a solution of as many steps as followed",
    )
    parser.add_argument("--samples", type=int, default=32, help="that predictors are fitted to")
    parser.add_argument("--trial", type=int, default=16, help="samples that plans are searched on")
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--calls", type=int, default=400, help="computed steps of all plans that a search draws")
    parser.add_argument("--solution", type=int, default=500)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "solvers.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(pipe, args.held_out, args.solution)
    fewer: dict[int, dict[str, list[float]]] = {budget: {} for budget in args.budgets}
    uncached: dict[str, Any] = {}
    for name in SOLVERS:
        with scheduled(pipe, SCHEDULERS[name]):
            uncached[f"{name}, 50 steps"] = told(judge.errors(50))
            for budget in args.budgets:
                fewer[budget][name] = judge.errors(budget)
    rows: list[dict[str, Any]] = [
        {"calls": budget, "fewer steps": {name: told(errors) for name, errors in found.items()}, "plans": {}}
        for budget, found in fewer.items()
    ]
    seconds: dict[str, float] = {}
    data = {
        "provenance": provenance(pipe, "glyphs", 50, 1.5, 24),
        "seconds": seconds,
        "uncached": uncached,
        "rows": rows,
    }
    data["settings"] = {k: v for k, v in vars(args).items() if k != "out"}
    for grid in args.grids:
        name, steps, followed = grid.split(":")
        setup, began = Setup(num_steps=int(steps)), time.perf_counter()
        with scheduled(pipe, SCHEDULERS[name]):
            fitted, trial = range(args.samples), range(args.samples, args.samples + args.trial)
            planner = Predictors(pipe, setup, fitted, trial, reference=int(followed))
            seconds[f"recording {grid}"] = round(time.perf_counter() - began, 1)
            for row in rows:
                budget, found = row["calls"], {}
                for kind, made in plans(planner, budget, max(1, args.calls // budget)):
                    errors = judge.errors(int(steps), replace(made[0], made_for={}))
                    computed = computed_steps(made[0], int(steps))
                    trial_db = round(decibels(made[1]), 2)
                    found[kind] = told(errors) | {"gain": gains(errors, fewer[budget]), "trial": trial_db}
                    found[kind] |= {"computed": computed, "seconds": round(time.perf_counter() - began, 1)}
                    print(grid, budget, kind, found[kind], flush=True)
                    began = time.perf_counter()
                row["plans"][grid] = found
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
