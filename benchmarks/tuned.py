"""The tuned recipes against every published method at equal measured speed-up.

    python benchmarks/tuned.py --threads 1
    python benchmarks/tuned.py --samples 8 --only tuned fora taylorseer          (a quick look)

The recipes are those of `benchmarks/tuned/2x`, `3x`, `4x`, which `dittocache tune --min-speedup` made. Every method
runs over a range of its parameters; those that need calibration are calibrated first, on other seeds. All rows draw the
same pictures, in turn, so that ratios of times are paired. At a speed, the best published row is the one with the least
squared error of all that are at least 0.97 times as fast as the tuned one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dittocache
from dittocache import Recipe, bundled
from dittocache.bundled import questions
from dittocache.bundled.judge import load_judge
from dittocache.calibrate import Setup
from dittocache.calibrate.base import make
from dittocache.calibrate.run import fit, record
from dittocache.calibrate.trial import Trial
from dittocache.evaluate.compare import compare
from dittocache.evaluate.rows import Row, fewer, uncached
from dittocache.tune.genetic import evolve
from dittocache.tune.learned import learned
from dittocache.tune.trajectory import record as trajectories

HERE = Path(__file__).parent
STEPS, SPEEDS = 50, ("2x", "3x", "4x")
SLACK = 0.97
# parameters of methods that need nothing
FREE: dict[str, list[dict[str, Any]]] = {
    "fora": [{"interval": n} for n in (3, 4)],
    "taylorseer": [{"interval": n, "order": o} for n in (3, 4, 5, 6) for o in (1, 2)],
    "goc": [{"interval": n, "eta": 0.5, "computed_only": True} for n in (3, 4, 5)],
    "toca": [{"interval": 6}],
    "duca": [{"interval": 4}],
    "fbcache": [{"threshold": x} for x in (0.15, 0.3)],
    "dicache": [{"threshold": x} for x in (0.2, 0.5)],
    "pab": [{"interval": 4}],
}
# calibrated on so many samples; one recipe for every setting of the fit
CALIBRATED: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "eoc": (16, [{"interval": 3}]),
    "icc": (16, [{"period": 2, "rank": 64}]),
    "magcache": (8, [{"threshold": x, "max_skip": m} for x, m in ((0.1, 3), (0.3, 5))]),
    "teacache": (8, [{"threshold": x} for x in (0.1, 0.2)]),
    "dpcache": (8, [{"budget": n, "order": o} for n in (23, 16, 12) for o in (1, 2)]),
    "lemica": (1, [{"budget": n} for n in (23, 16, 12)]),
}
PLANNED = (23, 16, 12)  # computed steps of the L2P-style rows


def published(pipe: Any, only: list[str] | None) -> Iterator[Row]:
    """Rows of all methods."""
    for name, settings in FREE.items():
        for params in settings if only is None or name in only else ():
            made = dittocache.recipe(name, **params)
            yield Row(made.describe(), name, STEPS, made)
    setup = Setup(num_steps=STEPS)
    for name, (samples, settings) in CALIBRATED.items():
        recorded: dict[str, Any] = {}
        for params in settings if only is None or name in only else ():
            calibrator = make(name, params)
            key = json.dumps(calibrator.settings(), default=str)
            if key not in recorded:
                recorded[key] = record(pipe, calibrator, samples, setup)
                print(f"recorded {name} {key}", flush=True)
            text = ", ".join(f"{k}={v}" for k, v in params.items())
            yield Row(f"{name}({text})", name, STEPS, fit(pipe, calibrator, recorded[key], setup))
    if only is None or "L2P-style" in only:
        runs = trajectories(pipe, setup, range(24))
        for budget in PLANNED:
            even = tuple(n * STEPS // budget for n in range(budget))
            yield Row(f"L2P-style({budget} of {STEPS})", "L2P-style", STEPS, learned(runs, even))
    if only is None or "ECAD-style" in only:
        front = evolve(Trial(pipe, setup, range(8)), genes="kind", population=12, generations=1000, seconds=90)
        for speed in (2, 3):
            found = min(front, key=lambda c: abs(1 / c.compute - 1.15 * speed))
            yield Row(f"ECAD-style({found.compute:.2f} of the FLOPs)", "ECAD-style", STEPS, found.recipe)


def tuned() -> list[Row]:
    return [Row(f"tuned {speed}", "tuned", STEPS, Recipe.from_pretrained(HERE / "tuned" / speed)) for speed in SPEEDS]


def verdict(results: list[dict[str, Any]], speed: str) -> dict[str, Any]:
    """The tuned row of a speed, and the best published rows that are as fast: by squared error, and by distance."""
    ours = next(r for r in results if r["label"] == f"tuned {speed}")
    methods = [r for r in results if r["method"] not in ("tuned", "uncached", "fewer steps")]
    fast = [r for r in methods if r["speedup"] >= SLACK * ours["speedup"] and r["psnr"] != "inf"]
    told: dict[str, Any] = {"tuned": short(ours), "asked": float(speed[:-1])}
    if fast:
        best, near = max(fast, key=lambda r: r["psnr"]), min(fast, key=lambda r: r["frechet"])
        told |= {
            "best published, squared error": short(best),
            "squared error, tuned / published": round(10 ** ((best["psnr"] - ours["psnr"]) / 10), 4),
            "best published, Frechet distance": short(near),
            "Frechet distance, tuned / published": round(ours["frechet"] / near["frechet"], 4),
        }
    return told


def short(row: dict[str, Any]) -> dict[str, Any]:
    names = ("label", "speedup", "speedup_low", "speedup_high", "compute_fraction", "psnr", "ssim", "frechet")
    return {name: round(row[name], 5) if isinstance(row[name], float) else row[name] for name in names}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="methods")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tuned.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    rows = [uncached(STEPS), *(fewer(n) for n in (25, 17, 13)), *tuned(), *published(pipe, args.only)]
    asked = questions("glyphs", args.samples)
    found = compare(
        pipe,
        rows,
        asked.conditions,
        [args.seed + j for j in range(args.samples)],
        args.batch,
        judge=load_judge("glyphs"),
        model="glyphs",
        progress=lambda done, total, what: print(f"{done}/{total} {what}", end="\r", flush=True),
    )
    results = [result.to_dict() for result in found.results]
    data = {
        "provenance": found.provenance,
        "verdicts": {speed: verdict(results, speed) for speed in SPEEDS},
        "rows": [short(row) for row in results],
    }
    args.out.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    print(json.dumps(data["verdicts"], indent=1))
    return data


if __name__ == "__main__":
    main()
