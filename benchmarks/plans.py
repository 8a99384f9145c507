"""How good are solved plans on glyphs, against TaylorSeer and fewer steps, at equal numbers of computed steps?

    python benchmarks/plans.py --threads 1
    python benchmarks/plans.py --budgets 17 --tries 8 --held-out 12        (a quick look)

Two planners: forecasts (every module held, forecast at order 1 or 2, or corrected by EOC, whichever was measured to be
better; also without EOC) and predictors (what the network returns, by least squares). For predictors, also what each
part brings: even steps, factors that are learned on uncached runs (as L2P does), the path, the network's input as a
part of predictions, the local search, refined factors. What is measured, searched and judged on are different samples;
mean squared error of the pictures against the uncached ones, in dB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dittocache
from dittocache import Recipe, bundled
from dittocache.calibrate import Setup, calibrate
from dittocache.calibrate.setup import draw
from dittocache.calibrate.trial import Trial
from dittocache.evaluate.provenance import provenance
from dittocache.fill import Fill, Trend
from dittocache.plan import COMPUTE, Site
from dittocache.tune import Forecasts, Predictors, measure, search, solve
from dittocache.tune.errors import FORECASTS
from dittocache.tune.forecasts import spread
from dittocache.tune.learned import learned
from dittocache.tune.search import computed_steps

HERE = Path(__file__).parent


def db(error: float) -> float:
    return round(float(-10 * np.log10(error)), 2)


def even(budget: int, steps: int) -> Recipe:
    """TaylorSeer, order 1, with the interval whose number of computed steps is nearest to the budget."""
    known = [dittocache.recipe("taylorseer", interval=n, order=1) for n in range(1, steps + 1)]
    return min(known, key=lambda recipe: abs(count_computed(recipe, steps) - budget))


def count_computed(recipe: Recipe, steps: int) -> int:
    """How many steps a recipe computes."""
    column = [Site("blocks.0.attn", "attention", "blocks", 0, 1, 0)]
    return int((recipe.when.table(steps, column) == COMPUTE).sum())


def filled_with(recipe: Recipe) -> dict[str, int]:
    """How many steps every fill was chosen for."""
    chosen: Any = recipe.fill
    return dict(Counter(told(chosen.fills[chosen.chosen[k]]) for k in recipe.when.steps))  # type: ignore[attr-defined]


def told(fill: Fill) -> str:
    if not isinstance(fill, Trend):
        return f"order {fill.depth - 1}"
    return "c + E" if fill.additive else f"c (1 + {fill.theta:g} E)"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[25, 17, 13, 10, 7])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=8, help="that errors of forecasts are measured on")
    parser.add_argument(
        "--fitted", type=int, default=24, help="that predictors are fitted to, and as many for their search"
    )
    parser.add_argument("--trends", type=int, default=32, help="samples that EOC's trends are calibrated on")
    parser.add_argument("--trial", type=int, default=12, help="of the search of forecasts")
    parser.add_argument("--held-out", type=int, default=72)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plans.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        began = time.perf_counter()
        found = work()
        seconds[name] = round(time.perf_counter() - began, 1)
        return found

    setup, trial = Setup(num_steps=args.steps), Setup(num_steps=args.steps, seed=2_000_000)
    judge = Trial(pipe, Setup(num_steps=args.steps, seed=0), range(args.held_out))
    held = timed("forecasts, measuring", lambda: measure(pipe, setup, range(args.samples)))
    every = list(range(1, args.steps))
    others = range(args.samples, args.samples + args.trends)
    trend = timed("EOC, calibrating", lambda: calibrate(pipe, "eoc", others, setup, reuse_steps=every).fill.trend)
    fills = [*FORECASTS, Trend(trend, 0.01), Trend(trend, 1.0), Trend(trend, 1.0, additive=True)]
    errors = timed("EOC, measuring", lambda: measure(pipe, setup, range(args.samples), fills=fills))
    forecasts = Forecasts(errors, Trial(pipe, trial, range(args.trial)))
    count = 2 * args.fitted
    predictors = timed(
        "predictors, recording", lambda: Predictors(pipe, setup, range(args.fitted), range(args.fitted, count))
    )
    rows = []
    for budget in args.budgets:
        drawn = torch.as_tensor(draw(pipe, Setup(num_steps=budget, seed=0), range(args.held_out))).double()
        even_steps = spread(budget, args.steps)
        searched, _ = timed(f"forecasts, search {budget}", lambda b=budget: search(forecasts, b, args.tries))
        found, _ = timed(f"predictors, search {budget}", lambda b=budget: search(predictors, b, args.tries))
        refined, _ = timed(f"predictors, refining {budget}", lambda recipe=found: predictors.refined(recipe))
        path = predictors.candidates(budget)[0]
        predictors.inputs = False
        outputs_alone, _ = predictors.made(path)
        predictors.inputs = True
        row = {
            "budget": budget,
            "fewer steps": db(float((drawn - judge.reference).square().mean())),
            "TaylorSeer, order 1": db(judge.error(even(budget, args.steps))),
            "computed by TaylorSeer": count_computed(even(budget, args.steps), args.steps),
            "forecasts without EOC, path": db(judge.error(solve(held, budget))),
            "forecasts, path": db(judge.error(solve(errors, budget))),
            "forecasts, search": db(judge.error(searched)),
            "learned factors, even steps": db(judge.error(learned(predictors.runs, even_steps))),
            "predictors, even steps": db(judge.error(predictors.made(even_steps)[0])),
            "learned factors, path": db(judge.error(learned(predictors.runs, path))),
            "predictors of outputs alone, path": db(judge.error(outputs_alone)),
            "predictors, path": db(judge.error(predictors.made(path)[0])),
            "predictors, search": db(judge.error(found)),
            "predictors, refined": db(judge.error(refined)),
            "computed": computed_steps(found, args.steps),
            "filled on the path": filled_with(solve(errors, budget)),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    data = {"provenance": provenance(pipe, "glyphs", args.steps, 1.5, 16), "seconds": seconds, "psnr_db": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
