"""Recipes that are learned: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .base import MODEL, Device, Json, app, examples, load, print_json, usage_errors

train = typer.Typer(help="Learn what a method needs; the network itself stays as it is.", rich_markup_mode="markdown")
app.add_typer(train, name="train", epilog=examples("dittocache train l2c --out l2c-glyphs"))


@train.command(
    "l2c",
    epilog=examples(
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
    from ..evaluate.console import progress_bar
    from ..train import train_l2c as run

    with usage_errors():
        pipe = load(device, model)
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
        print_json({"out": str(out), "recipe": made.describe(), "provenance": found})
        return
    typer.echo(
        f"{found['iterations']} iterations in {found['seconds']:.0f} s: loss {found['loss']:.3g}, "
        f"{found['removed']:.0%} of the modules of every second step are reused"
    )
    typer.echo(f"Use it with dittocache.enable(pipe, {str(out)!r}), at {steps} steps")
