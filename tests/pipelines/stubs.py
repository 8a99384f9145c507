"""What stands in for text encoders, and the small parts that tiny pipelines share."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import diffusers
import tiny
import torch
from torch import Tensor

from . import PROMPTS


# ---- text -----------------------------------------------------------------------------------------------------------
def embed(prompts: list[str], length: int, width: int, salt: str = "") -> Tensor:
    """Embeddings `[len(prompts), length, width]` that depend on each text alone; other salts are other encoders."""
    return torch.stack([torch.randn(length, width, generator=_generator(salt + "|" + text)) for text in prompts])


def pooled(prompts: list[str], width: int, salt: str = "") -> Tensor:
    """Pooled embeddings `[len(prompts), width]`."""
    return embed(prompts, 1, width, "pooled|" + salt)[:, 0]


def mask(prompts: list[str], length: int) -> Tensor:
    """Attention mask `[len(prompts), length]` of integers; the last 0 to 2 tokens are padding, as the text is long."""
    return torch.stack([(torch.arange(length) < length - len(text) % 3).long() for text in prompts])


def label(prompt: str, classes: int = 1000) -> int:
    """A class in place of a prompt."""
    return int(torch.randint(classes, (), generator=_generator(prompt)))


def texts(prompt: str | list[str] | None, batch: int) -> list[str]:
    """One prompt a picture: `PROMPTS`, one text for all, or the list itself."""
    if prompt is None:
        return [PROMPTS[j % len(PROMPTS)] for j in range(batch)]
    return [prompt] * batch if isinstance(prompt, str) else list(prompt)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---- chance and pictures --------------------------------------------------------------------------------------------
def generators(seed: int, batch: int) -> list[torch.Generator]:
    """One generator a picture: seed, seed + 1, ..."""
    return [torch.Generator().manual_seed(seed + j) for j in range(batch)]


def pictures(seed: int, batch: int, size: int) -> Tensor:
    """Input pictures `[batch, 3, size, size]` within 0 .. 1; picture j depends on seed + j alone."""
    return torch.stack([torch.rand(3, size, size, generator=g) for g in generators(5000 + seed, batch)])


def masks(seed: int, batch: int, size: int) -> Tensor:
    """Inpainting masks `[batch, 1, size, size]`: the right half is to be drawn."""
    right = (torch.arange(size) >= size // 2).float()
    return right.expand(batch, 1, size, size).clone()


# ---- parts ----------------------------------------------------------------------------------------------------------
def assemble(pipeline: str, **parts: Any) -> Any:
    """A pipeline of diffusers by the name of its class; parts that are not given are None. No progress bar."""
    cls = getattr(diffusers, pipeline)
    wanted = inspect.signature(cls.__init__).parameters.values()
    empty = {p.name: None for p in wanted if p.name != "self" and p.default is p.empty}
    pipe = cls(**empty | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae(seed: int, channels: int = 4) -> Any:
    """A tiny `AutoencoderKL` that makes one latent of 2 x 2 pixels."""
    return tiny.randomize(
        diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.1,
            sample_size=16,
        ),
        seed,
    )
