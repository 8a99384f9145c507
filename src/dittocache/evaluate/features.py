"""Learned metrics by name: scores of pictures, and features for distances between sets of pictures.

| name | kind | of |
| --- | --- | --- |
| judge | features | the classifier of a bundled model |
| inception | features | the network of FID, sFID and Inception score |
| clip | score | a picture and its prompt |
| lpips | score | a picture and its reference |
| image-reward | score | a picture and its prompt |

Nothing is downloaded here: `check` says, before any work, what is missing and how to get it.

>>> check(["inception", "lpips"])
>>> load("inception")(pictures)["features"]  # [n, 2048]
>>> load("lpips")(pictures, references)  # [n]
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import bundled
from ..bundled.data import cache_folder
from ..bundled.judge import Judge, load_judge
from ..parts import show
from .image_reward import FILES as IMAGE_REWARD_FILES
from .image_reward import ImageReward
from .inception import Inception
from .weights import fill, read

Weights = Mapping[str, "str | Path"]  # name of a metric -> where its weights are

BATCH = 50


# ---- the interface --------------------------------------------------------------------------------------------------
class Metric(ABC):
    """A network that looks at pictures: float [n, 1 or 3, h, w] in [0, 1].

    Attributes:
        name: as it is asked for.
        packages: what must be installed beside the core, in the extra `metrics`.
        default: where the weights are, if nobody says.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    default: ClassVar[str]

    def __init__(self, place: Path, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.network = self.build(place).to(self.device).eval().requires_grad_(False)

    @staticmethod
    @abstractmethod
    def build(place: Path) -> nn.Module:
        """The network with its weights."""

    @classmethod
    @abstractmethod
    def find(cls, place: str | Path) -> Path:
        """The file or folder of the weights.

        Raises:
            ValueError: it is missing; says how to get it.
        """


class Features(Metric):
    """Features of pictures, for distances between sets."""

    @torch.no_grad()
    def __call__(self, pictures: Tensor, batch: int = BATCH) -> dict[str, Tensor]:
        """Tensors [n, ...] by name, float32 on the CPU: `features` [n, d] and `probabilities` [n, classes] always."""
        _check(pictures)
        parts = [self.look(part.to(self.device)) for part in pictures.split(batch)]
        return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}

    @abstractmethod
    def look(self, pictures: Tensor) -> dict[str, Tensor]:
        """Features of one batch on the metric's device."""


class Score(Metric):
    """A number per picture.

    Attributes:
        beside: what a picture is scored with, "prompts" or "references".
    """

    beside: ClassVar[str]

    @torch.no_grad()
    def __call__(self, pictures: Tensor, beside: Tensor | Sequence[str], batch: int = BATCH) -> Tensor:
        """Scores float64 [n] on the CPU.

        Args:
            pictures: float [n, 1 or 3, h, w] in [0, 1].
            beside: a prompt for every picture, or references of the same shape, as the metric's `beside` says.
            batch: pictures at once.
        """
        _check(pictures)
        if isinstance(beside, Tensor) != (self.beside == "references") or isinstance(beside, str):
            raise TypeError(f"{self.name} needs {self.beside}, one for every picture; got {type(beside).__name__}")
        if len(beside) != len(pictures):
            raise ValueError(f"{self.name} needs {self.beside} for {len(pictures)} pictures; got {len(beside)}")
        if isinstance(beside, Tensor) and beside.shape != pictures.shape:
            shapes = f"{list(pictures.shape)} and {list(beside.shape)}"
            raise ValueError(f"pictures and references share a shape; got {shapes}")
        starts = range(0, len(pictures), batch)
        parts = [self.score(pictures[n : n + batch], beside[n : n + batch]) for n in starts]
        return torch.cat(parts).double().cpu()

    @abstractmethod
    def score(self, pictures: Tensor, beside: Any) -> Tensor:
        """Scores of one batch."""


# ---- features -------------------------------------------------------------------------------------------------------
class JudgeFeatures(Features):
    """The classifier of a bundled model (by name, or a folder with judge.safetensors): 64 features."""

    name = "judge"
    default = "glyphs"
    network: Judge

    @classmethod
    def find(cls, place: str | Path) -> Path:
        if place in bundled.names():
            return bundled.folder(str(place))
        path = Path(place).expanduser()
        if not (path / "judge.safetensors").is_file():
            known = ", ".join(bundled.names())
            raise ValueError(f"judge: {place} is no bundled model ({known}) and no folder with judge.safetensors")
        return path

    @staticmethod
    def build(place: Path) -> nn.Module:
        return load_judge(place)

    def look(self, pictures: Tensor) -> dict[str, Tensor]:
        channels = next(self.network.parameters()).shape[1]
        if pictures.shape[1] != channels:
            raise ValueError(f"this judge reads pictures of {channels} channels; got {pictures.shape[1]}")
        features = self.network.features(pictures.float())
        return {"features": features, "probabilities": self.network.head(features).softmax(1)}


