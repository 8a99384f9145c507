"""The numbers that papers give for class-conditional ImageNet, as guided-diffusion's evaluator ("ADM") takes them.

FID, sFID, Inception score, precision and recall of 50,000 samples (Dhariwal & Nichol 2021). The facts of the protocol:

- FID compares the 2048 pooled features, sFID the 2023 spatial ones, both with statistics of the whole data set, which
  a reference batch brings along (mu, sigma, mu_s, sigma_s).
- The Inception score is the mean over consecutive parts of 5,000 samples.
- Precision and recall (k = 3) compare the pooled features of all samples with those of the reference batch's pictures
  (arr_0; 10,000 of them for ImageNet). The evaluator takes distances in half precision where they fit, here they are
  in single precision.

The authors' evaluator runs Google's network in TensorFlow; here the same weights run in PyTorch (`inception`). Pictures
come in batches and are forgotten: 50,000 samples take 0.6 GB of features and probabilities.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .. import atomic
from ..parts import check_int
from . import metrics
from .features import Features
from .metrics import Moments

SAMPLES = 50_000
CLASSES = 1000
PART = 5_000  # samples of one part of the Inception score
NEIGHBOURS = 3
PICTURES = "arr_0"
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
BATCH = 50


def labels(count: int = SAMPLES, classes: int = CLASSES, seed: int = 0) -> Tensor:
    """A class for every sample, int64 [count], drawn evenly: label j is the same whoever draws sample j."""
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


# ---- what is kept of a set of pictures ------------------------------------------------------------------------------
class RunningMoments:
    """Count, sum and sum of outer products of features, float64: parts of a set add up in any order."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0  # [d]
        self.outer: Tensor | float = 0.0  # [d, d]

    def add(self, features: Tensor) -> None:
        """Takes in features [n, d]."""
        features = features.double()
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.outer = self.outer + features.T @ features

    def merge(self, other: RunningMoments) -> None:
        """Takes in what another has seen."""
        self.count += other.count
        self.total = self.total + other.total
        self.outer = self.outer + other.outer

    def moments(self) -> Moments:
        """Mean [d] and covariance [d, d], divided by n - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; got {self.count}")
        mean = torch.as_tensor(self.total) / self.count
        return mean, (torch.as_tensor(self.outer) - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass
class Activations:
    """What the five numbers need of a set of pictures.

    The sums do not depend on the order; the parts of the Inception score do, so merge shards in the order of samples.

    Attributes:
        pool: moments of the pooled features. spatial: of the spatial ones.
        features: pooled features, batches of float32 [n, d].
        probabilities: batches of float32 [n, classes].
    """

    pool: RunningMoments = field(default_factory=RunningMoments)
    spatial: RunningMoments = field(default_factory=RunningMoments)
    features: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.pool.count

    def add(self, seen: dict[str, Tensor]) -> None:
        """Takes in what the metric `inception` makes of a batch of pictures."""
        self.pool.add(seen["features"])
        self.spatial.add(seen["spatial"])
        self.features.append(seen["features"])
        self.probabilities.append(seen["probabilities"])

    def merge(self, other: Activations) -> None:
        """Takes in the samples that follow."""
        self.pool.merge(other.pool)
        self.spatial.merge(other.spatial)
        self.features += other.features
        self.probabilities += other.probabilities


def gather(batches: Iterable[Tensor], inception: Features) -> Activations:
    """Looks at pictures, float [n, 3, h, w] in [0, 1] a batch: see `pictures` for those of a file."""
    found = Activations()
    for batch in batches:
        found.add(inception(batch))
    return found


# ---- the reference --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        pool: mean and covariance of the pooled features. spatial: of the spatial ones.
        features: pooled features [m, d] of single pictures; None if the file has none, then there is no precision and
            no recall.
    """

    pool: Moments
    spatial: Moments
    features: Tensor | None


def check_reference(path: str | Path) -> None:
    """Whether a file can serve as reference batch; reads headers only.

    Raises:
        ValueError: it is no npz file, or lacks what is needed, or its arrays are of another shape or type.
    """
    keys = _keys(path)
    found = [key for key in STATISTICS if key in keys]
    if found and len(found) < len(STATISTICS):
        missing = ", ".join(key for key in STATISTICS if key not in keys)
        raise ValueError(f"{path} has {', '.join(found)} but lacks {missing}")
    if not found and PICTURES not in keys:
        raise ValueError(f"{path} has neither {', '.join(STATISTICS)} nor pictures {PICTURES}; it has {_list(keys)}")
    for key in found:
        with _array(path, key) as (_, shape, _, kind):
            if shape != STATISTICS[key] or kind.kind != "f":
                raise ValueError(f"{path}: {key} must be floats {list(STATISTICS[key])}; got {kind} {list(shape)}")
    if PICTURES in keys and count_pictures(path) <= NEIGHBOURS:
        raise ValueError(f"{path}: {PICTURES} needs more than {NEIGHBOURS} pictures; got {count_pictures(path)}")


