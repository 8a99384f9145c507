"""Does L2C's trained router beat random routers, and plain alternation, at the same share removed?

Trains routers on the bundled model at three penalties (and seeds), then draws the same pictures with each, with 20
random routers that remove as many entries of the same cache steps, with FORA-like alternation (whole cache steps
reused, evenly spread, up to as many entries), and with the cheapest whole steps (those that do least harm on their own,
measured on samples that are not drawn again). Fidelity is against the uncached pictures of the same seeds; none of them
was used in training. The routers are kept in `results/routers/`, for `claims.py`.

    python benchmarks/l2c_router.py                  # trains what is not there yet; about 45 minutes of one core
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Measured, Row, decibels
from tqdm import tqdm

from dittocache import Recipe, bundled, recipe
from dittocache.calibrate import Setup
from dittocache.calibrate.trial import Trial
from dittocache.evaluate.metrics import frechet_distance
from dittocache.evaluate.provenance import provenance
from dittocache.train import train_l2c

RESULTS = Path(__file__).parent / "results"
STEPS = 20
# name -> penalty; the other settings are the same for all
# name -> penalty, and settings that differ: without weights of steps the loss is the paper's
LEVELS: dict[str, tuple[float, dict[str, Any]]] = {
    "mild": (2e-5, {}),
    "medium": (4e-5, {}),
    "strong": (1e-4, {}),
    "unweighted": (4e-5, {"weighted": 0}),
    "unweighted-strong": (1.2e-4, {"weighted": 0}),
}
SETTINGS: dict[str, Any] = {
    "iterations": 150,
    "batch_size": 20,
    "learning_rate": 0.1,
    "per_sample": True,
    "weighted": 24,
    "samples": 180,
}


def removed(logits: torch.Tensor, threshold: float) -> np.ndarray:
    """Which entries a router removes: bool [cache steps, sites], the noisiest step first."""
    rows = logits[0::2].flip(0)  # even i; with an even T the first step is i = T - 1, and full
    return (rows.sigmoid() <= threshold).numpy()


def router(mask: np.ndarray) -> Recipe:
    """The recipe that removes exactly the entries of a mask."""
    logits = torch.full((2 * len(mask), mask.shape[1]), 5.0)
    logits[0::2] = torch.where(torch.from_numpy(mask.copy()), -5.0, 5.0).flip(0)
    return recipe("l2c", router_logits=logits, threshold=0.5)


def random_masks(mask: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """Masks with as many removed entries, anywhere."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(mask.reshape(-1)).reshape(mask.shape) for _ in range(count)]


def alternation(mask: np.ndarray) -> np.ndarray:
    """Whole steps removed, evenly spread; of one more as many sites as are left over."""
    steps, sites = mask.shape
    whole, rest = divmod(int(mask.sum()), sites)
    out = np.zeros_like(mask)
    places = np.linspace(0, steps - 1, whole + (rest > 0)).round().astype(int) if mask.any() else []
    for n, k in enumerate(places):
        out[k, : sites if n < whole else rest] = True
    return out


def cheapest(mask: np.ndarray, harm: list[float]) -> np.ndarray:
    """Whole steps removed, those first that do least harm on their own; of one more as many sites as are left over."""
    sites = mask.shape[1]
    whole, rest = divmod(int(mask.sum()), sites)
    out = np.zeros_like(mask)
    for n, k in enumerate(np.argsort(harm)[: whole + (rest > 0)]):
        out[k, : sites if n < whole else rest] = True
    return out


