"""ToCa and DuCa decide the kind of a step anew in every block (the authors' code) or once: which is better?

    python benchmarks/per_block_kind.py
    python benchmarks/per_block_kind.py --pictures 12 --steps 20 --methods toca     (a quick look)

Pictures of the bundled model, the same labels and seeds throughout, against the uncached pictures. The two settings do
not compute the same amount (deciding once a step makes steps full that the authors' rule computes in block 0 only, and
then lets the new interval start from a full step), so they are also compared at equal compute: every method is drawn
at several intervals, PSNR is interpolated linearly over the compute share, and the difference is averaged over the
range of compute that both settings reach. Intervals are 95 %, from resampling the pictures (paired).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dittocache
from dittocache.evaluate.provenance import machine, versions

HERE = Path(__file__).parent
DRAWS = 2000


def draw(pipe: Any, labels: Sequence[int], seeds: Sequence[int], steps: int, batch: int) -> np.ndarray:
    """Pictures [n, h, w, 1] in [0, 1]."""
    parts = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        parts.append(pipe(list(labels[part]), num_inference_steps=steps, generator=generators, output_type="np").images)
    return np.concatenate(parts)


def setting(
    pipe: Any,
    reference: np.ndarray,
    labels: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    batch: int,
    method: str,
    **params: Any,
) -> dict[str, Any]:
    """Compute share and squared error of every picture, for one recipe."""
    with dittocache.enable(pipe, method, **params) as cache:
        drawn = draw(pipe, labels, seeds, steps, batch)
        share = cache.report().compute_fraction
    errors = np.square(drawn.astype(np.float64) - reference).mean((1, 2, 3))
    return {"params": params, "compute_share": share, "psnr_db": psnr(errors), "squared_errors": errors.tolist()}


def psnr(errors: np.ndarray, axis: int = -1) -> Any:
    """dB from the squared errors of pictures, pooled before the logarithm as in `dittocache.evaluate.metrics.psnr`."""
    return -10 * np.log10(np.asarray(errors).mean(axis))


def resample(n: int) -> np.ndarray:
    """Picture numbers [draws, n] of the bootstrap; the same for everything, so that all stays paired."""
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.025, 0.975])]


def difference(true: Sequence[dict[str, Any]], false: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """PSNR of per_block_kind=True minus that of False: per setting, and at equal compute over all settings."""
    n = len(true[0]["squared_errors"])
    picks = resample(n)
    curves, boot = [], []
    for rows in (true, false):
        order = np.argsort([row["compute_share"] for row in rows])
        errors = np.array([rows[i]["squared_errors"] for i in order])
        curves.append((np.array([rows[i]["compute_share"] for i in order]), psnr(errors)))
        boot.append(psnr(errors[:, picks]))  # [settings, draws]
    pairs = []
    for a, b in zip(true, false):
        ea, eb = np.array(a["squared_errors"]), np.array(b["squared_errors"])
        pairs.append(
            {
                "params": {k: v for k, v in a["params"].items() if k != "per_block_kind"},
                "compute_share": [a["compute_share"], b["compute_share"]],
                "psnr_db": [a["psnr_db"], b["psnr_db"]],
                "difference_db": a["psnr_db"] - b["psnr_db"],
                "ci_db": interval(psnr(ea[picks]) - psnr(eb[picks])),
            }
        )
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    found: dict[str, Any] = {"settings": pairs, "compute_range": [low, high]}
    if low < high:
        grid = np.linspace(low, high, 41)
        at = [np.interp(grid, *curve) for curve in curves]
        draws = [np.stack([np.interp(grid, c[0], b[:, d]) for d in range(DRAWS)]) for c, b in zip(curves, boot)]
        found["equal_compute_db"] = float((at[0] - at[1]).mean())
        found["equal_compute_ci_db"] = interval((draws[0] - draws[1]).mean(1))
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=["toca", "duca"], default=["toca", "duca"])
    parser.add_argument("--selectors", nargs="+", default=["attention"])
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 20])
    parser.add_argument("--intervals", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    parser.add_argument("--ratios", nargs="+", type=float, help="base ratios (default: the paper's, and twice that)")
    parser.add_argument("--pictures", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "per_block_kind.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = dittocache.bundled.load("glyphs", device=args.device)
    pipe.set_progress_bar_config(disable=True)
    labels = [j % pipe.null_label for j in range(args.pictures)]
    seeds = [args.seed + j for j in range(args.pictures)]
    data: dict[str, Any] = {
        "format": "dittocache-per-block-kind-1",
        "provenance": {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(pipe.device),
            "threads": torch.get_num_threads(),
            "load_at_start": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
            "versions": versions(),
            "weights_sha256": digest(next((dittocache.bundled.folder("glyphs") / "transformer").glob("*.safetensors"))),
            "pictures": args.pictures,
            "first_seed": args.seed,
        },
        "comparisons": [],
    }
    for steps in args.steps:
        reference = draw(pipe, labels, seeds, steps, args.batch).astype(np.float64)
        for method in args.methods:
            for selector in args.selectors:
                base = {"toca": 0.07, "duca": 0.05}[method]
                ratios, began = args.ratios or [base, 2 * base], time.perf_counter()
                for ratio in ratios:
                    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
                    for n in args.intervals:
                        for kind in (True, False):
                            params = {"interval": n, "ratio": ratio, "selector": selector, "per_block_kind": kind}
                            rows[kind].append(
                                setting(pipe, reference, labels, seeds, steps, args.batch, method, **params)
                            )
                    found = difference(rows[True], rows[False])
                    entry = {"method": method, "steps": steps, "selector": selector, "ratio": ratio, **found}
                    data["comparisons"].append(entry | {"rows": rows[True] + rows[False]})
                    show(entry, time.perf_counter() - began)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")
    return data


def digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def show(entry: dict[str, Any], seconds: float) -> None:
    print(f"{entry['method']}, ratio {entry['ratio']:g}, {entry['selector']}, {entry['steps']} steps ({seconds:.0f} s)")
    print("  interval   compute True / False     PSNR True / False     difference [95 %]")
    for pair in entry["settings"]:
        (a, b), (p, q), (low, high) = pair["compute_share"], pair["psnr_db"], pair["ci_db"]
        print(
            f"  {pair['params']['interval']:8}   {100 * a:6.1f} % / {100 * b:5.1f} %     {p:6.2f} / {q:6.2f} dB     "
            f"{pair['difference_db']:+.2f} dB [{low:+.2f}, {high:+.2f}]"
        )
    if "equal_compute_db" in entry:
        low, high = entry["equal_compute_ci_db"]
        first, last = entry["compute_range"]
        where = f"at equal compute ({100 * first:.0f} to {100 * last:.0f} %)"
        print(f"  {where}, True - False: {entry['equal_compute_db']:+.2f} dB [{low:+.2f}, {high:+.2f}]", flush=True)


if __name__ == "__main__":
    main()
