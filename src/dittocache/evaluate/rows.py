"""Ways to draw the same pictures, and running them in turn."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import clock
from ..calibrate.setup import guidance as guidance_of
from ..calibrate.setup import guided, takes
from ..plan import Plan
from .comparison import FEWER_STEPS, UNCACHED

if TYPE_CHECKING:
    from ..recipe import Recipe


# ---- what is compared -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One way to draw the pictures.

    Args:
        label: short and unique, as it stands in charts and tables.
        method: `uncached`, `fewer steps`, or the name of a caching method; rows of one method share a colour.
        steps: sampling steps.
        recipe: what is enabled on the pipeline; None for none.
        scheduler: a class of diffusers that takes the place of the pipeline's own scheduler, with its configuration.
    """

    label: str
    method: str
    steps: int
    recipe: Recipe | None = None
    scheduler: str | None = None

    @property
    def summary(self) -> str:
        """The recipe, or the steps and the scheduler, in one line."""
        if self.recipe is not None:
            return self.recipe.describe()
        return f"{self.steps} steps" + (f", {self.scheduler}" if self.scheduler else "")

    def config(self) -> dict[str, Any]:
        """What the row's pictures depend on, as JSON values."""
        found = {"label": self.label, "method": self.method, "steps": self.steps, "scheduler": self.scheduler}
        if self.recipe is None:
            return found
        told = {name: value for name, value in self.recipe.to_dict().items() if name != "provenance"}
        text = json.dumps(told, sort_keys=True)
        return found | {"recipe": self.recipe.describe(), "digest": hashlib.sha256(text.encode()).hexdigest()}


def uncached(steps: int) -> Row:
    """The reference: the pipeline as it is."""
    return Row("uncached", UNCACHED, steps)


def fewer(steps: int, scheduler: str | None = None) -> Row:
    """The competitor that costs nothing: the same pipeline with fewer steps, and maybe another scheduler."""
    name = f"{steps} steps" + (f", {scheduler.removesuffix('Scheduler')}" if scheduler else "")
    return Row(name, FEWER_STEPS, steps, scheduler=scheduler)


def cached(method: str, steps: int, label: str | None = None, **params: Any) -> Row:
    """A published method, labelled by default with its name and the parameters that differ from the paper's."""
    from .. import recipe

    made = recipe(method, **params)
    return Row(label or made.describe(), method, steps, made)


# name, mild and strong parameters: the same intervals for all, the papers' defaults for the rest, but for GOC's longer
# interval, which they do not have (there it must take differences of computed features, and less of them), and for
# TaylorSeer's order, which is that for FLUX
STANDARD_SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fora": ("FORA", {"interval": 2}, {"interval": 4}),
    "toca": ("ToCa", {"interval": 2}, {"interval": 4}),
    "duca": ("DuCa", {"interval": 2}, {"interval": 4}),
    "goc": ("GOC", {"interval": 2}, {"interval": 4, "eta": 0.5, "computed_only": True}),
    "taylorseer": ("TaylorSeer", {"interval": 2, "order": 1}, {"interval": 4, "order": 1}),
}
STANDARD_SHARES = (0.8, 0.66, 0.5, 0.34, 0.26, 0.2)  # of the steps, for the rows with fewer of them


def standard_rows(steps: int = 50) -> list[Row]:
    """The rows of `dittocache demo`: uncached, fewer steps, and five methods at a mild and a strong setting."""
    counts = sorted({max(1, round(share * steps)) for share in STANDARD_SHARES} - {steps}, reverse=True)
    rows = [uncached(steps), *(fewer(count) for count in counts)]
    for method, (name, mild, strong) in STANDARD_SETTINGS.items():
        rows += [cached(method, steps, f"{name} mild", **mild), cached(method, steps, f"{name} strong", **strong)]
    return rows


def tuned_rows(model: str, steps: int = 50) -> list[Row]:
    """Rows of the recipes that were tuned for a bundled model and for so many steps."""
    from ..bundled import tuned
    from ..recipe import Recipe

    recipes = {speed: Recipe.from_pretrained(path) for speed, path in tuned(model).items()}
    return [Row(f"tuned {speed}", "tuned", steps, made) for speed, made in recipes.items() if made.num_steps == steps]


