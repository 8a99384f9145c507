"""Does a method do on the bundled model what its paper claims: better pictures than its base at the same compute?

L2C, EOC, GOC, ICC and EB-Cache at several compute levels, each beside its base (the same schedule without the method's
own idea, or plain reuse spread evenly at the same compute) and beside the competitor that costs nothing: the same
sampler with fewer steps, at the same compute or the next more. All rows draw the same pictures (same labels and seeds;
none of these seeds was used for calibration or training), fidelity is against the uncached pictures, intervals are 95 %
bootstrap intervals over pictures, paired where rows are compared.

    python benchmarks/claims.py                      # 20 steps, half an hour of one core
    python benchmarks/claims.py --only l2c           # one method again; the others' rows are kept
    python benchmarks/claims.py --draw benchmarks/results/claims-20.json     # plot and table again
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dittocache
from dittocache import Recipe, bundled, noise, recipe
from dittocache.bundled.judge import load_judge
from dittocache.calibrate import Setup, calibrate, fit, make, record
from dittocache.calibrate.setup import draw
from dittocache.evaluate.metrics import accuracy, frechet_distance
from dittocache.evaluate.provenance import provenance
from dittocache.fill import Trend
from dittocache.hooks import captured
from dittocache.when import ReuseSteps

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 400
ROUTERS = [RESULTS / "routers" / f"{name}-seed0" for name in ("mild", "medium", "strong")]
METHODS = ("l2c", "eoc", "goc", "icc", "eb-cache")


@dataclass
class Row:
    """One way to draw: a recipe, or fewer steps; `base` names the row that the claim is measured against."""

    label: str
    method: str
    recipe: Recipe | None = None
    steps: int | None = None
    base: str | None = None
    paper: bool = True  # with the paper's own parameters


# ---- what is compared -----------------------------------------------------------------------------------------------
def even(computed: int, steps: int) -> Recipe:
    """Plain reuse with that many full steps, spread evenly, the first one included."""
    full = {round(j * steps / computed) for j in range(computed)}
    return Recipe(when=ReuseSteps(tuple(k for k in range(steps) if k not in full)))


def schedules(steps: int) -> dict[str, tuple[int, ...]]:
    """Reused steps of the three base schedules of EOC and GOC: a quarter, a half and two thirds of the steps."""
    return {
        "25 %": tuple(range(1, steps // 2, 2)),
        "50 %": tuple(range(1, steps, 2)),
        "67 %": tuple(k for k in range(1, steps) if k % 3),
    }


def eoc_rows(pipe: Any, setup: Setup, samples: int) -> list[Row]:
    rows = []
    for name, reused in schedules(setup.num_steps).items():
        base = f"reuse {name}"
        rows.append(Row(base, "reuse", recipe("goc", eta=0.0, reuse_steps=reused)))
        made = calibrate(pipe, "eoc", samples, setup, reuse_steps=reused)
        rows.append(Row(f"EOC {name}", "eoc", made, base=base))
        for theta in (1.0, -0.3):
            other = dataclasses.replace(made, fill=dataclasses.replace(made.fill, theta=theta))
            rows.append(Row(f"EOC {name}, theta {theta:g}", "eoc", other, base=base, paper=False))
    half = schedules(setup.num_steps)["50 %"]
    judged = calibrate(pipe, "eoc", samples, setup, reuse_steps=half, judge="trial", theta=1.0)
    rows.append(Row("EOC 50 %, theta 1, judged", "eoc", judged, base="reuse 50 %", paper=False))
    return rows


def goc_rows(pipe: Any, setup: Setup, samples: int) -> list[Row]:
    rows, steps = [], setup.num_steps
    for name, reused in schedules(steps).items():
        base = f"reuse {name}"
        rows.append(Row(base, "reuse", recipe("goc", eta=0.0, reuse_steps=reused)))
        # the shipped list leaves out the step at 85 % of the run where half of the steps are reused
        left_out = {round(0.85 * steps) // 2 * 2 + 1 if steps != 20 else 17} if name == "50 %" else set()
        shipped = tuple(k for k in reused if k > 1 and k not in left_out)
        rows.append(Row(f"GOC {name}", "goc", recipe("goc", reuse_steps=reused, correct_steps=shipped), base=base))
        for eta in (0.5, 0.8):
            made = recipe("goc", reuse_steps=reused, eta=eta)
            rows.append(Row(f"GOC {name}, eta {eta}", "goc", made, base=base, paper=False))
    long = recipe("goc", reuse_steps=schedules(steps)["67 %"], eta=0.5, computed_only=True)
    rows.append(Row("GOC 67 %, eta 0.5, computed only", "goc", long, base="reuse 67 %", paper=False))
    for judge in ("cosine", "trial"):
        found = calibrate(pipe, "goc", samples, setup, reuse_steps=schedules(steps)["50 %"], judge=judge)
        rows.append(Row(f"GOC 50 %, judged by {judge}", "goc", found, base="reuse 50 %", paper=False))
    return rows


def icc_rows(pipe: Any, setup: Setup, samples: int) -> list[Row]:
    rows = []
    both = {"activation-svd": "", "change-svd": ", change"}
    for period, rank in ((2, 32), (3, 32), (2, 16), (3, 16), (4, 16), (6, 16)):
        for factors in both if (period, rank) in ((2, 32), (3, 16)) else ["activation-svd"]:
            made = calibrate(pipe, "icc", samples, setup, period=period, rank=rank, factors=factors)
            rows.append(Row(f"ICC p {period}, rank {rank}{both[factors]}", "icc", made, base="even"))
    return rows


def eb_rows(pipe: Any, setup: Setup, samples: int) -> list[Row]:
    rows = []
    for interval in (1, 2, 3):
        plain = f"EB table b {interval}"
        rows.append(Row(plain, "eb-cache", recipe("eb-cache", interval=interval), base="even"))
        for label, params in (("b(t)", {"noise_bias": True}), ("/ 0.965", {"noise_scale": 0.965})):
            made = recipe("eb-cache", interval=interval, **params)
            rows.append(Row(f"EB b {interval}, {label}", "eb-cache", made, base=plain))
        as_shipped = recipe("eb-cache", interval=interval, table_order="index")
        rows.append(Row(f"EB b {interval}, reversed", "eb-cache", as_shipped, base="even"))
    for high in (0.001, 0.003, 0.01):
        limits = {"delta_high": high, "delta_low": high / 10}
        made = calibrate(pipe, "eb-cache", min(samples, 16), setup, **limits)
        rows.append(Row(f"EB search {high:g}", "eb-cache", made, base="even", paper=False))
    return rows


@dataclass(frozen=True)
class Added(Trend):
    """c + E: the calibrated change added, instead of EOC's product."""

    def fill(self, entry: Any, at: Any) -> Any:
        name = f"{at.site.name}@{at.step}"
        return (entry.values[0][0] + self.trend.like(name, entry.values[0][0]),)