def harms(pipe: Any, sites: int, samples: int = 24) -> list[float]:
    """Squared error of the pictures if one cache step is reused whole, for every cache step."""
    setup = Setup(num_steps=STEPS)
    trial = Trial(pipe, setup, range(samples))
    out = []
    for k in range(STEPS // 2):
        mask = np.zeros((STEPS // 2, sites), dtype=bool)
        mask[k] = True
        out.append(trial.error(router(mask)))
    return out


def numbers(found: dict[str, Any], measured: Measured) -> dict[str, float]:
    return {
        "frechet": round(frechet_distance(found["features"], measured.features), 4),
        "psnr": round(decibels(found["error"]), 2),
        "compute": round(found["compute"], 4),
        "accuracy": round(found["accuracy"], 4),
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean, spread and range of several routers' numbers."""
    out: dict[str, Any] = {"routers": len(rows)}
    for name in ("frechet", "psnr"):
        values = [row[name] for row in rows]
        out[name] = {
            "mean": round(statistics.fmean(values), 4),
            "sd": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
            "least": min(values),
            "largest": max(values),
        }
    return out


def trained(pipe: Any, name: str, seed: int, work: Path) -> Recipe:
    """A router from `results/routers`, trained first if it is not there."""
    kept, (penalty, changes) = RESULTS / "routers" / f"{name}-seed{seed}", LEVELS[name]
    if not (kept / "recipe.json").exists():
        folder = work / kept.name
        folder.mkdir(parents=True, exist_ok=True)
        for other in work.glob(
            f"*-seed{seed}/[sw]*s.safetensors"
        ):  # samples and weights are the same for all penalties
            if other.parent != folder:
                shutil.copy(other, folder / other.name)
        train_l2c(pipe, folder, num_steps=STEPS, penalty=penalty, seed=seed, **(SETTINGS | changes))
        kept.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("recipe.*"):
            shutil.copy(file, kept / file.name)
    return Recipe.from_pretrained(kept)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, default=108)
    parser.add_argument("--levels", nargs="*", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--random", type=int, default=20, help="random routers at every share")
    parser.add_argument("--seeds", type=int, default=2, help="trained routers at every share")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=70_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("l2c-training"), help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS / "l2c_router.json")
    options = parser.parse_args(argv)
    if options.pictures < 4 or options.random < 2 or options.seeds < 1:
        parser.error("--pictures must be 4 or more, --random 2 or more, --seeds 1 or more")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="dittocache:")
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    measured = Measured(pipe, Setup(num_steps=STEPS, seed=options.seed), options.pictures, options.batch)
    levels = []
    total = len(options.levels) * (options.seeds + options.random + 2)
    with tqdm(total=total, disable=None) as bar:

        def row(label: str, made: Recipe) -> dict[str, float]:
            bar.set_description(label)
            found = numbers(measured.row(Row(label, "l2c", made)), measured)
            bar.update()
            return found

        harm = harms(pipe, 16)
        for name in options.levels:
            ours, masks = [], []
            for seed in range(options.seeds):
                made = trained(pipe, name, seed, options.work)
                masks.append(removed(made.when.logits["logits"], made.when.threshold))
                ours.append(
                    row(f"{name} seed {seed}", made)
                    | {"removed": round(float(masks[-1].mean()), 4), "seconds": made.provenance["seconds"]}
                )
            others = [
                row(f"{name} random {n}", router(m)) for n, m in enumerate(random_masks(masks[0], options.random))
            ]
            levels.append(
                {
                    "name": name,
                    "penalty": LEVELS[name][0],
                    "settings": SETTINGS | LEVELS[name][1],
                    "trained": ours,
                    "random": summary(others),
                    "alternation": row(f"{name} alternation", router(alternation(masks[0]))),
                    "cheapest": row(f"{name} cheapest", router(cheapest(masks[0], harm))),
                    "removed_by_step": [int(n) for n in masks[0].sum(1)],
                    "sites": masks[0].shape[1],
                }
            )
    if options.out.exists():  # levels that were not measured again stay
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if (before["pictures"], before["seed"]) == (options.pictures, options.seed):
            levels = [level for level in before["levels"] if level["name"] not in options.levels] + levels
    data = {
        "provenance": provenance(pipe, "glyphs", STEPS, measured.setup.guidance_scale, options.batch),
        "pictures": options.pictures,
        "seed": options.seed,
        "levels": levels,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(markdown(levels))
    return data


def markdown(levels: list[dict[str, Any]]) -> str:
    lines = [
        "| removed of cache steps | | Fréchet | PSNR dB |",
        "| --- | --- | --- | --- |",
    ]
    for level in levels:
        random, other = level["random"], level["alternation"]
        for n, one in enumerate(level["trained"]):
            how = "trained" if level["settings"]["weighted"] else "trained with the paper's loss"
            lines.append(f"| {one['removed']:.1%} | {how}, seed {n} | {one['frechet']:.3f} | {one['psnr']:.1f} |")
        f, p = random["frechet"], random["psnr"]
        spread = f"{f['mean']:.3f} ± {f['sd']:.3f} (best {f['least']:.3f}) | {p['mean']:.1f} ± {p['sd']:.1f}"
        lines.append(f"| {level['trained'][0]['removed']:.1%} | {random['routers']} random routers | {spread} |")
        for label, one in (("alternation", other), ("cheapest whole steps", level["cheapest"])):
            lines.append(f"| | {label} | {one['frechet']:.3f} | {one['psnr']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
