"""From a budget to a recipe: tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    need_extras,
    print_json,
    usage_errors,
)


@app.command(
    epilog=examples(
        "dittocache tune --min-speedup 3 --out 3x",
        "dittocache tune --max-loss 'psnr>=40' --time-budget 300 --out forty",
        "dittocache tune emoji --max-loss 'fd<=0.05' --samples 32 --trial 32 --out emoji-tuned",
        "dittocache tune path/to/pipeline --prompts prompts.txt --min-speedup 2 --guidance 4.5 --device cuda",
        "dittocache tune --min-speedup 5 --against solution --scheduler own --scheduler unipc --plan-steps 50 "
        "--plan-steps 30",
    )
)
def tune(
    pipe: Pipe = MODEL,
    max_loss: Annotated[
        str | None,
        typer.Option(metavar="MEASURE>=VALUE", help="The fastest plan with psnr>=, ssim>=, latent<= or fd<= a value."),
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="The closest plan that is at least so many times as fast, measured here.")
    ] = None,
    metric: Annotated[str, typer.Option(help="What --min-speedup keeps close: psnr, ssim, latent or fd.")] = "psnr",
    steps: Annotated[int, typer.Option(min=3, max=1000, help="Denoising steps of the uncached pipeline.")] = 50,
    guidance: Guidance = None,
    condition: Conditions = None,
    prompts: Prompts = None,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(
            help="Schedulers to plan on: own, ddim, dpm++2m, unipc, euler, or a class of diffusers; several times.",
            show_default="own; against the solution unipc as well",
        ),
    ] = None,
    plan_steps: Annotated[
        list[int] | None, typer.Option(help="Steps of the plans; several times.", show_default="--steps")
    ] = None,
    against: Annotated[
        str,
        typer.Option(help="Pictures are compared with the pipeline's own ones, or with those of a many-step solution."),
    ] = "own",
    solution: Annotated[
        int | None,
        typer.Option(help="Steps of that solution.", show_default="about ten times --steps, where it is wanted"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Pictures that predictors are fitted to, all at once.")] = 24,
    trial: Annotated[int, typer.Option(help="Others that plans are searched on.")] = 24,
    judged: Annotated[int, typer.Option(help="Others that everything is compared on.")] = 24,
    held_out: Annotated[
        int, typer.Option(help="Others for the last check, with other prompts if there are some.")
    ] = 48,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once for measuring.")] = 8,
    tries: Annotated[
        int, typer.Option(help="Plans of 30 % of the steps that the local search draws, more of cheaper ones; 0: none.")
    ] = 24,
    methods: Annotated[int, typer.Option(help="Settings of published methods that are tried; 0 for none.")] = 16,
    time_budget: Annotated[float | None, typer.Option(help="Seconds of search, at most.", show_default="none")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the others count up.")] = 1_000_000,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder of the recipe, the numbers and the page; a search that is there goes on.")
    ] = Path("dittocache-tuned"),
    as_json: Json = False,
) -> None:
    """Find the best plan for a budget: at most this much loss, or at least this much speed.

    Scheduler, number of steps and recipe are searched together: plans of the solver, fewer steps, and published
    methods. The winner is checked on other seeds (and prompts), and saved with its measured curve. The same command
    goes on where it was interrupted. Load what it finds with `dittocache.enable(pipe, FOLDER)`.
    """
    with usage_errors():
        need_extras()
        from ..calibrate import Setup
        from ..evaluate import pipelines, write_page
        from ..evaluate.console import progress_bar, show_comparison
        from ..evaluate.rows import own_guidance
        from ..tune import Effort, Goal, save
        from ..tune import tune as search

        goal = Goal.of(max_loss, min_speedup, metric)
        effort = Effort(samples, trial, judged, held_out, batch, tries, methods, time_budget)
        questions = asked(pipe, condition or [], prompts)
        loaded = pipelines.load(pipe, device_named(device))
        strength = own_guidance(loaded) if guidance is None else guidance
        # classes in turn, all of them, unless some are named
        given = condition or prompts or isinstance(questions.conditions[0], str)
        chosen = questions.conditions if given else ()
        setup = Setup(num_steps=steps, guidance_scale=strength, seed=seed, conditions=tuple(chosen))
        with progress_bar(goal.text()) as progress:
            found = search(
                loaded,
                goal,
                setup,
                schedulers=scheduler or (["own", "unipc"] if against == "solution" else ["own"]),
                steps=plan_steps or [],
                against=against,
                solution=solution,
                effort=effort,
                out=out,
                look=_look(pipe, goal.metric, loaded.device),
                model=pipe,
                progress=progress,
            )
        save(found, goal, out, pipe)
        page = write_page(found.comparison, out / "index.html")
    if as_json:
        print_json(
            {"out": str(out), "page": str(page), "met": found.met, "winner": found.row.config(), **found.numbers}
        )
        return
    show_comparison(found.comparison)
    if not found.met:
        typer.echo(f"On held-out samples the goal is missed: {goal.text()}", err=True)
    typer.echo(f"\n{found.row.label}: {out}\nThe page: {page}")


def _look(model: str, metric: str, device: Any) -> Any:
    """Features for Frechet distances: the judge of a bundled model, else Inception where they are asked for."""
    from .. import bundled
    from ..evaluate import features

    if model in bundled.names():
        return features.load("judge", {"judge": model}, device)
    if metric != "fd":
        return None
    features.check(["inception"], {})
    return features.load("inception", None, device)