def prediction_errors(pipe: Any, calls: list[Any], made: Recipe) -> float:
    """Relative error of predictions at reused steps, on the inputs of an uncached run; mean over these steps."""
    errors = []
    made = dataclasses.replace(made, made_for={})
    with torch.no_grad(), dittocache.enable(pipe.transformer, made) as cache, cache.run(len(calls)):
        for k, call in enumerate(calls):
            cache.step(k)
            found = pipe.transformer(*call.args, **call.kwargs)
            found = found[0] if isinstance(found, tuple) else found.sample
            if k % 2:
                errors.append(float((found - call.output).norm() / call.output.norm()))
    return round(float(np.mean(errors)), 4)


def facts(pipe: Any, setup: Setup, samples: int) -> dict[str, Any]:
    """Why some claims fail here: how much of a feature's change is common to all samples, and what a norm sees."""
    reused = schedules(setup.num_steps)["50 %"]
    trend = record(pipe, make("eoc", {"reuse_steps": reused}), samples, setup)
    change = record(pipe, make("goc", {}), samples, setup)
    common = every = 0.0
    for name, total in trend.sums.items():
        if "#" not in name:
            site, _, step = name.rpartition("@")
            common += float((total.double() / samples).square().sum())
            every += float(change.sum(site)[1, int(step)]) / samples
    with captured(pipe.transformer) as calls:
        draw(pipe, setup, range(8))
    alphas, sigmas = noise.levels(pipe.scheduler)
    kind = noise.prediction_type(pipe.scheduler)
    norms, differences = [], []
    count = setup.num_steps
    reuse = Recipe(when=ReuseSteps(tuple(range(1, 2 * count - 2, 2))))
    with torch.no_grad(), dittocache.enable(pipe.transformer, reuse) as cache, cache.run(2 * count - 2):
        for k in range(1, count):
            for n, call in enumerate((calls[k - 1], calls[k])):
                cache.step(2 * (k - 1) + n)
                output = pipe.transformer(*call.args, **call.kwargs)
            x = calls[k].sample
            held, true = (
                noise.to_noise(o, x, alphas[k], sigmas[k], kind).flatten(1).double()
                for o in (output[0] if isinstance(output, tuple) else output.sample, calls[k].output)
            )
            norms.append(float((held.norm(dim=1) / true.norm(dim=1) - 1).abs().mean()))
            differences.append(float(((held - true).norm(dim=1) / true.norm(dim=1)).mean()))
    eoc = fit(pipe, make("eoc", {"reuse_steps": reused, "precision": "float32"}), trend, setup)
    fills = {
        "held": recipe("goc", reuse_steps=reused, eta=0.0).fill,
        "c (1 + 0.01 E)": dataclasses.replace(eoc.fill, write_back=False),
        "c (1 + E)": dataclasses.replace(eoc.fill, theta=1.0, write_back=False),
        "c + E": Added(eoc.fill.trend, write_back=False),
        "GOC, eta 0.8": recipe("goc", reuse_steps=reused).fill,
    }
    return {
        "relative error of predictions at reused steps": {
            name: prediction_errors(pipe, calls, dataclasses.replace(eoc, fill=fill)) for name, fill in fills.items()
        },
        "share of the change of features that is the mean trend": round(common / every, 4),
        "relative change of the noise's norm if a step is reused whole": [round(v, 5) for v in norms],
        "relative change of the noise itself": [round(v, 5) for v in differences],
    }