class InceptionFeatures(Features):
    """The network of FID: `features` [n, 2048], `spatial` [n, 2023] for sFID, `probabilities` [n, 1008].

    Pictures are rounded to 256 levels first, as if they had been saved.
    """

    name = "inception"
    default = "weights-inception-2015-12-05-6726825d.pth"
    url = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{default}"

    @classmethod
    def find(cls, place: str | Path) -> Path:
        return _file(cls.name, place, cls.url)

    @staticmethod
    def build(place: Path) -> nn.Module:
        network = Inception()
        fill(network, read(place), place)
        return network

    def look(self, pictures: Tensor) -> dict[str, Tensor]:
        return self.network((_colour(pictures).float() * 255).round())


# ---- scores ---------------------------------------------------------------------------------------------------------
class ClipScore(Score):
    """100 times the cosine between picture and prompt, at least 0 (Hessel et al. 2021); larger is better.

    Weights: a folder of `save_pretrained`, or the name of a CLIP model in the Hugging Face cache.
    """

    name = "clip"
    packages = ("transformers",)
    default = "openai/clip-vit-large-patch14"
    beside = "prompts"

    def __init__(self, place: Path, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPProcessor

        super().__init__(place, device)
        self.processor = CLIPProcessor.from_pretrained(place)

    @classmethod
    def find(cls, place: str | Path) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        path = Path(place).expanduser()
        if not path.is_dir():
            try:
                path = Path(snapshot_download(str(place), local_files_only=True))
            except (HFValidationError, LocalEntryNotFoundError):
                command = f'hf download {place} --exclude "*.h5" "*.msgpack" "*.bin"'
                raise ValueError(_missing(cls.name, place, command)) from None
        if not any((path / file).is_file() for file in ("model.safetensors", "pytorch_model.bin")):
            raise ValueError(f"clip: {path} has no model.safetensors: give the folder of a CLIP model")
        return path

    @staticmethod
    def build(place: Path) -> nn.Module:
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(place)

    def score(self, pictures: Tensor, beside: Any) -> Tensor:
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        inputs = self.processor(images=_pil(pictures), text=list(beside), **options).to(self.device)
        out = self.network(**inputs)
        return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)


class Lpips(Score):
    """Learned perceptual distance to the reference, AlexNet, version 0.1 (Zhang et al. 2018); 0 for equal pictures.

    The network's weights are torchvision's file; what weighs its channels comes with torchmetrics.
    """

    name = "lpips"
    packages = ("torchmetrics",)
    default = "alexnet-owt-7be5be79.pth"
    beside = "references"
    url = f"https://download.pytorch.org/models/{default}"
    smallest = 31  # pixels a side that the network's poolings can take

    @classmethod
    def find(cls, place: str | Path) -> Path:
        return _file(cls.name, place, cls.url)

    @staticmethod
    def build(place: Path) -> nn.Module:
        return LpipsNetwork(place)

    def score(self, pictures: Tensor, beside: Any) -> Tensor:
        if min(pictures.shape[2:]) < self.smallest:
            raise ValueError(f"lpips needs {self.smallest} pixels a side or more; got {list(pictures.shape)}")
        return self.network(*(_colour(side).to(self.device).float() for side in (pictures, beside)))


class LpipsNetwork(nn.Module):
    """Pairs [n, 3, h, w] in [0, 1] -> distances [n]: weighted squared differences of unit-length features."""

    shift: Tensor
    scale: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        relu, pool = nn.ReLU, nn.MaxPool2d
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), relu(),
            pool(3, 2), nn.Conv2d(64, 192, 5, padding=2), relu(),
            pool(3, 2), nn.Conv2d(192, 384, 3, padding=1), relu(),
            nn.Conv2d(384, 256, 3, padding=1), relu(),
            nn.Conv2d(256, 256, 3, padding=1), relu(),
        )  # fmt: skip
        fill(self, read(path), path)
        # mean and deviation that the authors take from pictures in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        for layer, weight in enumerate(_channel_weights()):
            self.register_buffer(f"weight{layer}", weight)

    def forward(self, pictures: Tensor, references: Tensor) -> Tensor:
        pairs = (torch.cat([pictures, references]) * 2 - 1 - self.shift) / self.scale
        total, layer = torch.zeros(len(pictures), device=pairs.device), 0
        for module in self.features:
            pairs = module(pairs)
            if isinstance(module, nn.ReLU):
                a, b = (pairs / (pairs.square().sum(1, keepdim=True) + 1e-8).sqrt()).chunk(2)
                total += ((a - b).square() * self.get_buffer(f"weight{layer}")).sum(1).mean((1, 2))
                layer += 1
        return total


