"""How good are solved plans on glyphs, against TaylorSeer and fewer steps?

    python benchmarks/plans.py
    python benchmarks/plans.py --budgets 17 --tries 8 --held-out 12        (a quick look)

Errors are measured on some samples, plans are searched on others with other noise, and everything is judged on a third
set that nothing has seen: mean squared error of the pictures against the uncached ones, in dB.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dittocache
from dittocache import Recipe, bundled
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.calibrate.trial import Trial
from dittocache.evaluate.provenance import provenance
from dittocache.plan import COMPUTE, Site
from dittocache.tune import measure, search, solve

HERE = Path(__file__).parent


def db(error: float) -> float:
    return round(float(-10 * np.log10(error)), 2)


def computed(recipe: Recipe, steps: int) -> list[int]:
    return [k for k in range(steps) if k not in recipe.when.steps]  # type: ignore[attr-defined]


def even(budget: int, steps: int) -> Recipe:
    """TaylorSeer, order 1, with the interval whose number of computed steps is nearest to the budget."""
    known = [dittocache.recipe("taylorseer", interval=n, order=1) for n in range(1, steps + 1)]
    return min(known, key=lambda recipe: abs(count(recipe, steps) - budget))


def count(recipe: Recipe, steps: int) -> int:
    """How many steps a recipe computes."""
    column = [Site("blocks.0.attn", "attention", "blocks", 0, 1, 0)]
    return int((recipe.when.table(steps, column) == COMPUTE).sum())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[25, 17, 13, 10, 7])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--trial", type=int, default=12)
    parser.add_argument("--held-out", type=int, default=36)
    parser.add_argument("--tries", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plans.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    began = time.perf_counter()
    errors = measure(pipe, Setup(num_steps=args.steps), range(args.samples))
    seconds = {"measuring": round(time.perf_counter() - began, 1)}
    trial = Trial(pipe, Setup(num_steps=args.steps, seed=2_000_000), range(args.trial))
    held_out = Setup(num_steps=args.steps, seed=0)
    judge = Trial(pipe, held_out, range(args.held_out))
    rows = []
    for budget in args.budgets:
        began = time.perf_counter()
        found, _ = search(trial, errors, budget, args.tries)
        seconds[f"search {budget}"] = round(time.perf_counter() - began, 1)
        fewer = Setup(num_steps=budget, seed=0)
        drawn = torch.as_tensor(draw(pipe, fewer, range(args.held_out))).double()
        row = {
            "budget": budget,
            "fewer steps": db(float((drawn - judge.reference).square().mean())),
            "TaylorSeer, order 1": db(judge.error(even(budget, args.steps))),
            "computed by TaylorSeer": count(even(budget, args.steps), args.steps),
            "path": db(judge.error(solve(errors, budget))),
            "search": db(judge.error(found)),
            "computed": computed(found, args.steps),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    data = {"provenance": provenance(pipe, "glyphs", args.steps, 1.5, 16), "seconds": seconds, "psnr_db": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