def read_reference(path: str | Path, inception: Features, batch: int = BATCH) -> Reference:
    """A reference batch: its statistics, or those of its pictures if it has none, and its pictures' features."""
    check_reference(path)
    keys = _keys(path)
    seen = gather(pictures(path, batch), inception) if PICTURES in keys else None
    features = None if seen is None else torch.cat(seen.features)
    if seen is not None and "mu" not in keys:
        return Reference(seen.pool.moments(), seen.spatial.moments(), features)
    with np.load(path, allow_pickle=False) as file:
        mu, sigma, mu_s, sigma_s = (torch.from_numpy(file[key]).double() for key in STATISTICS)
    return Reference((mu, sigma), (mu_s, sigma_s), features)


# ---- the numbers ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Numbers:
    """The five numbers; precision and recall are None without pictures in the reference batch.

    Comparable with those of papers only for 50,000 samples.
    """

    fid: float
    sfid: float
    inception_score: float
    precision: float | None
    recall: float | None
    samples: int


def evaluate(samples: Activations, reference: Reference, device: str | torch.device = "cpu") -> Numbers:
    """The five numbers of samples.

    Args:
        samples: more than 3.
        reference: of `read_reference`.
        device: where the distances between all features are taken (10^13 operations for 50,000 samples).
    """
    check_int("the number of samples", len(samples), NEIGHBOURS + 1)
    precision = recall = None
    if reference.features is not None:
        sides = (torch.cat(samples.features).to(device), reference.features.to(device))
        precision, recall = metrics.precision_recall(*sides, k=NEIGHBOURS)
    parts = torch.cat(samples.probabilities).split(PART)
    return Numbers(
        fid=metrics.frechet_distance(samples.pool.moments(), reference.pool),
        sfid=metrics.frechet_distance(samples.spatial.moments(), reference.spatial),
        inception_score=sum(metrics.inception_score(part, splits=1) for part in parts) / len(parts),
        precision=precision,
        recall=recall,
        samples=len(samples),
    )


# ---- files of pictures ----------------------------------------------------------------------------------------------
def count_pictures(path: str | Path) -> int:
    """How many pictures a npz file has under arr_0.

    Raises:
        ValueError: it has none, or they are not uint8 [n, h, w, 3] in C order.
    """
    with _array(path, PICTURES) as (_, shape, fortran, kind):
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            order = " in Fortran order" if fortran else ""
            raise ValueError(f"{path}: {PICTURES} must be uint8 [n, h, w, 3]; got {kind} {list(shape)}{order}")
        return shape[0]


def pictures(path: str | Path, batch: int = BATCH) -> Iterator[Tensor]:
    """The pictures of a npz file, float32 [n, 3, h, w] in [0, 1] a batch; one batch is in memory at a time."""
    count = count_pictures(path)
    with _array(path, PICTURES) as (file, (_, height, width, channels), *_):
        for start in range(0, count, batch):
            size = min(batch, count - start)
            data = file.read(size * height * width * channels)
            levels = np.frombuffer(data, np.uint8).reshape(size, height, width, channels)
            yield torch.from_numpy(levels.astype(np.float32) / 255).permute(0, 3, 1, 2)


def write_pictures(path: str | Path, batches: Iterable[Tensor], count: int) -> None:
    """Writes a sample batch as the authors' evaluator reads it: a npz file with arr_0 uint8 [count, h, w, 3].

    The file appears when it is whole; one batch is in memory at a time.

    Args:
        path: of the npz file.
        batches: float [n, 3, h, w] in [0, 1] each.
        count: pictures of all batches together.

    Raises:
        ValueError: there are more or fewer pictures, or they are not of one size.
    """
    path, written, shape = Path(path), 0, None
    with (
        atomic.replacing(path) as beside,
        zipfile.ZipFile(beside, "w") as archive,
        archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as file,
    ):
        for batch in batches:
            levels = (batch.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            if shape is None:
                shape = levels.shape[1:]
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            written += len(levels)
            if levels.shape[1:] != shape or shape[2] != 3 or written > count:
                raise ValueError(f"wanted {count} pictures of {shape}; got {written}, of {levels.shape[1:]}")
            file.write(levels.tobytes())
        if written != count or shape is None:
            raise ValueError(f"wanted {count} pictures; got {written}")


def _keys(path: str | Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a npz file: {error}") from None


def _list(keys: list[str]) -> str:
    return ", ".join(keys) or "nothing"


@contextmanager
def _array(path: str | Path, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """An array of a npz file, open behind its header, with its shape, whether in Fortran order, and its type."""
    keys = _keys(path)
    if key not in keys:
        raise ValueError(f"{path} lacks {key}; it has {_list(keys)}")
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, kind = read(file)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {key} is damaged: {error}") from None
        yield file, shape, fortran, kind
