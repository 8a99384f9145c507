"""Training of L2C's router for a pipeline (arXiv 2406.01733): from samples to a recipe in a folder."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import origin, saved
from ..atomic import BESIDE
from ..calibrate.base import digest
from ..calibrate.setup import Setup, check_uncached
from ..parts import check_int, show
from ..recipe import Recipe, recipe
from ..saved import ARRAYS, FILE
from . import checkpoint
from . import data as samples_of
from .loop import Data, Settings, Training, train
from .objective import class_conditional
from .steps import Pairs
from .weights import measured
from .workers import Workers

if TYPE_CHECKING:
    from ..evaluate.compare import Progress

FORM = "dittocache-training-data-1"
CHECKPOINT, SAMPLES, WEIGHTS = "training.safetensors", "samples.safetensors", "weights.safetensors"
FILES = (CHECKPOINT, SAMPLES, WEIGHTS, *saved.FILES)


def train_l2c(
    pipe: Any,
    out: str | Path,
    *,
    num_steps: int = 20,
    data: str | Path | None = None,
    samples: int = 360,
    guidance_scale: float = 1.5,
    weighted: int = 0,
    fresh: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Recipe:
    """Trains an L2C router for a class-conditional pipeline, and saves its recipe: `enable(pipe, out)` uses it.

    A training that was stopped, or killed, goes on from its last checkpoint, bit for bit; a finished one returns at
    once. Started by `accelerate launch` or `torchrun`, every process draws steps of its own and gradients are averaged.

    Args:
        pipe: with a transformer and a scheduler; both are left as they are. The noise levels are the scheduler's.
        out: folder of the recipe, the checkpoint and the samples; it is created, and must hold nothing else.
        num_steps: T of the runs that the recipe is for.
        data: a safetensors file with x0 [n, channels, height, width] in the network's space (latents, or pixels from -1
            to 1) and labels [n]; None: samples that the pipeline draws itself, uncached.
        samples: how many it draws, classes in turn.
        guidance_scale: with which it draws them; training itself has no guidance.
        weighted: weigh the squared error of each step by how much it matters for the final picture, measured with as
            many pictures (see `weights.measured`); 0: all alike, as in the paper.
        fresh: forget an earlier training in this folder.
        progress: called as progress(done, total, what is running), such as `evaluate.console.progress_bar` gives.
        settings: those of `Settings`, by name. Its defaults are the paper's, for ImageNet on GPUs; a small network
            wants a larger learning rate, a penalty of its own and fewer iterations (see `dittocache train l2c`).

    Returns:
        The recipe: "l2c", for this model, scheduler and number of steps only.

    Raises:
        ValueError: a bad setting, a pipeline that is not understood or has a cache on, data that do not fit, a folder
            that holds something else, or a checkpoint that is damaged or of another training. Nothing was changed then.
        ImportError: several processes, but no accelerate.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"train_l2c has no setting {unknown[0]!r}; known: {', '.join(known)}")
    chosen = Settings(**settings)
    check_int("samples", samples, 1)
    check_int("weighted", weighted, 0)
    network, scheduler = getattr(pipe, "transformer", None), getattr(pipe, "scheduler", None)
    if network is None or scheduler is None:
        raise ValueError(f"train_l2c needs a pipeline with a transformer and a scheduler; got {show(type(pipe))}")
    predict, null = class_conditional(network)
    if network.dtype == torch.float16:
        raise ValueError("small errors have no gradient in float16: train in float32 or bfloat16")
    check_uncached(pipe)
    walk = Pairs.of(scheduler, num_steps)
    setup = Setup(num_steps, guidance_scale, Setup.seed + chosen.seed)
    config = network.config
    sides = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
    shape = (config.in_channels, *sides)
    given = None if data is None else samples_of.read(Path(data), shape, null)
    folder = Path(out)
    _check_folder(folder)
    workers = Workers()
    if workers.device is not None:
        pipe.to(workers.device)
    if workers.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, FILE, ARRAYS) if fresh else ():
            (folder / name).unlink(missing_ok=True)
    workers.wait()

    facts = {**setup.to_dict(), **origin.made_for(network, scheduler)}

    def kept(name: str, made_of: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors of a file: the first process makes it, then the others read it."""
        if workers.rank:
            workers.wait()
        found = checkpoint.kept(folder / name, FORM, {**made_of, **facts}, make, fresh and not workers.rank)
        if not workers.rank:
            workers.wait()
        return found

    if given is None:
        drawn = kept(SAMPLES, {"samples": samples}, lambda: samples_of.own(pipe, setup, samples, progress))
        given = drawn["x0"], drawn["labels"]
    training_data = Data(given[0].to(network.dtype), given[1], null)
    source = {"data": "own samples" if data is None else Path(data).name, "digest": digest(given[0].float(), given[1])}
    if weighted:
        measure = functools.partial(measured, pipe, predict, walk, training_data, setup, weighted, chosen, progress)
        made_of = {"weighted": weighted, "seed of training": chosen.seed, **source}
        training_data = training_data._replace(**kept(WEIGHTS, made_of, lambda: {"weights": measure()}))
    made_for = origin.made_for(network, scheduler, walk.timesteps.tolist())
    training = train(
        network,
        predict,
        walk,
        training_data,
        chosen,
        path=folder / CHECKPOINT,
        config=made_for | source | {"weighted": weighted},
        workers=workers,
        progress=progress,
    )
    provenance = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **source,
        "samples": len(given[0]),
        "guidance_scale": guidance_scale if data is None else None,
        "weights": None if training_data.weights is None else training_data.weights.tolist(),
        "settings": dataclasses.asdict(chosen),
    }
    trained = as_recipe(training, made_for, provenance)
    if workers.rank == 0:
        trained.save_pretrained(folder)
    workers.wait()
    return trained


def as_recipe(training: Training, made_for: dict[str, Any], provenance: dict[str, Any]) -> Recipe:
    """The recipe of a trained router, with how it came about."""
    rows = "index" if isinstance(training.walk, Pairs) else "outer"
    made = recipe("l2c", router_logits=training.table, threshold=training.settings.threshold, rows=rows)
    results = {
        "iterations": training.iteration,
        "loss": training.loss,
        "removed": training.removed,
        "seconds": round(training.seconds, 1),
    }
    return dataclasses.replace(made, made_for=made_for, provenance=provenance | results)


def _check_folder(folder: Path) -> None:
    """Raises a ValueError if a folder holds what no training of a router wrote."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    found, ours = {name for name in names if not name.endswith(BESIDE)}, set(FILES)  # a kill leaves unfinished ones
    foreign = sorted(found - ours if CHECKPOINT in found else found - ours | found & {FILE, ARRAYS})
    if foreign:
        raise ValueError(f"{str(folder)!r} holds {foreign[0]!r}, which no training wrote: choose another folder")