def l2c_rows(pipe: Any, setup: Setup, folders: list[Path]) -> list[Row]:
    """Trained routers, as `benchmarks/l2c_router.py` leaves them; their base is plain reuse at the same compute."""
    rows = []
    for folder in folders:
        n = folder.name.partition("-")[0]  # mild, medium, strong
        made = Recipe.from_pretrained(folder)
        if made.made_for and len(made.made_for["timesteps"]) != setup.num_steps:
            continue
        rows.append(Row(f"L2C {n}", "l2c", made, base="even", paper=False))  # trained with weights of steps
        logits = made.when.logits["logits"]
        on = {"router_logits": logits, "threshold": made.when.threshold}
        goc = recipe("goc", base="l2c", **on)
        rows.append(Row(f"L2C {n} + GOC", "goc", goc, base=f"L2C {n}"))
        eoc = calibrate(pipe, "eoc", 36, setup, **on)
        rows.append(Row(f"L2C {n} + EOC", "eoc", eoc, base=f"L2C {n}"))
    return rows


# ---- measuring ------------------------------------------------------------------------------------------------------
class Measured:
    """The pictures of every row, each drawn once."""

    def __init__(self, pipe: Any, setup: Setup, pictures: int, batch: int) -> None:
        self.pipe, self.setup, self.batch, self.numbers = pipe, setup, batch, range(pictures)
        self.judge = load_judge()
        self.labels = torch.tensor([setup.condition(pipe, j) for j in self.numbers])
        self.reference = self._draw(setup)
        self.features = self._features(self.reference)
        self.rows: dict[str, dict[str, Any]] = {}

    def _draw(self, setup: Setup) -> torch.Tensor:
        starts = range(0, len(self.numbers), self.batch)
        return torch.cat([draw(self.pipe, setup, self.numbers[n : n + self.batch]) for n in starts]).cpu().float()

    @torch.no_grad()
    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.judge.features(pictures).double()

    def row(self, row: Row) -> dict[str, Any]:
        """Draws a row and measures it; a label that was drawn already is not drawn again."""
        if row.label in self.rows:
            return self.rows[row.label]
        share = 1.0
        if row.recipe is None:
            setup = dataclasses.replace(self.setup, num_steps=row.steps or self.setup.num_steps)
            pictures, share = self._draw(setup), setup.num_steps / self.setup.num_steps
        else:
            with dittocache.enable(self.pipe, row.recipe) as cache:
                pictures = self._draw(self.setup)
                report = cache.report()
            share = report.compute_fraction
        features = self._features(pictures)
        with torch.no_grad():
            read = accuracy(self.judge(pictures), self.labels)
        self.rows[row.label] = {
            "label": row.label,
            "method": row.method,
            "paper": row.paper,
            "recipe": None if row.recipe is None else row.recipe.describe(),
            "compute": share,
            "error": (pictures - self.reference).square().flatten(1).mean(1).double(),
            "features": features,
            "accuracy": read,
        }
        return self.rows[row.label]


