"""How much faster whole sampling runs become, and how much of the saved compute becomes saved time.

    python benchmarks/speed.py
    python benchmarks/speed.py --models dit-b2 --steps 20 --rounds 5 --threads 2

Everything runs in one process on one set of weights, and in turn: every round runs every variant once, in an order that
rotates from round to round, so that whatever else the machine does meets all variants alike. What is reported is the
median over the rounds of the paired ratio uncached / variant. One round before them is not timed; in it FLOPs and
computed blocks are counted, independently of what dittocache says of itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dittocache
from dittocache.evaluate import metrics
from dittocache.evaluate.provenance import machine, versions

HERE = Path(__file__).parent
GUIDANCE = 1.5


# ---- models ---------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """A model with everything one sampling run needs; all variants share its weights, labels and start noise."""

    name: str
    model: nn.Module
    scheduler: Any
    steps: int
    labels: Tensor
    noise: Tensor

    @property
    def depth(self) -> int:
        return len(self.model.transformer_blocks)

    def new_scheduler(self) -> Any:
        return type(self.scheduler).from_config(self.scheduler.config)

    def sample(self, model: nn.Module, scheduler: Any) -> Tensor:
        """A whole run with batched guidance, conditional half first: the loop of diffusers' DiTPipeline."""
        scheduler.set_timesteps(self.steps, device=self.noise.device)
        latents = self.noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latents = scheduler.step(self.predict(model, latents, t, scheduler), t, latents).prev_sample
        return latents

    def predict(self, model: nn.Module, latents: Tensor, t: Tensor, scheduler: Any) -> Tensor:
        x = scheduler.scale_model_input(torch.cat([latents, latents]), t)
        out = model(x, timestep=t.expand(len(x)), class_labels=self.labels, return_dict=False)[0]
        conditional, unconditional = out.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)


def random_dit(width: int, depth: int, heads: int, size: int = 32, classes: int = 1000) -> nn.Module:
    """A DiT/2 of that shape on 4-channel latents. All weights are random, those that training starts at zero included:
    with closed gates nothing that is cached would matter."""
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=4, sample_size=size,
        patch_size=2, num_layers=depth, num_embeds_ada_norm=classes, norm_eps=1e-6,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data = scale * torch.randn(p.shape, generator=generator)
    return model.eval()


def glyphs() -> tuple[nn.Module, Any]:
    pipe = dittocache.bundled.load("glyphs")
    return pipe.transformer, pipe.scheduler


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "glyphs": glyphs,
    "dit-s2": lambda: (random_dit(384, 12, 6), DDIMScheduler()),
    "dit-b2": lambda: (random_dit(768, 12, 12), DDIMScheduler()),
    "tiny": lambda: (random_dit(32, 3, 2, size=8, classes=10), DDIMScheduler()),  # to test this script
}


def load(name: str, steps: int, batch: int, device: torch.device, dtype: torch.dtype) -> Case:
    model, scheduler = MODELS[name]()
    nn.Module.to(model, device=device, dtype=dtype)
    config, generator = model.config, torch.Generator().manual_seed(1)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator).to(device, dtype)
    classes = config.num_embeds_ada_norm
    labels = torch.tensor([j % classes for j in range(batch)] + [classes] * batch, device=device)
    return Case(name, model, scheduler, steps, labels, noise)


