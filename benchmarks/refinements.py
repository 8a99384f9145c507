"""Is it worth computing some modules or tokens at filled steps, or are whole steps the better buy at equal FLOPs?

    python benchmarks/refinements.py --threads 1
    python benchmarks/refinements.py --budgets 13 --samples 2 --held-out 4        (a quick look)

A plan of forecasts (every module held or forecast, whichever was measured to be better) computes some whole steps of
glyphs. Beside it stand plans that also compute something at their filled steps: attentions, feed-forwards, the first or
the last block, a quarter of the tokens; at all filled steps, or at the third of them that the solver finds the
costliest. Each is held against the curve of plans that spend the same FLOPs on whole steps. Gains are in dB of the mean
squared error of held-out pictures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dittocache
from dittocache import Recipe, bundled
from dittocache.calibrate import Setup
from dittocache.calibrate.trial import Trial
from dittocache.evaluate.metrics import decibels
from dittocache.evaluate.provenance import provenance
from dittocache.plan import COMPUTE, Plan
from dittocache.tune import measure, solve
from dittocache.tune.forecasts import loss, planned
from dittocache.tune.search import computed_steps
from dittocache.when import Table
from dittocache.which import ValueNorm

HERE = Path(__file__).parent
SHARE = 0.25  # of the tokens


def drawn(trial: Trial, recipe: Recipe) -> tuple[float, float, Plan]:
    """Share of the FLOPs, PSNR in dB, and the plan."""
    with dittocache.enable(trial.pipe, recipe) as cache:
        error = float((trial._draw() - trial.reference).square().mean())
        return cache.report().compute_fraction, decibels(error), cache.trace


def refinements(plan: Plan) -> dict[str, np.ndarray]:
    """[sites] what is computed at a filled step: shares of the tokens."""
    kinds, blocks = np.array(plan.kinds), np.array([int(name.split(".")[1]) for name in plan.sites])
    return {
        "attentions": (kinds == "attention") * 1.0,
        "feed-forwards": (kinds == "feed-forward") * 1.0,
        "first block": (blocks == blocks.min()) * 1.0,
        "last block": (blocks == blocks.max()) * 1.0,
        f"{SHARE:.0%} of the tokens": (kinds == "feed-forward") * SHARE,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[17, 13, 10])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=6, help="that errors of forecasts are measured on")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "refinements.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    errors = measure(pipe, Setup(num_steps=args.steps), range(args.samples), batch=2)
    trial = Trial(pipe, Setup(num_steps=args.steps, seed=0), range(args.held_out))
    budgets = range(min(args.budgets) - 1, max(args.budgets) + 16)
    curve = {budget: drawn(trial, solve(errors, budget))[:2] for budget in budgets}
    shares, values = np.array(sorted(curve.values())).T
    rows = []
    for budget in args.budgets:
        recipe = solve(errors, budget)
        share, value, plan = drawn(trial, recipe)
        row: dict[str, Any] = {"computed steps": budget, "share": round(share, 4), "psnr": round(value, 2), "more": {}}
        filled = list(recipe.when.steps)  # type: ignore[attr-defined]
        computed = computed_steps(recipe, args.steps)
        # a step's cost is what computing it as well would save
        saved = {k: loss(errors, computed) - loss(errors, sorted([*computed, k])) for k in filled}
        costliest = sorted(filled, key=lambda k: -saved[k])[: len(filled) // 3]
        for name, shape in refinements(plan).items():
            for where, steps in (("all filled steps", filled), ("the costliest third", costliest)):
                table = plan.table.copy()
                table[steps] = np.maximum(table[steps], shape)
                which = ValueNorm() if 0 < shape.max() < COMPUTE else None
                refined = Recipe(Table(replace(plan, table=table)), fill=planned(errors, computed).fill, which=which)
                share, value, _ = drawn(trial, refined)
                alike = float(np.interp(share, shares, values))
                row["more"][f"{name}, {where}"] = {
                    "share": round(share, 4), "psnr": round(value, 2), "whole steps for the same": round(alike, 2),
                    "gain": round(value - alike, 2),
                }  # fmt: skip
                print(budget, name, where, row["more"][f"{name}, {where}"], flush=True)
        rows.append(row)
    data = {
        "provenance": provenance(pipe, "glyphs", args.steps, 1.5, 16),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "whole steps": {budget: [round(x, 4) for x in pair] for budget, pair in curve.items()},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