def decibels(errors: torch.Tensor) -> float:
    return -10 * math.log10(max(float(errors.mean()), 1e-12))


def interval(values: list[float]) -> list[float]:
    return [round(float(v), 2) for v in np.quantile(values, (0.025, 0.975))]


def finished(found: dict[str, Any], others: dict[str, dict[str, Any]], measured: Measured) -> dict[str, Any]:
    """A row's numbers with intervals, and its paired differences to other rows."""
    generator = torch.Generator().manual_seed(0)
    count = len(found["error"])
    draws = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES)]
    out = {k: found[k] for k in ("label", "method", "paper", "recipe")}
    out |= {"compute": round(found["compute"], 4), "psnr": round(decibels(found["error"]), 2)}
    out["psnr_interval"] = interval([decibels(found["error"][d]) for d in draws])
    out["frechet"] = round(frechet_distance(found["features"], measured.features), 4)
    boot = [frechet_distance(found["features"][d], measured.features[d]) for d in draws[::8]]
    out["frechet_interval"] = [round(float(v), 4) for v in np.quantile(boot, (0.025, 0.975))]
    out["accuracy"] = round(found["accuracy"], 4)
    for name, other in others.items():
        gains = [decibels(found["error"][d]) - decibels(other["error"][d]) for d in draws]
        out[name] = {
            "label": other["label"],
            "compute": round(other["compute"], 4),
            "gain_db": round(decibels(found["error"]) - decibels(other["error"]), 2),
            "interval": interval(gains),
            "frechet": round(frechet_distance(other["features"], measured.features), 4),
        }
    return out


def measure(rows: list[Row], measured: Measured, progress: Callable[[str], Any]) -> list[dict[str, Any]]:
    steps = measured.setup.num_steps
    finals = []
    for row in rows:
        progress(row.label)
        found = measured.row(row)
        others = {}
        if row.base == "even":  # at the same compute or more, so that the base is never wronged
            others["base"] = next(
                other
                for n in range(max(1, math.floor(found["compute"] * steps) - 1), steps + 1)
                if (other := measured.row(Row(f"even reuse, {n} of {steps}", "reuse", even(n, steps))))["compute"]
                >= found["compute"] - 1e-3
            )
        elif row.base:
            others["base"] = measured.rows[row.base]  # drawn before
        fewer = min(steps - 1, math.ceil(round(found["compute"] * steps, 6)))
        others["fewer_steps"] = measured.row(Row(f"{fewer} steps", "fewer steps", steps=fewer))
        finals.append(finished(found, others, measured))
    have = {row["label"] for row in finals}
    rest = [finished(found, {}, measured) for label, found in measured.rows.items() if label not in have]
    return finals + rest


