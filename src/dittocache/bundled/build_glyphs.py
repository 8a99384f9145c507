"""The stages of `build` that are particular to the glyphs: data, judge and statistics."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ..evaluate import metrics
from . import data, judge
from .pipeline import GlyphsPipeline
from .report import draw, nearest, quantiles, read_copyright, write_json, write_tensors
from .train import GLYPHS as RECIPE

STEPS, GUIDANCE = 50, 1.5  # of the measured pictures
FEWER_STEPS = (25, 17, 10)  # what caching has to beat

__all__ = ["RECIPE", "build_data", "build_judge", "measure", "training_set"]


def build_data(options: argparse.Namespace) -> None:
    train_split, held_out, description = data.build(progress=options.progress)
    data.save(train_split, held_out, description)
    path = options.output / "data.json"
    before = json.loads(path.read_text()) if path.exists() else description
    keys = ("train_sha256", "held_out_sha256")
    if any(before[key] != description[key] for key in keys):
        changed = [k for k in ("pillow", "freetype", "packages") if before[k] != description[k]]
        print(f"data: the pictures differ from those described in {path.name} (changed: {', '.join(changed) or '-'})")
    else:
        print(f"data: {len(train_split.labels)} training and {len(held_out.labels)} held-out pictures, as described")
    write_json(path, description)
    (options.output / "ATTRIBUTION.md").write_text(attribution(data.cache_folder() / "fonts", description))


def training_set() -> data.Split:
    return data.load()[0]


def build_judge(options: argparse.Namespace) -> None:
    train_split, held_out = data.load()
    model = judge.train_judge(train_split, progress=options.progress)
    write_tensors(options.output / "judge.safetensors", model.state_dict())
    print(f"judge: accuracy {_accuracy(model, held_out):.4f} on held-out designs")


def measure(options: argparse.Namespace) -> None:
    """Judge the shipped model: class accuracy, Frechet distances and nearest training pictures."""
    train_split, held_out = data.load()
    scale = judge.load_judge(options.output)
    pipe = GlyphsPipeline.from_pretrained(str(options.output), local_files_only=True, low_cpu_mem_usage=False)
    classes = len(data.CHARACTERS)
    labels = torch.arange(classes).repeat(options.per_class)
    drawn = draw(pipe, labels.tolist(), STEPS, GUIDANCE, options.progress)

    fewer = {str(n): draw(pipe, labels[:72].tolist(), n, GUIDANCE, options.progress) for n in FEWER_STEPS}

    rng = np.random.default_rng(0)

    def sample(split: data.Split) -> torch.Tensor:
        """As many pictures of each class as were drawn, shape [n, 1, 32, 32]."""
        rows = [rng.choice(np.flatnonzero(split.labels == c), options.per_class, replace=False) for c in range(classes)]
        return judge.to_pictures(split.pictures[np.concatenate(rows)])

    real_train, real_held_out = (judge.to_pictures(s.pictures) for s in (train_split, held_out))
    read, features = judge.read(scale, drawn)
    moments = {name: metrics.moments(judge.read(scale, pictures)[1]) for name, pictures in
               (("train", real_train), ("held_out", real_held_out))}  # fmt: skip
    drawn_moments = metrics.moments(features)
    sample_moments = metrics.moments(judge.read(scale, sample(train_split))[1])
    correct = read == labels
    reference = {
        "pictures": len(labels), "steps": STEPS, "guidance_scale": GUIDANCE,
        "accuracy": round(correct.double().mean().item(), 4),
        "accuracy_per_class": {c: round(correct[labels == i].double().mean().item(), 3)
                               for i, c in enumerate(data.CHARACTERS)},
        "psnr_of_fewer_steps": {n: round(metrics.psnr(pictures, drawn[:72]), 2) for n, pictures in fewer.items()},
        "judge_accuracy_held_out": _accuracy(scale, held_out),
        "judge_accuracy_train": _accuracy(scale, train_split),
        "frechet": {
            "drawn_to_held_out": metrics.frechet_distance(drawn_moments, moments["held_out"]),
            "drawn_to_train": metrics.frechet_distance(drawn_moments, moments["train"]),
            "floor_train_to_held_out": metrics.frechet_distance(moments["train"], moments["held_out"]),
            "floor_train_sample_to_held_out": metrics.frechet_distance(sample_moments, moments["held_out"]),
            "floor_train_sample_to_train": metrics.frechet_distance(sample_moments, moments["train"]),
        },
        "nearest_training_picture_rms": {
            "drawn": quantiles(nearest(drawn, real_train)),
            "held_out": quantiles(nearest(sample(held_out), real_train)),
            "train_to_another": quantiles(nearest(sample(train_split), real_train, skip_self=True)),
        },
    }  # fmt: skip
    write_json(options.output / "reference.json", reference)
    (options.output / "README.md").write_text(card(options.output, reference))
    tensors = {f"{n}.{part}": t for n, pair in moments.items() for part, t in zip(("mean", "covariance"), pair)}
    write_tensors(options.output / "reference.safetensors", tensors)
    summary = {key: reference[key] for key in ("accuracy", "judge_accuracy_held_out", "frechet")}
    print("statistics: " + json.dumps(summary))


def card(folder: Path, reference: dict) -> str:
    """The text of the model card (README.md)."""
    described, state = (json.loads((folder / name).read_text()) for name in ("data.json", "training.json"))
    frechet, near = reference["frechet"], reference["nearest_training_picture_rms"]
    return f"""# glyphs