def _channel_weights() -> list[Tensor]:
    """Weights of the channels of AlexNet's five layers, [1, channels, 1, 1] each, as the authors learned them."""
    import torchmetrics.functional.image as image

    tensors = read(Path(image.__file__).parent / "lpips_models" / "alex.pth")
    return [tensors[f"lin{layer}.model.1.weight"] for layer in range(5)]


class ImageRewardScore(Score):
    """What people would think of the picture for its prompt (Xu et al. 2023); larger is better."""

    name = "image-reward"
    packages = ("transformers",)
    default = "image-reward"
    beside = "prompts"

    @classmethod
    def find(cls, place: str | Path) -> Path:
        path = _at(place)
        missing = [file for file in IMAGE_REWARD_FILES if not (path / file).is_file()]
        if missing:
            score, config, words = IMAGE_REWARD_FILES
            command = (
                f"hf download THUDM/ImageReward {score} {config} --local-dir {path} && "
                f"hf download google-bert/bert-base-uncased {words} --local-dir {path}"
            )
            raise ValueError(_missing(cls.name, path / missing[0], command))
        return path

    @staticmethod
    def build(place: Path) -> nn.Module:
        return ImageReward(place)

    def score(self, pictures: Tensor, beside: Any) -> Tensor:
        return self.network(_pil(pictures), beside)


# ---- by name --------------------------------------------------------------------------------------------------------
METRICS: dict[str, type[Metric]] = {
    metric.name: metric for metric in (JudgeFeatures, InceptionFeatures, ClipScore, Lpips, ImageRewardScore)
}


def check(names: Sequence[str], weights: Weights | None = None) -> None:
    """Whether metrics could be loaded: to be called before any work.

    Args:
        names: keys of METRICS.
        weights: file or folder of a metric's weights, by name; by default the metric's own name for it below
            `$DITTOCACHE_CACHE/metrics` (`~/.cache/dittocache/metrics`).

    Raises:
        ValueError: an unknown name, or weights that are missing; the line says how to get them.
        ImportError: a package is missing; the line says how to install it.
    """
    for name in (*names, *(weights or {})):
        if name not in METRICS:
            raise ValueError(f"unknown metric {show(name)}; known: {', '.join(METRICS)}")
    for name in names:
        _find(name, weights)


def load(name: str, weights: Weights | None = None, device: str | torch.device = "cpu") -> Metric:
    """A metric, ready to look at pictures: see `check` for the arguments and for what it raises."""
    check([name], weights)
    return METRICS[name](_find(name, weights), device)


def _find(name: str, weights: Weights | None) -> Path:
    metric = METRICS[name]
    for package in metric.packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{name} needs {package}: pip install 'dittocache[metrics]'")
    return metric.find((weights or {}).get(name, metric.default))


def _at(place: str | Path) -> Path:
    """A place as it is if it exists, else in the cache folder if it is a mere name."""
    path = Path(place).expanduser()
    return path if path.exists() or path.name != str(place) else cache_folder() / "metrics" / path


def _file(name: str, place: str | Path, url: str) -> Path:
    path = _at(place)
    if not path.is_file():
        raise ValueError(_missing(name, path, f"curl -L --create-dirs -o {path} {url}"))
    return path


def _missing(name: str, place: str | Path, command: str) -> str:
    hint = f"or say where they are (weights: {name}=PATH), or set DITTOCACHE_CACHE"
    return f"{name}: no weights at {place}; get them with `{command}`, {hint}"


# ---- pictures -------------------------------------------------------------------------------------------------------
def _check(pictures: Tensor) -> None:
    if pictures.ndim != 4 or not len(pictures) or pictures.shape[1] not in (1, 3) or not pictures.is_floating_point():
        got = f"{str(pictures.dtype)[6:]} {list(pictures.shape)}"
        raise ValueError(f"pictures are float [n, 1 or 3, h, w] with n of at least 1; got {got}")
    low, high = pictures.aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"pictures are in [0, 1]; got values from {low:g} to {high:g}")


def _colour(pictures: Tensor) -> Tensor:
    """Grey pictures with three equal channels."""
    return pictures.expand(-1, 3, -1, -1)


def _pil(pictures: Tensor) -> list[Image.Image]:
    levels = (_colour(pictures).float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]
