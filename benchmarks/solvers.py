"""Plans against fewer steps with good solvers, at equal network calls, judged by a many-step solution.

    python benchmarks/solvers.py --threads 1
    python benchmarks/solvers.py --budgets 10 --tries 4 --held-out 12 --solution 200        (a quick look)

Predictors are fitted towards the solution (of fewer steps than the one that judges) on some samples, plans are searched
on others, and everything is judged on a third set that nothing has seen: squared error of the pictures in dB, with 95 %
bootstrap intervals, and of the difference to the best solver with as many calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dittocache
from dittocache import bundled
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.evaluate.bootstrap import difference, interval, psnr_of
from dittocache.evaluate.provenance import provenance
from dittocache.evaluate.rows import scheduled
from dittocache.tune import SCHEDULERS, Predictors, search

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


def told(errors: list[float]) -> dict[str, float]:
    found = interval(psnr_of(errors), len(errors))
    return {"db": round(found.value, 2), "low": round(found.low, 2), "high": round(found.high, 2)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[17, 13, 10, 7])
    parser.add_argument("--grids", nargs="+", default=["own:50"], help="SCHEDULER:STEPS of the plans")
    parser.add_argument(
        "--samples", type=int, default=24, help="that predictors are fitted to, and as many for the search"
    )
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--solution", type=int, default=500)
    parser.add_argument("--followed", type=int, default=250, help="steps of the solution that predictors are fitted to")
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
    rows = [
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
        name, _, steps = grid.partition(":")
        setup, began = Setup(num_steps=int(steps)), time.perf_counter()
        with scheduled(pipe, SCHEDULERS[name]):
            samples = range(2 * args.samples)
            planner = Predictors(pipe, setup, samples[: args.samples], samples[args.samples :], reference=args.followed)
            seconds[f"recording {grid}"] = round(time.perf_counter() - began, 1)
            for row in rows:
                budget, began = row["calls"], time.perf_counter()
                best = min(fewer[budget].values(), key=sum)
                found: dict[str, Any] = {}
                for kind, tries in (("path", 1), ("search", args.tries)):
                    recipe, _ = search(planner, budget, tries)
                    errors = judge.errors(int(steps), replace(recipe, made_for={}))
                    gain = difference(psnr_of(errors), psnr_of(best), len(errors))
                    computed = [k for k in range(int(steps)) if k not in recipe.when.steps]
                    found[kind] = told(errors) | {
                        "gain": round(gain.value, 2), "gain_low": round(gain.low, 2), "gain_high": round(gain.high, 2),
                        "computed": computed,
                    }  # fmt: skip
                row["plans"][grid] = found
                seconds[f"{grid}, {budget} calls"] = round(time.perf_counter() - began, 1)
                print(grid, budget, {k: (v["db"], v["gain"]) for k, v in found.items()}, row["fewer steps"], flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