def twin(model: nn.Module) -> nn.Module:
    """Another module object with the same parameters and buffers, so that what patches one leaves the others alone."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


# ---- variants -------------------------------------------------------------------------------------------------------
@dataclass
class Variant:
    """One way to sample.

    Args:
        before: called before every run, not timed.
        run: one whole sampling run.
        report: what the library says of itself after a run.
        problem: why it does not run, in one line.
    """

    name: str
    model: nn.Module
    run: Callable[[], Tensor]
    before: Callable[[], None] = lambda: None
    report: Callable[[], dict[str, Any]] = dict
    note: str = ""
    problem: str | None = None
    seconds: list[float] = field(default_factory=list)
    result: Tensor | None = None
    flops: float = math.nan
    blocks_computed: float = math.nan


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "fora": ("fora", {"interval": 3}),
    "toca": ("toca", {"interval": 3, "ratio": 0.07}),
    "toca value-norm": ("toca", {"interval": 3, "ratio": 0.07, "selector": "value-norm"}),
    "duca": ("duca", {"interval": 3, "ratio": 0.05}),
    "duca value-norm": ("duca", {"interval": 3, "ratio": 0.05, "selector": "value-norm"}),
    "taylorseer": ("taylorseer", {"interval": 3, "order": 1}),
    "taylorseer lite": ("taylorseer", {"interval": 3, "order": 1, "lite": True}),
    "fbcache": ("fbcache", {"threshold": 0.05}),
    "fbcache 0.2": ("fbcache", {"threshold": 0.2}),
}


def own_variants(case: Case, names: list[str]) -> list[Variant]:
    """The uncached model, untouched, and the recipes, each enabled once for all runs as a user would."""
    scheduler = case.new_scheduler()
    variants = [Variant("uncached", case.model, lambda: case.sample(case.model, scheduler))]
    return variants + [_own(case, name) for name in names]


def _own(case: Case, name: str) -> Variant:
    model, scheduler = twin(case.model), case.new_scheduler()
    method, params = RECIPES[name]
    cache = dittocache.enable(model, method, scheduler=scheduler, **params)

    def report() -> dict[str, Any]:
        said = cache.report()
        return {"compute_fraction": said.compute_fraction, "bytes_peak": said.bytes_peak, "recipe": said.recipe}

    return Variant(name, model, lambda: case.sample(model, scheduler), report=report)


def peer_variants(case: Case) -> list[Variant]:
    """Other libraries, at their defaults and, where they take a schedule, at the steps that FORA computes."""
    builders: dict[str, Callable[[Case], Variant]] = {
        "FBCache, diffusers, as documented": lambda c: _first_block_cache(c, 0.05, context=False),
        "FBCache, diffusers, context set by hand": lambda c: _first_block_cache(c, 0.05),
        "FBCache, diffusers, by hand, threshold 0.2": lambda c: _first_block_cache(c, 0.2),
        "cache-dit, enable_cache(transformer)": lambda c: _cache_dit(c, adapter=False),
        "cache-dit, BlockAdapter, defaults": lambda c: _cache_dit(c),
        "cache-dit, BlockAdapter, steps of FORA": lambda c: _cache_dit(c, fora=True),
    }
    variants = []
    for name, build in builders.items():
        try:
            variant = build(case)
            variant.name = name
        except Exception as error:  # whatever it is, it is the finding
            variant = Variant(name, case.model, lambda: case.noise, problem=one_line(error))
        variants.append(variant)
    return variants


def _first_block_cache(case: Case, threshold: float, context: bool = True) -> Variant:
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model, scheduler = twin(case.model), case.new_scheduler()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))

    def before() -> None:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        if context:  # what CacheMixin.cache_context does, in private; DiT has no CacheMixin
            _set_cache_context(model, CacheContext("cond_uncond"))

    return Variant("", model, lambda: case.sample(model, scheduler), before=before)


def _cache_dit(case: Case, adapter: bool = True, fora: bool = False) -> Variant:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    model, scheduler = twin(case.model), case.new_scheduler()
    settings: dict[str, Any] = {"num_inference_steps": case.steps}
    if fora:
        i = range(case.steps - 1, -1, -1)
        mask = [int(j % 3 == 0 or j == case.steps - 1) for j in i]
        settings |= {"steps_computation_mask": mask, "steps_computation_policy": "static", "Fn_compute_blocks": 1}
    config = cache_dit.DBCacheConfig(**settings)
    target: Any = model
    if adapter:
        target = cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
        )
    cache_dit.enable_cache(target, cache_config=config)

    def before() -> None:
        fresh = {name: list(value) if isinstance(value, list) else value for name, value in settings.items()}
        cache_dit.refresh_context(model, cache_config=cache_dit.DBCacheConfig().reset(**fresh), verbose=False)

    return Variant("", model, lambda: case.sample(model, scheduler), before=before)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


# ---- measuring ------------------------------------------------------------------------------------------------------
def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Tensor], device: torch.device, clock: str) -> tuple[Tensor, float]:
    """The result, and the seconds until the device has finished it: on the wall, or of processor time."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    synchronise(device)
    begin = now()
    result = function()
    synchronise(device)
    return result, now() - begin


def _sdpa_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}  # torch's own table lacks it


