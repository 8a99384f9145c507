"""Which methods keep the pictures of a text-to-image model, and its answers to the text?

    python benchmarks/emoji.py
    python benchmarks/emoji.py --pictures 8 --steps 10 --only uncached "FORA 3" "PAB"     (a quick look)

The bundled model `emoji` has PixArt's blocks: self-attention, cross-attention to the text and a feed-forward. Every row
draws the same texts from the same seeds; rows run in turn (`dittocache.evaluate.compare`). PSNR and SSIM are against
the uncached pictures; retrieval is how often the judge, among all 561 emoji, reads the one that was asked for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dittocache import bundled
from dittocache.bundled.judge import load_judge
from dittocache.calibrate import Setup, calibrate
from dittocache.evaluate import Comparison, Row, compare
from dittocache.evaluate.compare import cached, fewer, uncached
from dittocache.evaluate.console import progress_bar, show_comparison

HERE = Path(__file__).parent
SELECTORS = ("attention", "cross-attention-entropy", "value-norm", "random")


def rows(pipe: Any, steps: int) -> list[Row]:
    """Mild and strong settings of the methods; MagCache's and TeaCache's curves are fitted to uncached runs first."""
    made = [uncached(steps), *(fewer(max(1, round(share * steps))) for share in (0.66, 0.5, 0.34, 0.26))]
    made += [cached("none", steps, "all computed")]
    made += [cached("fora", steps, f"FORA {n}", interval=n) for n in (2, 3, 4)]
    made += [cached("toca", steps, f"ToCa 3 {name}", selector=name) for name in SELECTORS]
    made += [cached("duca", steps, f"DuCa {n}", interval=n) for n in (3, 5)]
    made += [cached("pab", steps, "PAB")]
    made += [
        cached("taylorseer", steps, f"TaylorSeer {n}/{o}", interval=n, order=o) for n, o in ((3, 1), (4, 1), (4, 2))
    ]
    made += [cached("fbcache", steps, f"FBCache {t}", threshold=t) for t in (0.1, 0.2)]
    made += [cached("dicache", steps, f"DiCache {t}", threshold=t) for t in (0.1, 0.2)]
    asked = bundled.questions("emoji", 8)
    setup = Setup(num_steps=steps, guidance_scale=2.0, seed=10**6, conditions=tuple(asked.conditions))
    fitted = {name: calibrate(pipe, name, 8, setup) for name in ("teacache", "magcache")}
    for name, thresholds in (("teacache", (0.1, 0.2)), ("magcache", (0.06, 0.12))):
        title = {"teacache": "TeaCache", "magcache": "MagCache"}[name]
        made += [Row(f"{title} {t}", name, steps, fitted[name].with_params(threshold=t)) for t in thresholds]
    return made


def main(argv: list[str] | None = None) -> Comparison:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by label, the uncached one first")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "emoji.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = bundled.load("emoji", device=args.device)
    pipe.set_progress_bar_config(disable=True)
    ways = rows(pipe, args.steps)
    if args.only:
        unknown = set(args.only) - {row.label for row in ways}
        if unknown:
            parser.error(f"unknown row {min(unknown)!r}; known: {', '.join(row.label for row in ways)}")
        ways = [row for row in ways if row.label in args.only]
    asked = bundled.questions("emoji", args.pictures)
    with progress_bar("drawing") as progress:
        found = compare(
            pipe,
            ways,
            asked.conditions,
            [args.seed + j for j in range(args.pictures)],
            args.batch,
            judge=load_judge("emoji"),
            classes=asked.classes,
            model="emoji",
            progress=progress,
        )
    data = found.to_dict()
    for result in data["results"]:
        del result["plan"], result["recipe"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    show_comparison(found)
    print(f"written: {args.out}")
    return found


if __name__ == "__main__":
    main()
