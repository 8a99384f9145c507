"""Drawing with a bundled model: demo, bench, sample."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import (
    MODEL,
    Device,
    Json,
    Model,
    Params,
    app,
    examples,
    load,
    need_extras,
    parse,
    print_json,
    usage_errors,
)

if TYPE_CHECKING:
    from ..evaluate.compare import Progress


@app.command(
    epilog=examples(
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
    """Draw the same pictures uncached, with fewer steps, with caching and with tuned recipes; measure; write one page.

    Takes two minutes or three on two processor cores. The folder then holds index.html (open it in a browser; it loads
    nothing from the network), comparison.json (all numbers) and pictures.safetensors (all pictures).
    """
    from ..bundled import questions
    from ..bundled.judge import load_judge
    from ..evaluate import compare, standard_rows, write_page
    from ..evaluate.console import progress_bar, show_comparison
    from ..evaluate.rows import tuned_rows

    with usage_errors():
        need_extras()
        asked = questions(model, pictures)
        out.mkdir(parents=True, exist_ok=True)
        pipe = load(device, model)
        rows = [*standard_rows(steps), *tuned_rows(model, steps)]
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
        print_json(comparison.to_dict() | {"page": str(page)})
        return
    show_comparison(comparison, f"took {time.perf_counter() - began:.0f} s")
    typer.echo(f"\nThe page: {page}")


@app.command(
    epilog=examples(
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
    from ..bundled import questions
    from ..evaluate.compare import cached, compare, uncached
    from ..evaluate.console import progress_bar, show, table_of

    with usage_errors():
        params = parse(method, param)
        need_extras()
        names = [method] if method else list(_methods_that_run())
        rows = [uncached(steps), cached("none", steps), *(cached(n, steps, **params) for n in names if n != "none")]
        seeds = range(max(2, batch * repeats))
        conditions = questions(model, len(seeds)).conditions
        pipe = load(device, model)
    with progress_bar("measuring") as progress:
        found = compare(pipe, rows, conditions, seeds, batch, model=model, progress=progress)
    if as_json:
        print_json(found.to_dict())
        return
    show(table_of(found, fidelity=False))
    made = found.provenance
    show(f"{made['machine']}, threads: {made['threads']}; {batch} pictures at once, {steps} steps")


@app.command(
    epilog=examples(
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

    from .. import bundled, enable
    from ..evaluate.console import progress_bar
    from ..evaluate.sheet import sheet

    with usage_errors():
        params = parse(method, param)
        for path in (out, plan_out):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"there is no folder {str(path.parent)!r} for {path.name}")
        if out.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{out.name!r} does not end like a picture's file: use .png")
        if plan_out is not None and method is None:
            raise ValueError("--plan-out needs --method: without caching everything is computed")
        bundled.folder(model)  # refuses what is none
        pipe = load(device, model)
        asked = _asked(pipe, labels)
        cache = enable(pipe, method, **params) if method else None
        steps = steps or (len(cache.recipe.made_for.get("timesteps", ())) if cache else 0) or 50
    with progress_bar("drawing") as progress:
        pipe_steps = _Steps(progress, steps)
        began = time.perf_counter()
        with usage_errors():
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
    with usage_errors():
        image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(out)
        if cache is not None and plan_out is not None:
            cache.trace.draw(plan_out)
    if as_json:
        found = {"out": str(out), "seconds": round(seconds, 3), "report": cache.report().to_dict() if cache else None}
        print_json(found)
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


def _methods_that_run() -> Iterator[str]:
    """Methods that need neither calibration nor training."""
    from .. import methods

    return (name for name, method in methods().items() if method.needs == "nothing")


def _asked(pipe: Any, labels: str | None) -> Any:
    """What to draw: class numbers of characters, or prompts, from a text."""
    if hasattr(pipe, "get_label_ids"):
        return pipe.get_label_ids("DITTOCACHE" if labels is None else labels)
    default = "red heart, cat face, rocket, rainbow, pizza, tulip"
    prompts = (text.strip() for text in (default if labels is None else labels).split(","))
    return [prompt for prompt in prompts if prompt]
