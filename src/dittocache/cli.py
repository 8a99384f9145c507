"""The command line: one command, verbs. Wrong arguments end with exit code 2 and one line."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from .evaluate.compare import Progress
    from .recipe import Method, Parameter

# typer ships its own copy of click, or uses click, depending on its version
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]
MODEL = "glyphs"


class _OneLine(TyperGroup):
    """A group of commands whose usage errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standalone_mode = kwargs.pop("standalone_mode", True)
        try:
            code = super().main(*args, **(kwargs | {"standalone_mode": False}))
        except ClickException as error:
            if not standalone_mode:
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            typer.echo(f"Error: {' '.join(error.format_message().split()).rstrip('.')}{hint}", err=True)
            sys.exit(2)
        except typer.Abort:
            sys.exit(130)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=_OneLine,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of the command `dittocache`."""
    app(prog_name="dittocache")


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turns what a bad argument raises into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from None


def _examples(*lines: str) -> str:
    return "\n\n".join(("Examples:", *lines))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ... By default a GPU if there is one.")]
Model = Annotated[str, typer.Option(help="A bundled model: glyphs (characters) or emoji (from texts).")]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter of the method; may be given several times."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Diffusion transformers that sample faster by reusing features between denoising steps.

    Start with `dittocache demo`: it draws pictures with and without caching and writes one page that shows
    how much faster, and how close.
    """
    if version:
        from . import __version__

        typer.echo(f"dittocache {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


# ---- demo, report, bench --------------------------------------------------------------------------------------------
@app.command(
    epilog=_examples(
        "dittocache demo", "dittocache demo --out here --pictures 12 --steps 20", "dittocache demo --device cuda"
    )
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the page, the numbers and the pictures.")] = Path(
        "dittocache-demo"
    ),
    pictures: Annotated[int, typer.Option(min=2, max=3600, help="How many pictures every row draws.")] = 36,
    steps: Annotated[int, typer.Option(min=10, max=1000, help="Denoising steps of the uncached row.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the others count up.")] = 0,
    model: Model = MODEL,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw the same pictures uncached, with fewer steps and with caching; measure; write one HTML page.

    Takes two minutes or three on two processor cores. The folder then holds index.html (open it in a browser; it loads
    nothing from the network), comparison.json (all numbers) and pictures.safetensors (all pictures).
    """
    from .bundled import questions
    from .bundled.judge import load_judge
    from .evaluate import compare, standard_rows, write_page
    from .evaluate.console import progress_bar, show_comparison

    with _usage_errors():
        _need_extras()
        asked = questions(model, pictures)
        out.mkdir(parents=True, exist_ok=True)
        pipe = _load(device, model)
        rows = standard_rows(steps)
    began = time.perf_counter()
    with progress_bar("drawing") as progress:
        comparison = compare(
            pipe,
            rows,
            asked.conditions,
            [seed + j for j in range(pictures)],
            chunk=min(12, -(-pictures // 4)),  # four or more chunks, for a median
            judge=load_judge(model),
            classes=asked.classes,
            names=asked.names,
            model=model,
            progress=progress,
        )
    comparison.save(out)
    page = write_page(comparison, out / "index.html")
    if as_json:
        _print_json(comparison.to_dict() | {"page": str(page)})
        return
    show_comparison(comparison, f"took {time.perf_counter() - began:.0f} s")
    typer.echo(f"\nThe page: {page}")


@app.command(epilog=_examples("dittocache report dittocache-demo", "dittocache report dittocache-demo --out page.html"))
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that dittocache demo wrote.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The page's file.", show_default="FOLDER/index.html")] = None,
    as_json: Json = False,
) -> None:
    """Write the HTML page of a saved comparison again, and print its table."""
    from .evaluate import Comparison, write_page
    from .evaluate.console import show_comparison

    with _usage_errors():
        comparison = Comparison.load(folder)
        page = write_page(comparison, out or folder / "index.html")
    if as_json:
        _print_json(comparison.to_dict() | {"page": str(page)})
        return
    show_comparison(comparison)
    typer.echo(f"\nThe page: {page}")


@app.command(
    epilog=_examples(
        "dittocache bench",
        "dittocache bench --json > speed.json",
        "dittocache bench --method duca -p interval=5 -p ratio=0.1",
    )
)
def bench(
    method: Annotated[
        str | None, typer.Option(help="One method only; see dittocache methods.", show_default="all")
    ] = None,
    param: Params = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every row.")] = 3,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    model: Model = MODEL,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed on a bundled model: uncached, the runtime with nothing skipped, and caching methods.

    Rows run in turn, so that whatever else the machine does meets all of them alike; speed-ups are medians of paired
    ratios. The row "none" computes everything with the cache on: its speed-up is the overhead of the runtime.
    """
    from .bundled import questions
    from .evaluate.compare import cached, compare, uncached
    from .evaluate.console import progress_bar, show, table_of

    with _usage_errors():
        params = _parse(method, param)
        _need_extras()
        names = [method] if method else list(_methods_that_run())
        rows = [uncached(steps), cached("none", steps), *(cached(n, steps, **params) for n in names if n != "none")]
        seeds = range(max(2, batch * repeats))
        conditions = questions(model, len(seeds)).conditions
        pipe = _load(device, model)
    with progress_bar("measuring") as progress:
        found = compare(pipe, rows, conditions, seeds, batch, model=model, progress=progress)
    if as_json:
        _print_json(found.to_dict())
        return
    show(table_of(found, fidelity=False))
    made = found.provenance
    show(f"{made['machine']}, threads: {made['threads']}; {batch} pictures at once, {steps} steps")


# ---- sample ---------------------------------------------------------------------------------------------------------
@app.command(
    epilog=_examples(
        "dittocache sample --labels ABC",
        'dittocache sample --model emoji --labels "red heart, cat face" --method pab',
        "dittocache sample --method duca --param interval=3 --param ratio=0.05 --plan-out plan.png",
    )
)
def sample(
    labels: Annotated[
        str | None,
        typer.Option(
            help="What to draw: characters A-Z and 0-9; of emoji, names separated by commas.",
            show_default="DITTOCACHE, or red heart and others",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture's file: .png, .jpg, .webp, ...")] = Path("sample.png"),
    method: Annotated[
        str | None, typer.Option(help="Caching method, or folder of a saved recipe.", show_default="none")
    ] = None,
    param: Params = None,
    plan_out: Annotated[Path | None, typer.Option(help="Also draw what was computed: .png, .svg, .pdf.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Denoising steps.", show_default="50, or what the recipe was made for"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Strength of classifier-free guidance; 1 for none.", show_default="the model's own"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the others count up.")] = 0,
    model: Model = MODEL,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw pictures with a bundled model, with or without caching, and report what was saved."""
    import torch
    from PIL import Image

    from . import bundled, enable
    from .evaluate.console import progress_bar
    from .evaluate.page import sheet

    with _usage_errors():
        params = _parse(method, param)
        for path in (out, plan_out):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"there is no folder {str(path.parent)!r} for {path.name}")
        if out.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{out.name!r} does not end like a picture's file: use .png")
        if plan_out is not None and method is None:
            raise ValueError("--plan-out needs --method: without caching everything is computed")
        bundled.folder(model)  # refuses what is none
        pipe = _load(device, model)
        asked = _asked(pipe, labels)
        cache = enable(pipe, method, **params) if method else None
        steps = steps or (len(cache.recipe.made_for.get("timesteps", ())) if cache else 0) or 50
    with progress_bar("drawing") as progress:
        pipe_steps = _Steps(progress, steps)
        began = time.perf_counter()
        with _usage_errors():
            pictures = pipe(
                asked,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed + j) for j in range(len(asked))],
                output_type="np",
                callback_on_step_end=pipe_steps,
                **({} if guidance is None else {"guidance_scale": guidance}),
            ).images
        seconds = time.perf_counter() - began
    drawn = (pictures * 255).round().astype("uint8")
    whole = sheet(drawn, columns=min(len(asked), 12))
    image = Image.fromarray(whole.squeeze(-1) if whole.shape[-1] == 1 else whole)
    with _usage_errors():
        image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(out)
        if cache is not None and plan_out is not None:
            cache.trace.draw(plan_out)
    if as_json:
        found = {"out": str(out), "seconds": round(seconds, 3), "report": cache.report().to_dict() if cache else None}
        _print_json(found)
        return
    if cache is not None:
        typer.echo(str(cache.report()))
    typer.echo(f"{len(asked)} pictures in {seconds:.1f} s: {out}" + (f" and {plan_out}" if plan_out else ""))


class _Steps:
    """A pipeline's callback that moves a progress bar."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps

    def __call__(self, pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        self.progress(step + 1, self.steps, f"step {step + 1}")
        return inputs


# ---- calibrate ------------------------------------------------------------------------------------------------------
@app.command(
    epilog=_examples(
        "dittocache calibrate eoc --out eoc-glyphs",
        "dittocache calibrate icc -p rank=32 -p factors=change-svd --steps 50 --out icc-glyphs",
        "dittocache calibrate eoc --shard 1/2 --out a; dittocache calibrate eoc --shard 2/2 --out b; "
        "dittocache calibrate eoc --merge a --merge b --out whole",
    )
)
def calibrate(
    method: Annotated[str, typer.Argument(help="eoc, goc, icc or eb-cache.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the statistics and the recipe; what is there goes on.", show_default=False),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter of the calibration; --parameters lists."),
    ] = None,
    model: Annotated[str, typer.Option(help="A bundled model, or the folder of a saved pipeline.")] = MODEL,
    samples: Annotated[int, typer.Option(min=0, help="How many pictures are drawn uncached.")] = 64,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 for none.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample; the others count up.")] = 1_000_000,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="A class number or prompt; may be given several times.", show_default="all classes"),
    ] = None,
    shared_noise: Annotated[bool, typer.Option(help="Start every sample from the same noise.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    shard: Annotated[str | None, typer.Option(help="Draw only a share, such as 1/4, to be merged.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Folder of a shard; records nothing, adds them up.")] = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List the calibration's parameters and stop.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Record uncached runs of a model, and make a method's recipe of them.

    Ends with a folder that `dittocache.enable(pipe, FOLDER)` and `dittocache sample --method FOLDER` take. Statistics
    are written after every batch: the same command goes on where it was interrupted.
    """
    from . import calibrate as calibration
    from .calibrate import run
    from .evaluate.console import progress_bar

    with _usage_errors():
        values = _values(param)
        calibrator = calibration.make(method, values)
        if parameters:
            known = type(calibrator).parameters()
            if as_json:
                _print_json(_parameters_dict(known))
                return
            _show_parameters(known)
            return
        if out is None:
            raise ValueError("--out is missing: the folder of the statistics and the recipe")
        if shard is not None and merge:
            raise ValueError("--shard draws a share, --merge adds shares up: give one of them")
        run.check_folder(out, method)
        conditions = tuple(int(c) if c.isdecimal() else c for c in condition or ())
        setup = calibration.Setup(steps, guidance, seed, conditions, shared_noise)
        pipe = _load(device, model)
        if merge:
            made = run.merged(pipe, calibrator, merge, setup, out)
        else:
            numbers = run.shard(samples, shard) if shard else samples
            with progress_bar("drawing") as progress:
                made = run.calibrate(pipe, method, numbers, setup, out=out, batch=batch, progress=progress, **values)
    if as_json:
        _print_json({"out": str(out), "recipe": made.describe(), "provenance": dict(made.provenance)})
        return
    size = sum(file.stat().st_size for file in out.glob("recipe.*"))
    memory = made.provenance.get("memory", {})
    peaks = "; ".join(f"{name} {amount / 2**20:.1f} MiB" for name, amount in memory.items())
    typer.echo(f"{made.describe()}: {made.provenance['samples']} samples" + (f"; {peaks}" if peaks else ""))
    typer.echo(f"{out}: the recipe takes {size / 2**20:.2f} MiB. Use it with dittocache.enable(pipe, {str(out)!r})")


# ---- train ----------------------------------------------------------------------------------------------------------
train = typer.Typer(help="Learn what a method needs; the network itself stays as it is.", rich_markup_mode="markdown")
app.add_typer(train, name="train", epilog=_examples("dittocache train l2c --out l2c-glyphs"))


@train.command(
    "l2c",
    epilog=_examples(
        "dittocache train l2c --out l2c-glyphs",
        "dittocache train l2c --out l2c-half --penalty 1e-4; dittocache sample --method l2c-half --steps 20",
        "dittocache train l2c --out paper --per-batch --weighted 0 --iterations 20000 --lr 1e-3 --penalty 5e-6",
        "accelerate launch --num_processes 2 -m dittocache.cli train l2c --out l2c-glyphs",
    ),
)
def train_l2c(
    out: Annotated[Path, typer.Option(help="Folder of the recipe, the checkpoint and the samples.")],
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps of the runs to be made faster.")] = 20,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations at most.")] = 150,
    batch: Annotated[int, typer.Option(min=1, help="Samples of an iteration (and process).")] = 20,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate; the paper's is 1e-3.")] = 0.1,
    penalty: Annotated[float, typer.Option(min=0, help="Price of a computed module: more removes more.")] = 4e-5,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="theta: lower scores are reused.")] = 0.1,
    hard: Annotated[
        bool, typer.Option("--hard/--soft", help="Compute or reuse in training (straight-through), or mix.")
    ] = False,
    per_sample: Annotated[
        bool, typer.Option("--per-sample/--per-batch", help="Draw a step for every sample, or (the paper) for a batch.")
    ] = True,
    weighted: Annotated[
        int, typer.Option(min=0, help="Pictures to measure how much each step matters; 0 (the paper): all alike.")
    ] = 24,
    data: Annotated[
        Path | None,
        typer.Option(help="A .safetensors file with x0 and labels.", show_default="the model's own samples"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples the model draws.")] = 180,
    guidance: Annotated[float, typer.Option(help="Guidance of the runs to be made faster; 1 for none.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Begin anew, or go on where the folder's training stopped.")
    ] = False,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many iterations without a changed decision.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Iterations between checkpoints.")] = 25,
    model: Annotated[str, typer.Option(help="A bundled model, or the folder of a saved pipeline.")] = MODEL,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train L2C's router: at every second step, which modules are reused (arXiv 2406.01733).

    The defaults are for the bundled model, in minutes on two processor cores, and depart from the paper as the options
    say. A training that was interrupted goes on where it was.
    """
    from .evaluate.console import progress_bar
    from .train import train_l2c as run

    with _usage_errors():
        pipe = _load(device, model)
        with progress_bar("training") as progress:
            made = run(
                pipe,
                out,
                num_steps=steps,
                data=data,
                samples=samples,
                guidance_scale=guidance,
                weighted=weighted,
                fresh=fresh,
                progress=progress,
                iterations=iterations,
                batch_size=batch,
                learning_rate=lr,
                penalty=penalty,
                threshold=threshold,
                hard=hard,
                per_sample=per_sample,
                seed=seed,
                patience=patience,
                checkpoint_every=checkpoint_every,
            )
    found = dict(made.provenance)
    if as_json:
        _print_json({"out": str(out), "recipe": made.describe(), "provenance": found})
        return
    typer.echo(
        f"{found['iterations']} iterations in {found['seconds']:.0f} s: loss {found['loss']:.3g}, "
        f"{found['removed']:.0%} of the modules of every second step are reused"
    )
    typer.echo(f"Use it with dittocache.enable(pipe, {str(out)!r}), at {steps} steps")


# ---- methods, describe ----------------------------------------------------------------------------------------------
@app.command(epilog=_examples("dittocache methods", "dittocache methods duca", "dittocache methods duca --json"))
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: its parameters, settings and citation.")] = None,
    as_json: Json = False,
) -> None:
    """List the caching methods, or everything about one of them."""
    from . import methods as known
    from .evaluate.console import new_table, show

    if name is None:
        found = known()
        if as_json:
            _print_json({n: _method_dict(m) for n, m in found.items()})
            return
        table = new_table("method", "paper", "needs", "what it does")
        for n, m in found.items():
            table.add_row(f"[bold]{n}[/bold]", m.arxiv and f"arXiv {m.arxiv}", m.needs, m.summary)
        show(table)
        typer.echo("dittocache methods NAME tells more about one of them.")
        return
    with _usage_errors():
        method = _method(name)
    if as_json:
        _print_json(_method_dict(method))
        return
    show(f"[bold]{method.name}[/bold]: {method.title}" + (f" (arXiv {method.arxiv})" if method.arxiv else ""))
    show(f"{method.summary}\nNeeds: {method.needs}.")
    if method.parameters:
        _show_parameters(method.parameters)
    for model, values in method.settings.items():
        show(f"Recommended for {model}: {', '.join(f'{k}={v}' for k, v in values.items())}")
    if method.bibtex:
        typer.echo("\n" + method.bibtex)


@app.command(
    epilog=_examples(
        "dittocache describe",
        "dittocache describe FluxTransformer2DModel",
        "dittocache describe path/to/pipeline --json",
    )
)
def describe(
    target: Annotated[
        str,
        typer.Argument(help="A bundled model, a class of diffusers, or the folder of a saved pipeline or transformer."),
    ] = MODEL,
    as_json: Json = False,
) -> None:
    """Show what can be cached in a transformer: its sites, block by block. Weights are not needed."""
    from . import describe as find

    with _usage_errors():
        found = find(_network(target))
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


# sizes of the published models, where a class's own defaults do not make one
_SIZES: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 320, "cross_attention_dim": 768},
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "patch_size": 2,
        "sample_width": 90, "sample_height": 60,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "num_layers": 16, "num_single_layers": 32, "attention_head_dim": 128,
        "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048, "num_routed_experts": 4,
        "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128),
        "llama_layers": list(range(48)),
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637,
        "sample_size": 128,
    },
    "LatteTransformer3DModel": {
        "in_channels": 4, "out_channels": 8, "num_layers": 28, "attention_head_dim": 72, "sample_size": 64,
        "patch_size": 2, "caption_channels": 4096, "norm_type": "ada_norm_single", "cross_attention_dim": 1152,
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8, "cross_attention_dim": 2048},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"in_channels": 320, "cross_attention_dim": 768},
    "TransformerTemporalModel": {"in_channels": 320},
}  # fmt: skip


def _network(target: str) -> Any:
    """A transformer without weights (on the meta device), from what `describe` takes.

    Raises:
        ValueError: there is no such thing, or it cannot be built.
    """
    import diffusers
    import torch

    from . import bundled

    config: dict[str, Any] = {}
    if target in bundled.names():
        target = str(bundled.folder(target))
    folder = Path(target)
    if folder.is_dir():
        places = [folder, *(folder / name for name in ("transformer", "unet"))]
        file = next((place / "config.json" for place in places if (place / "config.json").is_file()), None)
        if file is None:
            raise ValueError(f"{target!r} holds no transformer: config.json is missing")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            name = config["_class_name"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(file)!r} is damaged, or not a config of diffusers") from None
    else:
        name = target
        if "/" in target or not hasattr(diffusers, name):
            raise ValueError(
                f"{target!r} is neither a bundled model ({', '.join(bundled.names())}), nor a class of diffusers, "
                "nor a folder"
            )
    cls: Any = getattr(diffusers, str(name), None)
    if not hasattr(cls, "from_config") or not issubclass(cls, diffusers.ModelMixin):
        raise ValueError(f"{name!r} is not a network of diffusers {diffusers.__version__}")
    try:
        with torch.device("meta"):
            return cls.from_config(config) if config else cls(**_SIZES.get(str(name), {}))
    except Exception as error:  # whatever a foreign constructor raises when its default configuration is incomplete
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        whose = "saved" if config else "default"
        raise ValueError(f"{name} cannot be built from its {whose} configuration: {reason}") from None


# ---- doctor ---------------------------------------------------------------------------------------------------------
@app.command(epilog=_examples("dittocache doctor", "dittocache doctor --json"))
def doctor(device: Device = "auto", as_json: Json = False) -> None:
    """Check the installation: versions, device, bundled model, and that a cache really skips. Exit code 1 if not."""
    from .evaluate.console import new_table, show
    from .evaluate.doctor import examine

    with _usage_errors():
        device = _device(device)
    checks = examine(device, lambda: _load(device))
    if as_json:
        _print_json([check._asdict() for check in checks])
    else:
        table = new_table("", "check", "found")
        for check in checks:
            table.add_row("[green]ok[/green]" if check.ok else "[red]wrong[/red]", check.name, check.found)
        show(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


# ---- what several commands need -------------------------------------------------------------------------------------
def _need_extras() -> None:
    """Raises an ImportError now rather than after minutes of drawing."""
    from .evaluate.doctor import missing_extras

    if missing_extras():
        raise ImportError(missing_extras())


def _device(name: str) -> str:
    """A device that is there; `auto` is the GPU, else the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}: {str(error).splitlines()[0]}") from None
    return name


def _load(device: str, model: str = MODEL) -> Any:
    """A bundled pipeline, or one that was saved in a folder, quiet.

    Raises:
        ValueError: there is no such model, or the folder holds no pipeline.
    """
    from diffusers.utils import logging

    from . import bundled

    logging.disable_progress_bar()
    try:
        if model in bundled.names() or not Path(model).is_dir():
            pipe = bundled.load(model, device=_device(device))
        else:
            pipe = _saved(model).to(_device(device))
    finally:
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    if model in bundled.names() and pipe.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _fit_threads(pipe, bundled.questions(model, 12).conditions)
    return pipe


def _saved(folder: str) -> Any:
    """The pipeline that was saved in a folder; a ValueError if there is none, or of an unknown class."""
    from diffusers import DiffusionPipeline

    from .bundled.pipeline import PIPELINES

    ours = {pipeline.__name__: pipeline for pipeline in PIPELINES.values()}  # which diffusers does not know
    try:
        name = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder!r} holds no pipeline: model_index.json is missing or damaged") from None
    if name in ours:
        return ours[name].from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    try:
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except AttributeError as error:
        raise ValueError(f"{folder!r} holds a pipeline that cannot be loaded: {str(error).splitlines()[0]}") from None


def _fit_threads(pipe: Any, conditions: Any) -> None:
    """Sets as many threads as are fastest right now: 1, 2, 4, ... while each doubling gains a tenth.

    A small network gains little from many threads, and beside another busy process threads that wait for each other
    can make it ten times slower.
    """
    import torch

    best, threads, most = float("inf"), 1, torch.get_num_threads()
    while threads <= most:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        pipe(conditions, num_inference_steps=2, output_type="np")
        seconds = time.perf_counter() - began
        if seconds > 0.9 * best:
            break
        best, threads = seconds, 2 * threads
    torch.set_num_threads(max(1, threads // 2))


def _asked(pipe: Any, labels: str | None) -> Any:
    """What to draw: class numbers of characters, or prompts, from a text."""
    if hasattr(pipe, "get_label_ids"):
        return pipe.get_label_ids("DITTOCACHE" if labels is None else labels)
    default = "red heart, cat face, rocket, rainbow, pizza, tulip"
    prompts = (text.strip() for text in (default if labels is None else labels).split(","))
    return [prompt for prompt in prompts if prompt]


def _method(name: str) -> Method:
    from . import methods

    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return known[name]


def _methods_that_run() -> Iterator[str]:
    """Methods that need neither calibration nor training."""
    from . import methods

    return (name for name, method in methods().items() if method.needs == "nothing")


def _parse(method: str | None, texts: list[str] | None) -> dict[str, Any]:
    """`name=value` texts as parameters: Python literals, or else text.

    Raises:
        ValueError: not of that form, or the method does not take it.
    """
    params = _values(texts)
    if params and method is None:
        raise ValueError("--param needs --method")
    if method is not None and (params or not Path(method).is_dir()):
        _method(method)(**params)
    return params


def _values(texts: list[str] | None) -> dict[str, Any]:
    """`name=value` texts as Python literals, or else text; a ValueError for what is not of that form."""
    values: dict[str, Any] = {}
    spelled = {"true": "True", "false": "False", "none": "None"}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"a parameter is NAME=VALUE, not {text!r}")
        try:
            values[name] = ast.literal_eval(spelled.get(value.lower(), value))
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def _method_dict(method: Method) -> dict[str, Any]:
    names = ("name", "title", "arxiv", "needs", "summary", "settings", "bibtex")
    return {name: getattr(method, name) for name in names} | {"parameters": _parameters_dict(method.parameters)}


def _show_parameters(parameters: dict[str, Parameter]) -> None:
    from rich.markup import escape

    from .evaluate.console import new_table, show

    table = new_table("parameter", "default", "valid", "what it is")
    for p in parameters.values():
        table.add_row(f"[bold]{p.name}[/bold]", str(p.default), p.valid, escape(p.help))
    show(table)


def _parameters_dict(parameters: dict[str, Parameter]) -> dict[str, Any]:
    return {
        p.name: {"type": p.type, "default": p.default, "valid": p.valid, "help": p.help} for p in parameters.values()
    }


if __name__ == "__main__":
    main()
