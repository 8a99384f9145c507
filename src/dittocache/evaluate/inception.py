"""The Inception network of FID, in the layout in which its weights are passed around for PyTorch.

Szegedy et al. 2016, as frozen by Google in 2015 with 1008 classes; FID, sFID and Inception scores of papers are
measured with these weights. It differs from the network of the same name elsewhere: averages leave the border out, the
last block takes a maximum instead, and pictures are resized as TensorFlow 1 did. Names of tensors are those of the
file of pytorch-fid and torch-fidelity, neither of which can be a dependency, because they bring torchvision.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # pixels, what pictures are resized to
CLASSES = 1008
SPATIAL = 7  # channels of sFID's features

Kernel = tuple[int, int]
Chain = list[tuple[int, list[Kernel]]]  # channels and kernels of one convolution after another; two kernels fork

_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_shrink = partial(F.max_pool2d, kernel_size=3, stride=2)


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions; the branch "pool" pools first.

    Args:
        inputs: channels.
        pool: the pooling of the branch "pool".
        branches: chains by name.
        stride: of the last convolution of every chain; if 2, it is not padded.
    """

    def __init__(self, inputs: int, pool: partial, branches: dict[str, Chain], stride: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.steps: dict[str, list[list[str]]] = {}
        for branch, chain in branches.items():
            prefix = "branch_pool" if branch == "pool" else f"branch{branch}"
            width, self.steps[branch] = inputs, []
            for number, (outputs, kernels) in enumerate(chain, 1):
                last = number == len(chain)
                names = [prefix if len(chain) == 1 else f"{prefix}_{number}{letter}" for letter in _letters(kernels)]
                for name, kernel in zip(names, kernels, strict=True):
                    shrinks = last and stride == 2
                    self.add_module(name, Convolution(width, outputs, kernel, 2 if shrinks else 1, pad=not shrinks))
                self.steps[branch].append(names)
                width = outputs

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, steps in self.steps.items():
            y = self.pool(x) if branch == "pool" else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _letters(kernels: list[Kernel]) -> str | list[str]:
    return "ab" if len(kernels) == 2 else [""]


_1, _3, _5, _ROW, _COLUMN = [(1, 1)], [(3, 3)], [(5, 5)], [(1, 7)], [(7, 1)]
_FORK = [(1, 3), (3, 1)]


def _wide(inputs: int, pooled: int) -> Mixed:
    """35 x 35 positions."""
    return Mixed(inputs, _average, {
        "1x1": [(64, _1)], "5x5": [(48, _1), (64, _5)], "3x3dbl": [(64, _1), (96, _3), (96, _3)],
        "pool": [(pooled, _1)],
    })  # fmt: skip


def _middle(width: int) -> Mixed:
    """17 x 17 positions: long rows and columns in turn."""
    return Mixed(768, _average, {
        "1x1": [(192, _1)], "7x7": [(width, _1), (width, _ROW), (192, _COLUMN)],
        "7x7dbl": [(width, _1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)],
        "pool": [(192, _1)],
    })  # fmt: skip


def _last(inputs: int, pool: partial) -> Mixed:
    """8 x 8 positions: rows and columns side by side."""
    return Mixed(inputs, pool, {
        "1x1": [(320, _1)], "3x3": [(384, _1), (384, _FORK)], "3x3dbl": [(448, _1), (384, _3), (384, _FORK)],
        "pool": [(192, _1)],
    })  # fmt: skip


class Inception(nn.Module):
    """Pictures [n, 3, h, w] with values 0 to 255 -> "features" [n, 2048], "spatial" [n, 2023], "probabilities".

    `features` is the mean over positions before the classifier (pool_3). `spatial` is the first 7 channels of the 17 x
    17 positions after the 1 x 1 convolution of Mixed_6d (TensorFlow's mixed_6/conv), position by position: what sFID
    is measured in (Nash et al. 2021). `probabilities` [n, 1008] leave the classifier's bias out, as every published
    Inception score does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2, pad=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), pad=False)
        self.Mixed_5b = _wide(192, 32)
        self.Mixed_5c = _wide(256, 64)
        self.Mixed_5d = _wide(288, 64)
        self.Mixed_6a = Mixed(288, _shrink, {
            "3x3": [(384, _3)], "3x3dbl": [(64, _1), (96, _3), (96, _3)], "pool": [],
        }, stride=2)  # fmt: skip
        self.Mixed_6b = _middle(128)
        self.Mixed_6c = _middle(160)
        self.Mixed_6d = _middle(160)
        self.Mixed_6e = _middle(192)
        self.Mixed_7a = Mixed(768, _shrink, {
            "3x3": [(192, _1), (320, _3)], "7x7x3": [(192, _1), (192, _ROW), (192, _COLUMN), (192, _3)], "pool": [],
        }, stride=2)  # fmt: skip
        self.Mixed_7b = _last(1280, _average)
        self.Mixed_7c = _last(2048, _maximum)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        x = (resize(pictures, SIDE) - 128) / 128
        x = _shrink(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        # channels last, as the reference statistics are
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return {
            "features": features,
            "spatial": spatial,
            "probabilities": (features @ self.fc.weight.T).softmax(1),
        }


def resize(pictures: Tensor, side: int) -> Tensor:
    """Bilinear to side x side as TensorFlow 1 does: pixel j is read at j * size / side, with no shift by half a pixel.

    Args:
        pictures: float [n, c, h, w].
        side: pixels.
    """
    for dim in (3, 2):
        size = pictures.shape[dim]
        at = torch.arange(side, device=pictures.device) * (size / side)
        low = at.long()
        weight = (at - low).to(pictures.dtype)
        near, far = (pictures.index_select(dim, index.clamp(max=size - 1)) for index in (low, low + 1))
        pictures = torch.lerp(near, far, weight if dim == 3 else weight[:, None])
    return pictures
