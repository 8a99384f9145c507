"""What an entry of the zoo is, and how its inputs are drawn."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny import randomize
from torch import Tensor, nn

TEXT = 7  # text tokens; prime, so that nothing fits by accident
FRAMES = 3  # of every video


@dataclass(frozen=True)
class Draw:
    """The tensors of step `k` of `steps`. Row j comes from generators of seed + j alone, so that it is the same row in
    a batch of any size."""

    batch: int = 2
    k: int = 0
    steps: int = 8
    seed: int = 0
    size: int = 4

    def noise(self, name: str, *shape: int) -> Tensor:
        """[batch, *shape], the same at every step; other names are other noise."""
        stream = zlib.crc32(name.encode())
        generators = (torch.Generator().manual_seed(stream + self.seed + row) for row in range(self.batch))
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def numbers(self, name: str, below: int, *shape: int) -> Tensor:
        """[batch, *shape], whole numbers of 0 .. below - 1, the same at every step."""
        stream = zlib.crc32(name.encode())
        generators = (torch.Generator().manual_seed(stream + self.seed + row) for row in range(self.batch))
        return torch.stack([torch.randint(below, shape, generator=generator) for generator in generators])

    def latents(self, *shape: int, name: str = "latents") -> Tensor:
        """[batch, *shape], drifting slowly with the steps."""
        angle = torch.tensor(0.8 * self.k / self.steps)
        return self.noise(name, *shape) * angle.cos() + self.noise(f"{name} drift", *shape) * angle.sin()

    def text(self, channels: int, tokens: int = TEXT, name: str = "text") -> Tensor:
        """[batch, tokens, channels]."""
        return self.noise(name, tokens, channels)

    def mask(self, tokens: int = TEXT) -> Tensor:
        """[batch, tokens] of ones: all tokens count."""
        return torch.ones(self.batch, tokens)

    def time(self, top: float = 1000) -> Tensor:
        """[batch], falling with the steps from just below `top`."""
        return torch.full((self.batch,), (999 - 999 * self.k // self.steps) * top / 1000)

    def constant(self, *values: float) -> Tensor:
        """[batch, values], the same for every row."""
        return torch.tensor(values).repeat(self.batch, 1)

    def image(self, channels: int, patch: int = 1) -> Tensor:
        """Latents [batch, channels, side, side] of size x size patches."""
        return self.latents(channels, self.size * patch, self.size * patch)

    def video(self, channels: int, patch: int = 1, frames: int = FRAMES) -> Tensor:
        """Latents [batch, channels, frames, side, side] of size x size patches."""
        return self.latents(channels, frames, self.size * patch, self.size * patch)

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return self.size**2


Inputs = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A class with its tiny model and the inputs of a forward.

    Args:
        name: the class.
        build: `build(seed)`, a new model with random weights, in evaluation mode.
        inputs: `inputs(model, batch=2, k=0, steps=8, seed=0, size=None)`, the keyword arguments of one forward at step
            `k` of `steps`. Step 0 again and again is a frozen input.
        stacks: paths of the main lists of blocks; each has at least 3.
        latents, time, conditions: which arguments are which; empty if the class has or uses none.
        sizes: sides in tokens (sound: the length; the rest: what it says there), the first by default.
        frames: whether the latents are videos.
        joined: why row j of a batch is not what row j alone gives; empty if it is.
        tolerance: how far equal computations may lie apart, in units of the largest value; more where the class itself
            rounds to bfloat16.
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Inputs
    stacks: tuple[str, ...]
    latents: tuple[str, ...] = ("hidden_states",)
    time: tuple[str, ...] = ("timestep",)
    conditions: tuple[str, ...] = ("encoder_hidden_states",)
    sizes: tuple[int, ...] = (4, 6)
    frames: bool = False
    joined: str = ""
    tolerance: float = 1e-5


def entry(
    name: str,
    config: dict[str, Any],
    draw: Callable[[Any, Draw], dict[str, Any]],
    *stacks: str,
    prepare: Callable[[Any], None] = lambda model: None,
    **fields: Any,
) -> Entry:
    """An entry whose model is the class with a configuration, its weights random.

    Args:
        name: the class.
        config: its arguments.
        draw: `draw(model, draw)`, the keyword arguments of a forward.
        stacks: see `Entry`.
        prepare: what else is to be done to a new model.
        fields: the rest of the entry.
    """

    def build(seed: int = 0) -> nn.Module:
        model = randomize(getattr(diffusers, name)(**config), seed)
        prepare(model)
        return model

    def inputs(
        model: nn.Module, batch: int = 2, k: int = 0, steps: int = 8, seed: int = 0, size: int | None = None
    ) -> dict[str, Any]:
        kwargs = draw(model, Draw(batch, k, steps, seed, size or made.sizes[0]))
        plain = {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}
        return kwargs | plain

    made = Entry(name, build, inputs, stacks, **fields)
    return made


def prediction(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """What a forward predicts, as one tensor [batch, ...]; of several outputs (picture and sound), side by side."""
    return _one(model(**kwargs))


def _one(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):  # one for every row
        return torch.stack(output)
    parts = [_one(part) for part in output if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1)


# ---- positions ------------------------------------------------------------------------------------------------------
def grid(*shape: int, axes: int = 3) -> Tensor:
    """[cells, axes] positions of the cells of a grid, in the last axes; the others are 0."""
    cells = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).float()
    return nn.functional.pad(cells, (axes - len(shape), 0))


def rotary(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, channels] of rotary embeddings along one axis."""
    angles = torch.outer(torch.arange(tokens), 100.0 ** -torch.linspace(0, 1, channels // 2))
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