# ---- running --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """What one row did with some pictures.

    Args:
        pictures: float in [0, 1], [n, h, w, c], or [n, frames, h, w, c] of videos.
        path: [n, ...] what the scheduler made in every step, in order; of the last one only, unless asked for.
        seconds: wall-clock time.
        compute_fraction, bytes_peak, plan, warnings: of the cache's report; 1, 0, None and none without one.
    """

    pictures: np.ndarray
    path: tuple[Tensor, ...]
    seconds: float
    compute_fraction: float = 1.0
    bytes_peak: int = 0
    plan: Plan | None = None
    warnings: tuple[str, ...] = ()

    @property
    def latents(self) -> Tensor:
        """What the scheduler ended with, on the CPU."""
        return self.path[-1].cpu()


def run_rows(
    pipe: Any,
    rows: Sequence[Row],
    conditions: Sequence[Any],
    seeds: Sequence[int],
    guidance: float | None = None,
    turn: int = 0,
    before: Callable[[Row], None] = lambda row: None,
) -> list[Run]:
    """Draws the same pictures in every way, one after another, and returns the runs in the order of the rows.

    Args:
        pipe: the pipeline, without a cache.
        conditions, seeds: class or prompt, and seed, of every picture or video.
        guidance: strength of guidance; by default the pipeline's own.
        turn: row number `turn` modulo their number is the first; let it count up, and no row is always the first.
        before: called before every run.
    """
    first = turn % len(rows)
    runs: dict[str, Run] = {}
    for row in [*rows[first:], *rows[:first]]:
        before(row)
        runs[row.label] = run_row(pipe, row, conditions, seeds, guidance)
    return [runs[row.label] for row in rows]


def run_row(
    pipe: Any,
    row: Row,
    conditions: Sequence[Any],
    seeds: Sequence[int],
    guidance: float | None = None,
    every_step: bool = False,
) -> Run:
    """Draws pictures in one way; the pipeline is left as it was.

    Args:
        every_step: keep the latents of all steps, not only the last ones; others as in `run_rows`.

    Raises:
        ValueError: the pipeline takes no such arguments, or what it returns is no picture and no video.
    """
    from .. import enable

    options = {takes(pipe): list(conditions), "num_inference_steps": row.steps, "output_type": "np"}
    options |= guidance_of(pipe, guidance)

    def draw(see: Callable[[Tensor], None]) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        torch.manual_seed(seeds[0])  # some pipelines do not hand their generators on to the scheduler
        with clock.observed(pipe.scheduler, _Steps(see)):
            return pipe(**options, generator=generators)[0]

    seen: deque[Tensor] = deque(maxlen=None if every_step else 1)
    with scheduled(pipe, row.scheduler), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dittocache:")  # they stand in the report
        cache = None if row.recipe is None else enable(pipe, row.recipe)
        try:
            if cache is not None:
                with contextlib.suppress(clock.Enough):  # the first forward after `enable` also counts FLOPs
                    draw(_enough)
            begin = time.perf_counter()
            pictures = draw((lambda latents: seen.append(latents.cpu())) if every_step else seen.append)
            seconds = time.perf_counter() - begin
            if not seen or pictures.ndim not in (4, 5):
                what = "steps none but copies of its scheduler" if not seen else "draws neither pictures nor videos"
                raise ValueError(f"{type(pipe).__name__} {what}: it cannot be measured here")
            # some pipelines step both halves of guidance; the first is the picture's
            path = tuple(latents[: len(pictures)] for latents in seen)
            if cache is None:
                return Run(pictures, path, seconds)
            found = cache.report()
            told = tuple(found.warnings)
            return Run(pictures, path, seconds, found.compute_fraction, found.bytes_peak, cache.trace, told)
        finally:
            if cache is not None:
                cache.disable()


def own_guidance(pipe: Any) -> float:
    """Strength of guidance that a pipeline takes if nobody says; 1 where none can be said."""
    return inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default if guided(pipe) else 1.0


def _enough(latents: Tensor) -> None:
    """After the first step."""
    raise clock.Enough


@dataclass
class _Steps(clock.Silent):
    """Shows the latents after every step. (Not every pipeline has a callback for that.)"""

    see: Callable[[Tensor], None]

    def on_step(self, scheduler: Any, latents: Tensor) -> None:
        self.see(latents)


@contextlib.contextmanager
def scheduled(pipe: Any, name: str | None) -> Iterator[None]:
    """Another scheduler of diffusers with the same configuration, for a while; None: the pipeline's own."""
    own = pipe.scheduler
    if name is not None:
        pipe.scheduler = scheduler_class(name).from_config(copy.deepcopy(dict(own.config)))
    try:
        yield
    finally:
        pipe.scheduler = own


def scheduler_class(name: str) -> Any:
    """A scheduler of diffusers by its name.

    Raises:
        ValueError: there is none of that name.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.SchedulerMixin):
        raise ValueError(f"{name!r} is no scheduler of diffusers, such as DPMSolverMultistepScheduler")
    return found