@contextmanager
def counting(case: Case, variant: Variant) -> Iterator[None]:
    """Counts FLOPs, and the share of blocks whose attention is really computed."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [m.register_forward_pre_hook(count) for n, m in variant.model.named_modules() if n.endswith("attn1.to_q")]
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        yield
    for handle in handles:
        handle.remove()
    variant.flops = float(counter.get_total_flops())
    variant.blocks_computed = calls / (case.steps * case.depth)


def measure(case: Case, variants: list[Variant], rounds: int, clock: str, tell: Callable[[str], None]) -> None:
    """One counted round that is not timed, then the timed ones, the order of the variants rotating."""
    device = case.noise.device
    for variant in variants:
        if variant.problem is None:
            tell(f"{case.name}: counting, {variant.name}")
            try:
                variant.before()
                with counting(case, variant):
                    variant.result = variant.run()
            except Exception as error:
                if variant.name in ("uncached", *RECIPES):
                    raise
                variant.problem = one_line(error)
    runnable = [variant for variant in variants if variant.problem is None]
    for number in range(rounds):
        first = number % len(runnable)
        for variant in (*runnable[first:], *runnable[:first]):
            tell(f"{case.name}: round {number + 1} of {rounds}, {variant.name}")
            variant.before()
            variant.result, seconds = timed(variant.run, device, clock)
            variant.seconds.append(seconds)


def lockstep(case: Case, clock: str, tell: Callable[[str], None], repeats: int = 1) -> dict[str, Any]:
    """The overhead of the runtime, forward by forward: at every step of a run the untouched model, the same once more,
    and the all-compute plan predict from the same latents, in changing order. Finer than whole runs by far: every ratio
    is of two forwards within seconds of each other. The first two against each other show what is noise."""
    models = {"uncached": case.model, "again": twin(case.model), "none": twin(case.model)}
    device, schedulers = case.noise.device, {name: case.new_scheduler() for name in models}
    ratios: dict[str, list[float]] = {"again": [], "none": []}
    with dittocache.enable(models["none"], "none", scheduler=schedulers["none"]):
        for repeat in range(repeats + 1):  # the first pass warms up: its first forward is where FLOPs are measured
            steps = case.steps if repeat else 2
            for scheduler in schedulers.values():
                scheduler.set_timesteps(case.steps, device=device)
            latents = case.noise * schedulers["uncached"].init_noise_sigma
            for k, t in enumerate(schedulers["uncached"].timesteps[:steps]):
                tell(f"{case.name}: overhead, step {k + 1} of {steps}")
                names = list(models)[k % 3 :] + list(models)[: k % 3]
                seconds, after = {}, {}
                for name in names if k % 2 else reversed(names):
                    predict = partial(case.predict, models[name], latents, t, schedulers[name])
                    eps, seconds[name] = timed(predict, device, clock)
                    after[name] = schedulers[name].step(eps, t, latents).prev_sample
                assert torch.equal(after["none"], after["uncached"]), "the all-compute plan changed the model"
                latents = after["uncached"]
                if repeat:
                    for name in ratios:
                        ratios[name].append(100 * (seconds[name] / seconds["uncached"] - 1))
    return {name: spread(values) for name, values in ratios.items()} | {"forwards": len(ratios["none"])}


def spread(values: list[float]) -> dict[str, float]:
    """Median with its 95 % interval (bootstrap), and the quartiles."""
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = x[torch.randint(len(x), (2000, len(x)), generator=generator)].quantile(0.5, dim=1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    q1, median, q3 = x.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "ci_low": low, "ci_high": high, "q1": q1, "q3": q3}


def describe(variant: Variant, base: Variant) -> dict[str, Any]:
    """A variant's row of the JSON."""
    row: dict[str, Any] = {"variant": variant.name}
    if variant.problem is not None:
        return row | {"does_not_run": variant.problem}
    ratios = [theirs / ours for ours, theirs in zip(variant.seconds, base.seconds)]
    counted, speedup, said = variant.flops / base.flops, statistics.median(ratios), variant.report()
    share = said.get("compute_fraction", counted)  # without the FLOPs of scoring tokens, which are overhead
    wanted, got = base.result.double(), variant.result.double()
    low, span = wanted.min(), wanted.max() - wanted.min()
    psnr = metrics.psnr((got - low) / span, (wanted - low) / span)
    return row | {
        "seconds": [round(s, 4) for s in variant.seconds],
        "seconds_median": statistics.median(variant.seconds),
        "seconds_min": min(variant.seconds),
        "seconds_max": max(variant.seconds),
        "compute_share": share,
        "compute_share_counted": counted,
        "blocks_computed": variant.blocks_computed,
        "ideal_speedup": 1 / share,
        "speedup": speedup,
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "speedups": [round(r, 4) for r in ratios],
        "efficiency": speedup * share,
        "cache_bytes": said.get("bytes_peak"),
        "relative_error": float((got - wanted).norm() / wanted.norm()),
        "psnr_db": None if math.isinf(psnr) else psnr,
        "equal_to_uncached": bool(torch.equal(got, wanted)),
    }


