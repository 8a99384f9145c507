"""What is drawn to calibrate or train from: the pipeline's own samples, each with a seed of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import clock, origin
from ..hooks import caches_on, foreign_cache
from ..parts import check_bool, check_int, check_number, plain, show


@dataclass(frozen=True)
class Setup:
    """How samples are drawn: everything that their statistics depend on, apart from the model.

    Sample j has condition j modulo their number and the seed `seed + j`, so that results depend neither on the batch
    size nor on how samples are shared out.

    Args:
        num_steps: T.
        guidance_scale: strength of classifier-free guidance.
        seed: seed of sample 0; far from those that people draw with, so that results are tested on others.
        conditions: class labels (numbers) or prompts (texts); empty: all classes of a class-conditional model.
        shared_noise: every sample starts from the noise of `seed`, as some authors calibrate.

    Raises:
        ValueError: a value out of range.
    """

    num_steps: int = 50
    guidance_scale: float = 1.5
    seed: int = 1_000_000
    conditions: tuple[int | str, ...] = ()
    shared_noise: bool = False

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        check_int("num_steps", self.num_steps, 1)
        check_number("guidance_scale", self.guidance_scale)
        check_int("seed", self.seed, 0, 2**62)
        check_bool("shared_noise", self.shared_noise)
        listed = isinstance(self.conditions, tuple)
        if not listed or not all(isinstance(c, (int, str)) and not isinstance(c, bool) for c in self.conditions):
            raise ValueError(f"conditions are a list of class labels or prompts; got {show(self.conditions)}")

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "conditions": list(self.conditions)}

    def condition(self, pipe: Any, sample: int) -> int | str:
        """Class label or prompt of a sample."""
        conditions = self.conditions or range(classes(pipe))
        return conditions[sample % len(conditions)]

    def generator(self, sample: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + (0 if self.shared_noise else sample))


def takes(pipe: Any) -> str:
    """Name of the argument that a pipeline is conditioned on: `class_labels` or `prompt`.

    Raises:
        ValueError: the pipeline has neither.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    for name in ("class_labels", "prompt"):
        if name in accepted:
            return name
    raise ValueError(f"{type(pipe).__name__} takes neither class_labels nor prompt: it cannot be sampled here")


def guidance(pipe: Any, scale: float | None) -> dict[str, float]:
    """The argument that sets the strength of guidance; none where the pipeline's own is wanted (None).

    Raises:
        ValueError: the pipeline has no such argument, and is asked for guidance.
    """
    if guided(pipe):
        return {} if scale is None else {"guidance_scale": scale}
    if scale not in (None, 1):
        raise ValueError(f"{type(pipe).__name__} takes no guidance_scale: it must be 1 there; got {show(scale)}")
    return {}


def guided(pipe: Any) -> bool:
    """Whether a pipeline takes a strength of guidance; others have none, or keep it in a part of their own."""
    return "guidance_scale" in inspect.signature(type(pipe).__call__).parameters


def denoiser(pipe: Any) -> Any:
    """The network of a pipeline that is called every step.

    Raises:
        ValueError: it has neither a transformer nor a U-Net.
    """
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise ValueError(f"samples are drawn by a diffusers pipeline; {type(pipe).__name__} has no transformer")
    return network


def check_uncached(pipe: Any) -> None:
    """Raises a ValueError unless this is a pipeline without a cache."""
    denoiser(pipe)
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"samples are drawn by a diffusers pipeline; {type(pipe).__name__} has no scheduler")
    foreign = foreign_cache(denoiser(pipe))
    if foreign is not None:
        raise ValueError(f"a diffusers cache is on ({foreign}): call transformer.disable_cache() first")
    if caches_on(denoiser(pipe)):
        raise ValueError("a cache is on, but uncached runs are needed here: call dittocache.disable first")


def classes(pipe: Any) -> int:
    """Number of classes of a class-conditional pipeline.

    Raises:
        ValueError: it is conditioned on text, so that prompts must be given.
    """
    if takes(pipe) != "class_labels":
        raise ValueError(f"{type(pipe).__name__} draws from prompts: pass some as conditions")
    return int(pipe.transformer.config.num_embeds_ada_norm)


def conditional_half(pipe: Any) -> int:
    """Which half of a batch with guidance holds the conditional rows: pipelines with text put them second."""
    return 0 if takes(pipe) == "class_labels" else 1


def draw(pipe: Any, setup: Setup, samples: Sequence[int], output_type: str = "pt") -> Any:
    """Draws some samples with whatever cache is on.

    Returns:
        For output_type "pt", pictures [n, channels, height, width] or videos [n, frames, channels, height, width].
    """
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message="dittocache:")  # everything is computed here, and is meant to be
        torch.manual_seed(setup.seed + samples[0])  # some pipelines do not hand their generators on to the scheduler
        return pipe(
            **{takes(pipe): [setup.condition(pipe, j) for j in samples]},
            num_inference_steps=setup.num_steps,
            generator=[setup.generator(j) for j in samples],
            output_type=output_type,
            **guidance(pipe, setup.guidance_scale),
        )[0]


class _Beginning(clock.Silent):
    """Sees which timesteps a pipeline sets."""

    timesteps: Tensor

    def on_begin(self, scheduler: Any) -> None:
        self.timesteps = scheduler.timesteps.clone()

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        raise clock.Enough


def timesteps(pipe: Any, setup: Setup) -> Tensor:
    """The timesteps of a run; the pipeline's scheduler is left as it is.

    Pipelines of flow matching set sigmas and shifts of their own: one forward tells.
    """
    if hasattr(pipe.scheduler, "scale_noise"):
        with clock.observed(pipe.scheduler, _Beginning()) as seen, contextlib.suppress(clock.Enough):
            draw(pipe, setup, [0])
        return seen.timesteps
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(setup.num_steps)
    return scheduler.timesteps


def made_for(pipe: Any, setup: Setup) -> dict[str, Any]:
    """What a recipe that is made from this setup is good for (`Recipe.made_for`)."""
    return origin.made_for(denoiser(pipe), pipe.scheduler, timesteps(pipe, setup).tolist())