def kept(out: Path, options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of an earlier run of the same pictures, for methods that were not measured again."""
    before = json.loads(out.read_text(encoding="utf-8"))
    if (before["pictures"], before["seed"]) != (options.pictures, options.seed):
        return rows
    new = {row["label"] for row in rows}
    return [row for row in before["rows"] if row["label"] not in new and row["method"] not in options.only] + rows


# ---- showing --------------------------------------------------------------------------------------------------------
def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the rows that have a base."""
    lines = [
        "| row | compute | PSNR dB | over its base, dB | over fewer steps, dB | Fréchet (base) | read right |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "base" not in row:
            continue
        base, fewer = row["base"], row["fewer_steps"]

        def gain(other: dict[str, Any]) -> str:
            low, high = other["interval"]
            text = f"{other['gain_db']:+.1f} [{low:+.1f}, {high:+.1f}]"
            return f"**{text}**" if low > 0 else text

        lines.append(
            f"| {row['label']} | {row['compute']:.0%} | {row['psnr']:.1f} | {gain(base)} ({base['label']}) | "
            f"{gain(fewer)} ({fewer['label']}) | {row['frechet']:.2f} ({base['frechet']:.2f}) | {row['accuracy']:.1%} |"
        )
    return "\n".join(lines)


def plot(data: dict[str, Any], path: Path) -> None:
    """PSNR over compute, one panel a method, with the curve of fewer steps and that of even reuse."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = data["rows"]
    methods = [m for m in METHODS if any(r["method"] == m and "base" in r for r in rows)]
    across = min(3, len(methods))
    down = -(-len(methods) // across)
    figure, grid = plt.subplots(down, across, figsize=(3.4 * across, 3.5 * down), sharey=True, squeeze=False)
    axes = grid.flatten()
    for unused in axes[len(methods) :]:
        unused.set_visible(False)
    curves = {"fewer steps": ("fewer steps", "#8a8f98", "-"), "reuse": ("plain reuse", "#4c78a8", "--")}
    for axis, method in zip(axes, methods):
        for kind, (label, colour, style) in curves.items():
            points = sorted((r["compute"], r["psnr"]) for r in rows if r["method"] == kind and r["compute"] < 0.999)
            best = [max(p for c, p in group) for _, group in itertools.groupby(points, key=lambda x: round(x[0], 2))]
            xs = [x for x, _ in itertools.groupby(points, key=lambda x: round(x[0], 2))]
            axis.plot(xs, best, style, color=colour, label=label, linewidth=1.4)
        here = [r for r in rows if r["method"] == method and "base" in r]
        stacked = [r for r in here if "L2C" in r["label"] and method != "l2c"]
        kinds = (
            ("paper's parameters", "#d1495b", "o", [r for r in here if r["paper"] and r not in stacked]),
            ("other parameters", "#edae49", "D", [r for r in here if not r["paper"] and r not in stacked]),
            ("on top of L2C", "#30888a", "^", stacked),
        )
        for label, colour, marker, chosen in kinds:
            style = {"color": colour, "label": label, "markersize": 6, "markeredgecolor": "white", "linestyle": ""}
            if chosen:
                axis.plot([r["compute"] for r in chosen], [r["psnr"] for r in chosen], marker, **style)
        axis.set_title({"eb-cache": "EB-Cache"}.get(method, method.upper()), fontsize=11)
        axis.set_xlabel("compute (share of FLOPs)")
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axis.grid(color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    for first in grid[:, 0]:
        first.set_ylabel("PSNR against uncached, dB")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=144)
    parser.add_argument("--samples", type=int, default=36, help="calibration samples")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--routers", nargs="*", type=Path, default=ROUTERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="only draw the plot and print the table of a result")
    options = parser.parse_args(argv)
    if options.draw:
        data = json.loads(options.draw.read_text(encoding="utf-8"))
        plot(data, options.draw.with_suffix(".png"))
        print(markdown(data["rows"]))
        return data
    if options.steps < 6 or options.pictures < 4:
        parser.error("--steps must be 6 or more, --pictures 4 or more")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="dittocache:")
    out = options.out or RESULTS / f"claims-{options.steps}.json"
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    setup = Setup(num_steps=options.steps)  # calibration's seeds
    measured = Measured(pipe, dataclasses.replace(setup, seed=options.seed), options.pictures, options.batch)
    rows: list[Row] = []
    for n in sorted({max(2, round(share * options.steps)) for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}):
        plain = Row(f"even reuse, {n} of {options.steps}", "reuse", even(n, options.steps))
        rows += [Row(f"{n} steps", "fewer steps", steps=n), plain]
    made = {
        "l2c": lambda: l2c_rows(pipe, setup, options.routers),
        "eoc": lambda: eoc_rows(pipe, setup, options.samples),
        "goc": lambda: goc_rows(pipe, setup, options.samples),
        "icc": lambda: icc_rows(pipe, setup, options.samples),
        "eb-cache": lambda: eb_rows(pipe, setup, options.samples),
    }
    for method in options.only:
        print(f"calibrating {method}", file=sys.stderr)
        rows += made[method]()
    with tqdm(total=len(rows), disable=None) as bar:
        finals = measure(rows, measured, lambda label: (bar.update(), bar.set_description(label)))
    if out.exists():
        finals = kept(out, options, finals)
    data = {
        "provenance": provenance(pipe, "glyphs", options.steps, setup.guidance_scale, options.batch),
        "pictures": options.pictures,
        "seed": options.seed,
        "calibration": {"samples": options.samples, **setup.to_dict()},
        "facts": facts(pipe, setup, options.samples),
        "rows": finals,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    plot(data, out.with_suffix(".png"))
    print(markdown(finals))
    return data


if __name__ == "__main__":
    main()