# ---- the program ----------------------------------------------------------------------------------------------------
def provenance(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    found = versions()
    for name in ("cache-dit", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "dtype": args.dtype,
        "clock": args.clock,
        "versions": found,
    }


def table(entry: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"{entry['model']}: {entry['tokens']} tokens, batch {entry['batch']} x 2 (guidance), {entry['steps']} steps"
    overhead = entry.get("overhead_percent")
    caption = None
    if overhead:
        none, again = overhead["none"], overhead["again"]
        caption = (
            f"overhead of the runtime, forward by forward ({overhead['forwards']}): {none['median']:+.2f} % "
            f"[{none['ci_low']:+.2f}, {none['ci_high']:+.2f}]; same model twice: {again['median']:+.2f} % "
            f"[{again['ci_low']:+.2f}, {again['ci_high']:+.2f}]"
        )
    out = Table("variant", title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = [
        "s",
        "min-max",
        "compute",
        "blocks",
        "ideal",
        "speed-up",
        "min-max",
        "efficiency",
        "cache MiB",
        "rel. error",
    ]
    for heading in columns:
        out.add_column(heading, justify="right")
    for row in entry["rows"]:
        if "does_not_run" in row:
            out.add_row(row["variant"], *[""] * len(columns))
            continue
        size = row["cache_bytes"]
        out.add_row(
            row["variant"], f"{row['seconds_median']:.2f}", f"{row['seconds_min']:.2f}-{row['seconds_max']:.2f}",
            f"{100 * row['compute_share']:.1f} %", f"{100 * row['blocks_computed']:.0f} %",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['speedup']:.2f}x", f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}", f"{row['efficiency']:.2f}",
            "" if size is None else f"{size / 2**20:.1f}", f"{row['relative_error']:.2g}",
        )  # fmt: skip
    return out


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["glyphs", "dit-s2", "dit-b2"])
    parser.add_argument("--variants", nargs="*", choices=list(RECIPES), default=list(RECIPES), help="beside uncached")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--batch", type=int, help="pictures at once, doubled by guidance (default: glyphs 8, others 1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of every variant (default: 5)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: for a busy machine, --threads 1")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries as well")
    parser.add_argument("--overhead", action=argparse.BooleanOptionalAction, default=True, help="overhead by forward")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.json")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and not args.device.startswith("cpu"):
        parser.error("--clock cpu does not see the time of other devices")
    for name in ("steps", "rounds", "batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more; got {value}")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    from rich.console import Console

    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="dittocache: none is on")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    data = {"format": "dittocache-speed-1", "provenance": provenance(args, device), "models": []}
    with console.status("") if console.is_terminal else nullcontext() as status:
        tell = status.update if status is not None else lambda text: None
        for name in args.models:
            batch = args.batch or (8 if name == "glyphs" else 1)
            began, case = time.perf_counter(), load(name, args.steps, batch, device, dtype)
            variants = own_variants(case, args.variants) + (peer_variants(case) if args.peers else [])
            measure(case, variants, args.rounds, args.clock, tell)
            entry: dict[str, Any] = {
                "model": name,
                "parameters": sum(p.numel() for p in case.model.parameters()),
                "tokens": (case.noise.shape[-1] // case.model.config.patch_size) ** 2,
                "depth": case.depth,
                "batch": batch,
                "steps": args.steps,
                "rounds": args.rounds,
                "guidance": f"batched, {GUIDANCE}",
                "scheduler": type(case.scheduler).__name__,
                "gflops_uncached": variants[0].flops / 1e9,
                "rows": [describe(variant, variants[0]) for variant in variants],
            }
            if args.overhead:
                entry["overhead_percent"] = lockstep(case, args.clock, tell, repeats=max(1, round(50 / args.steps)))
            entry["took_seconds"] = round(time.perf_counter() - began, 1)
            data["models"].append(entry)
            console.print(table(entry))
            for row in entry["rows"]:
                if "does_not_run" in row:
                    text = f"does not run: {row['variant']}: {row['does_not_run']}"
                    console.print(text, highlight=False, markup=False)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {args.out}", highlight=False)
    return data


if __name__ == "__main__":
    main()