A small class-conditional diffusion transformer that draws the letters A-Z and the digits 0-9: 32x32 pixels,
grayscale, dark ink on white. It is a test bed for feature caching, not a font tool.

```python
from dittocache import bundled

bundled.load("glyphs")("DITTO", num_inference_steps=50, guidance_scale=1.5).images
```

| | |
| --- | --- |
| network | diffusers' `DiTTransformer2DModel` in pixel space: 8 blocks of width 128, 64 tokens, 2.8 M parameters, float16 |
| diffusion | v-prediction, linear betas 1e-4 to 0.02, 1000 steps; class 36 means "no class" (for guidance) |
| trained on | {described["train_pictures"]} pictures of {described["faces"]} faces from Debian's free fonts ([ATTRIBUTION.md](ATTRIBUTION.md)); {described["held_out_pictures"]} pictures of other designs held out |
| training | {state["images"]} images in {state["seconds"] / 60:.0f} minutes on a CPU ({state["precision"]}), AdamW, averaged weights |
| accuracy of drawn pictures | {reference["accuracy"]:.3f} as read by the judge ({reference["pictures"]} pictures, {reference["steps"]} DDIM steps, guidance {reference["guidance_scale"]}) |
| accuracy of the judge | {reference["judge_accuracy_held_out"]:.3f} on real pictures of designs it never saw |
| Frechet distance to training pictures | {frechet["drawn_to_train"]:.3f}; as many real training pictures: {frechet["floor_train_sample_to_train"]:.3f} |
| Frechet distance to held-out pictures | {frechet["drawn_to_held_out"]:.3f}; as many real training pictures: {frechet["floor_train_sample_to_held_out"]:.3f} |
| distance to the nearest training picture | median {near["drawn"]["median"]:.3f}; held-out pictures {near["held_out"]["median"]:.3f}; a training picture to the next {near["train_to_another"]["median"]:.3f} (RMS of pixels in [0, 1]) |

More figures are in `reference.json`; the judge's features of real pictures (mean and covariance) are in
`reference.safetensors`, the classifier itself in `judge.safetensors`.

Limits: single characters in 32x32 pixels only. O and 0, I and 1 are nearly the same drawing in many faces.

Rebuild: `python -m dittocache.bundled.build glyphs`. The weights are under the licence of dittocache (Apache-2.0).
"""  # noqa: E501


def attribution(fonts: Path, description: dict) -> str:
    """The text of ATTRIBUTION.md, from the packages' Debian copyright files."""
    lines = [
        "# Fonts the bundled `glyphs` model was trained on", "",
        "The model, its judge and the reference statistics were computed from pictures of characters rendered from",
        "the fonts below. No font file and no picture of one is part of this package. Faces: how many were used",
        "after duplicates, ambiguous faces and the surplus of large families were left out.", "",
        "| Debian package | version | faces | licence of the font files | copyright |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for package, version in description["packages"].items():
        faces = description["faces_per_package"][package]
        if faces:
            licence, holders = read_copyright(fonts / "unpacked" / package / "usr/share/doc" / package / "copyright")
            lines.append(f"| {package} | {version} | {faces} | {licence} | {holders.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _accuracy(model: judge.Judge, split: data.Split) -> float:
    found = judge.read(model, judge.to_pictures(split.pictures))[0].numpy()
    return round(float((found == split.labels).mean()), 4)
