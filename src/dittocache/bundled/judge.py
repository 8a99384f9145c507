"""Small classifiers of drawn characters and emoji: the yardstick for pictures of the bundled models.

Pictures are what the pipelines return with output_type="pt": float [n, channels, side, side] in [0, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from . import folder
from .data import CHARACTERS, Split

FEATURES = 64  # length of the feature vector of the Frechet distance
EPOCHS, BATCH, LEARNING_RATE, SEED = 8, 128, 3e-3, 0


class Judge(nn.Module):
    """About 50,000 parameters without the head; call it for logits [n, classes], `features` for [n, 64]."""

    def __init__(self, channels: int = 1, classes: int = len(CHARACTERS)) -> None:
        super().__init__()
        widths = (channels, 16, 32, 48, FEATURES)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 1 if index == len(widths) - 2 else 2
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU(),
            ]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.body(pictures * 2 - 1).mean((2, 3))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pictures))


def load_judge(name: str | Path = "glyphs") -> Judge:
    """The judge that comes with a bundled model (or lies in a folder), in float32 on the CPU."""
    path = name if isinstance(name, Path) else folder(name)
    tensors = load_file(path / "judge.safetensors")
    judge = Judge(tensors["body.0.weight"].shape[1], len(tensors["head.bias"])).eval().requires_grad_(False)
    judge.load_state_dict(tensors)
    return judge


def load_reference(name: str = "glyphs") -> dict[str, torch.Tensor]:
    """Judge features of real pictures: "train.mean" [64], "train.covariance" [64, 64], likewise "held_out."."""
    return load_file(folder(name) / "reference.safetensors")


@torch.no_grad()
def read(judge: Judge, pictures: torch.Tensor, batch: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """(class numbers int64 [n], features float64 [n, 64]) of pictures [n, channels, side, side] in [0, 1]."""
    features = torch.cat([judge.features(part.float()) for part in pictures.cpu().split(batch)])
    return judge.head(features).argmax(1), features.double()


def to_pictures(data: np.ndarray) -> torch.Tensor:
    """uint8 [n, side, side] -> float32 [n, 1, side, side] in [0, 1]; [n, side, side, 3] -> [n, 3, side, side]."""
    pictures = torch.from_numpy(data).float().div_(255)
    return pictures[:, None] if pictures.ndim == 3 else pictures.permute(0, 3, 1, 2).contiguous()


def train_judge(data: Split, epochs: int = EPOCHS, progress: Callable = lambda items, **_: items) -> Judge:
    torch.manual_seed(SEED)
    pictures, labels = to_pictures(data.pictures), torch.from_numpy(data.labels)
    judge = Judge(pictures.shape[1], int(labels.max()) + 1)
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    order = torch.cat([torch.randperm(len(labels))[: steps // epochs * BATCH] for _ in range(epochs)])
    for rows in progress(order.split(BATCH), desc="judge"):
        x = pictures[rows]
        # Moved by up to two pixels: the judge should read shapes, not places.
        x = torch.roll(x, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        loss = nn.functional.cross_entropy(judge(x), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)
