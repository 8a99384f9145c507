"""Rows x samples, measured: eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import (
    MODEL,
    Conditions,
    Device,
    Guidance,
    Json,
    Pipe,
    Prompts,
    app,
    asked,
    device_named,
    examples,
    method_named,
    need_extras,
    print_json,
    usage_errors,
    values_of,
)

if TYPE_CHECKING:
    from ..evaluate.rows import Row
    from ..evaluate.task import Asked


@app.command(
    "eval",
    epilog=examples(
        "dittocache eval --recipe fora:interval=3 --recipe duca:interval=5,ratio=0.1 --fewer 25 --fewer 17 --out found",
        "dittocache eval emoji --recipe my-recipe --samples 256 --metric psnr --metric fd --out found",
        "dittocache eval --samples 1024 --workers 4 --out found",
        "dittocache eval path/to/pipeline --prompts prompts.txt --metric clip --fewer 20:UniPCMultistepScheduler",
        "dittocache eval facebook/DiT-XL-2-256 --recipe fora --samples 50000 --adm VIRTUAL_imagenet256_labeled.npz "
        "--device cuda --workers 8 --out imagenet",
        "dittocache eval --engine ray --address auto --worker num_gpus=1 --worker num_cpus=8 --out /shared/found",
    ),
)
def evaluate(
    pipe: Pipe = MODEL,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="A row: a method and its parameters, or the folder of a saved recipe. May be given several times.",
            show_default="without --fewer as well: the rows of dittocache demo",
        ),
    ] = None,
    fewer: Annotated[
        list[str] | None,
        typer.Option(metavar="STEPS[:SCHEDULER]", help="A row without caching and with so many steps."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of the uncached row.")] = 50,
    samples: Annotated[int, typer.Option(min=2, help="How many pictures every row draws.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the others count up.")] = 0,
    guidance: Guidance = None,
    condition: Conditions = None,
    prompts: Prompts = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="psnr, ssim, latent-error, fd, precision-recall, accuracy, lpips, clip, image-reward; several times.",
            show_default="what the model allows",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="Features for fd and precision-recall: judge, inception.", show_default="the model's judge"),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=PATH", help="Where the weights of a metric are.")
    ] = None,
    adm: Annotated[
        Path | None, typer.Option(metavar="REFERENCE.npz", help="Also FID, sFID, IS, precision, recall of ImageNet.")
    ] = None,
    random_labels: Annotated[
        bool, typer.Option("--random-labels/--labels-in-turn", help="Classes drawn by the seed, or one after another.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Label of the row that differences are taken from.", show_default="the first after uncached"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once, which are one shard.")] = 8,
    engine: Annotated[
        str | None,
        typer.Option(help="local, accelerate (processes), or ray.", show_default="local, or accelerate for workers"),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many workers.", show_default="1")] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Of Ray: what one worker needs, such as num_gpus=1; several times."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of Ray's cluster.", show_default="this machine")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every worker on a CPU.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder of the shards, the numbers and the page; what is there goes on.")
    ] = Path("dittocache-eval"),
    as_json: Json = False,
) -> None:
    """Draw the same pictures in several ways and measure how close, how good, how fast, and how sure all that is.

    The same command goes on where it was interrupted, however it was, and with any number of workers: the results are
    the same. The folder then holds index.html, comparison.json, pictures.safetensors, and shards/.
    """
    with usage_errors():
        need_extras()
        from ..evaluate import protocol, write_page
        from ..evaluate.console import progress_bar, show_comparison
        from ..evaluate.task import Evaluation, summary
        from ..parts import check_choice
        from ..work import ENGINES, run

        if workers is not None and worker:
            raise ValueError("--worker says what each of them needs, --workers how many alike: give one of them")
        if (worker or address) and engine != "ray":
            raise ValueError(f"{'--worker' if worker else '--address'} goes with --engine ray")
        launched = "WORLD_SIZE" in os.environ  # by accelerate
        engine = engine or ("accelerate" if launched or workers not in (None, 1) else "local")
        check_choice("engine", engine, ENGINES)
        rows = _rows(steps, recipe or [], fewer or [])
        if baseline is not None:
            check_choice("baseline", baseline, [row.label for row in rows])
        elif len(rows) > 1:
            baseline = rows[1].label
        places = {name: str(path) for name, path in values_of(weights).items()}
        questions = _asked(pipe, condition or [], prompts, adm, samples if random_labels else 0, seed)
        metrics, space = _metrics(pipe, metric, space, questions, adm, samples)
        task = Evaluation(
            model=pipe, rows=rows, conditions=questions.conditions, seed=seed, guidance_scale=guidance, batch=batch,
            metrics=metrics, space=space, weights=places, adm=adm is not None, dtype=dtype, threads=threads,
            # workers of a cluster may have what this machine lacks
            device=device if address and device != "auto" else device_named(device),
        )  # fmt: skip
        needs: Any = [values_of(one.split(",")) for one in worker] if worker else workers or 1
        with progress_bar("shards") as progress:
            more = {"address": address} if address else {}
            folder, shards = run(task, samples, batch, out / "shards", engine, needs, progress, **more)
        if int(os.environ.get("RANK", 0)) > 0:  # of accelerate launch: the first process tells
            return
        comparison = summary(task, folder, shards, questions, baseline)
        if adm is not None:
            comparison = protocol.with_numbers(comparison, task, folder, shards, adm)
            protocol.write_samples(task, folder, shards, out)
        comparison.save(out)
        page = write_page(comparison, out / "index.html")
    if as_json:
        print_json(comparison.to_dict() | {"page": str(page)})
        return
    show_comparison(comparison)
    typer.echo(f"\nThe page: {page}")


def _rows(steps: int, recipes: list[str], fewer_steps: list[str]) -> tuple[Row, ...]:
    """The uncached row and those that are asked for, or else those of the demo."""
    from ..evaluate.rows import fewer, standard_rows, uncached

    if not recipes and not fewer_steps:
        return tuple(standard_rows(steps))
    rows = [uncached(steps)]
    for text in fewer_steps:
        count, _, scheduler = text.partition(":")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"--fewer is STEPS or STEPS:SCHEDULER, such as 25; got {text!r}")
        if int(count) == steps and not scheduler:
            raise ValueError(f"--fewer {count} is what --steps {steps} says: it would be the uncached row again")
        rows.append(fewer(int(count), scheduler or None))
    return (*rows, *(_cached(text, steps) for text in recipes))


def _cached(text: str, steps: int) -> Row:
    """A row with a saved recipe, or with a method and its parameters."""
    from ..evaluate.rows import Row, cached
    from ..recipe import Recipe

    folder = Path(text)
    if folder.is_dir():
        saved = Recipe.from_pretrained(folder)
        return Row(folder.resolve().name, saved.method or folder.resolve().name, steps, saved)
    name, _, params = text.partition(":")
    method_named(name)
    return cached(name, steps, **values_of(_split(params)))


def _split(params: str) -> list[str]:
    """`a=1,b=(1,2)` at the commas that are outside of brackets."""
    parts, depth = [""], 0
    for character in params:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def _asked(model: str, conditions: list[str], prompts: Path | None, adm: Path | None, drawn: int, seed: int) -> Asked:
    """What is asked of the model: what the options say, or else everything that it knows.

    Args:
        drawn: how many classes are drawn by the seed; 0 for none.
    """
    from ..evaluate import pipelines
    from ..evaluate.adm import CLASSES, SAMPLES, labels
    from ..evaluate.task import Asked

    if (conditions and prompts) or (adm and (conditions or prompts)) or (drawn and not adm):
        raise ValueError("of --condition, --prompts and --adm (--random-labels goes with it) give one")
    if adm is not None:
        if pipelines.classes(model) != CLASSES:
            raise ValueError(f"--adm is for models of {CLASSES} classes; {model} has {pipelines.classes(model)}")
        classes = tuple(labels(max(drawn, SAMPLES), seed=seed).tolist()) if drawn else tuple(range(CLASSES))
        return Asked(classes, tuple(map(str, classes)))
    return asked(model, conditions, prompts)


def _metrics(
    model: str, wanted: list[str] | None, space: str | None, asked: Asked, adm: Path | None, samples: int
) -> tuple[tuple[str, ...], str]:
    """What is measured, and in which space of features; by default what needs no weights."""
    from .. import bundled
    from ..evaluate.adm import NEIGHBOURS, check_reference
    from ..evaluate.task import JUDGED, PAIRED, SETS

    if adm is not None:
        check_reference(adm)
        if space == "judge":
            raise ValueError("--adm compares features of inception: leave --space out")
    own = model in bundled.names() and adm is None
    space = space or ("judge" if own else "inception")
    if wanted:
        metrics = tuple(dict.fromkeys(wanted))
    elif own:
        few = samples <= NEIGHBOURS
        metrics = (*PAIRED, *SETS[: 1 if few else 2], *(JUDGED if asked.classes and space == "judge" else ()))
    else:
        metrics = PAIRED
    if "accuracy" in metrics and asked.classes is None:
        raise ValueError("accuracy needs a bundled model's own questions: leave --condition and --prompts out")
    if "precision-recall" in metrics and samples <= NEIGHBOURS:
        raise ValueError(f"precision-recall needs more than {NEIGHBOURS} samples; got {samples}")
    return metrics, space
