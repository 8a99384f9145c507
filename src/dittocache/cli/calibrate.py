"""Recipes from recorded runs: calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .base import (
    MODEL,
    Device,
    Json,
    app,
    examples,
    load,
    parameters_dict,
    print_json,
    show_parameters,
    usage_errors,
    values_of,
)


@app.command(
    epilog=examples(
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
    samples: Annotated[
        int | None,
        typer.Option(min=0, help="How many pictures are drawn uncached.", show_default="64; dpcache 10, lemica 2"),
    ] = None,
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
    from .. import calibrate as calibration
    from ..calibrate import run
    from ..evaluate.console import progress_bar

    with usage_errors():
        values = values_of(param)
        calibrator = calibration.make(method, values)
        if parameters:
            known = type(calibrator).parameters()
            if as_json:
                print_json(parameters_dict(known))
                return
            show_parameters(known)
            return
        if out is None:
            raise ValueError("--out is missing: the folder of the statistics and the recipe")
        if shard is not None and merge:
            raise ValueError("--shard draws a share, --merge adds shares up: give one of them")
        run.check_folder(out, method)
        conditions = tuple(int(c) if c.isdecimal() else c for c in condition or ())
        setup = calibration.Setup(steps, guidance, seed, conditions, shared_noise)
        pipe = load(device, model)
        if merge:
            made = run.merged(pipe, calibrator, merge, setup, out)
        else:
            count = calibrator.usual if samples is None else samples
            numbers = run.shard(count, shard) if shard else count
            with progress_bar("drawing") as progress:
                made = run.calibrate(pipe, method, numbers, setup, out=out, batch=batch, progress=progress, **values)
    if as_json:
        print_json({"out": str(out), "recipe": made.describe(), "provenance": dict(made.provenance)})
        return
    size = sum(file.stat().st_size for file in out.glob("recipe.*"))
    memory = made.provenance.get("memory", {})
    peaks = "; ".join(f"{name} {amount / 2**20:.1f} MiB" for name, amount in memory.items())
    typer.echo(f"{made.describe()}: {made.provenance['samples']} samples" + (f"; {peaks}" if peaks else ""))
    typer.echo(f"{out}: the recipe takes {size / 2**20:.2f} MiB. Use it with dittocache.enable(pipe, {str(out)!r})")
