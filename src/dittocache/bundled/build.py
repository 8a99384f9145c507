"""Rebuild a bundled model from the Debian fonts: ``python -m dittocache.bundled.build [--stage STAGE]``.

Stages, in order: data, judge, train, export, statistics. Fonts, pictures and the training checkpoint go to the cache
folder (``$DITTOCACHE_CACHE``, else ``~/.cache/dittocache``); what ships goes to ``--output``. A stopped training run
continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..evaluate.metrics import psnr
from . import data, judge, train
from .pipeline import GlyphsPipeline

STAGES = ("data", "judge", "train", "export", "statistics")
STEPS, GUIDANCE = 50, 1.5  # of the measured pictures
FEWER_STEPS = (25, 17, 10)  # what caching has to beat
PER_CLASS = 40


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dittocache.bundled.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "glyphs", help="folder of what ships")
    parser.add_argument("--images", type=int, default=train.IMAGES, help="training images in all (%(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of training (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use (%(default)s)")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="pictures per class to measure (%(default)s)")
    parser.add_argument("--snapshot-every", type=float, default=10.0, help="minutes between checkpoints (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="train from the start, not from the checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    for name in ("images", "threads", "per_class"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    stages = {
        "data": build_data, "judge": build_judge, "train": build_model, "export": export, "statistics": measure,
    }  # fmt: skip
    for name in STAGES if options.stage == "all" else (options.stage,):
        try:
            stages[name](options)
        except (RuntimeError, FileNotFoundError) as error:
            print(f"error in stage {name}: {error}", file=sys.stderr)
            return 1
    return 0


def build_data(options: argparse.Namespace) -> None:
    train_split, held_out, description = data.build(progress=_progress(options))
    data.save(train_split, held_out, description)
    path = options.output / "data.json"
    before = json.loads(path.read_text()) if path.exists() else description
    keys = ("train_sha256", "held_out_sha256")
    if any(before[key] != description[key] for key in keys):
        changed = [k for k in ("pillow", "freetype", "packages") if before[k] != description[k]]
        print(f"data: the pictures differ from those described in {path.name} (changed: {', '.join(changed) or '-'})")
    else:
        print(f"data: {len(train_split.labels)} training and {len(held_out.labels)} held-out pictures, as described")
    _write_json(path, description)
    (options.output / "ATTRIBUTION.md").write_text(attribution(data.cache_folder() / "fonts", description))


def build_judge(options: argparse.Namespace) -> None:
    train_split, held_out = data.load()
    model = judge.train_judge(train_split, progress=_progress(options))
    _write_tensors(options.output / "judge.safetensors", model.state_dict())
    print(f"judge: accuracy {_accuracy(model, held_out):.4f} on held-out designs")


def build_model(options: argparse.Namespace) -> None:
    train_split, _ = data.load()
    if options.restart:
        _checkpoint().unlink(missing_ok=True)
    train.train(
        train_split, _checkpoint(), images=options.images, precision=options.precision,
        save_every=options.snapshot_every * 60, on_save=lambda model, _: train.export(model, options.output),
        progress=None if options.quiet else tqdm,
    )  # fmt: skip


def export(options: argparse.Namespace) -> None:
    if not _checkpoint().exists():
        raise FileNotFoundError(f"{_checkpoint()} is missing: run the stage train first")
    model, state = train.load_average(_checkpoint())
    train.export(model, options.output)
    _write_json(options.output / "training.json", state)
    print(f"export: model after {state['images']} images, {state['seconds'] / 60:.0f} minutes, to {options.output}")


def measure(options: argparse.Namespace) -> None:
    """Judge the shipped model: class accuracy, Frechet distances and nearest training pictures."""
    train_split, held_out = data.load()
    scale = judge.load_judge(options.output)
    pipe = GlyphsPipeline.from_pretrained(str(options.output), local_files_only=True, low_cpu_mem_usage=False)
    classes = len(data.CHARACTERS)
    labels = torch.arange(classes).repeat(options.per_class)
    drawn = draw(pipe, labels.tolist(), _progress(options))

    fewer = {str(n): draw(pipe, labels[:72].tolist(), _progress(options), n) for n in FEWER_STEPS}

    rng = np.random.default_rng(0)

    def sample(split: data.Split) -> torch.Tensor:
        """As many pictures of each class as were drawn, shape [n, 1, 32, 32]."""
        rows = [rng.choice(np.flatnonzero(split.labels == c), options.per_class, replace=False) for c in range(classes)]
        return judge.to_pictures(split.pictures[np.concatenate(rows)])

    real_train, real_held_out = (judge.to_pictures(s.pictures) for s in (train_split, held_out))
    read, features = judge.read(scale, drawn)
    moments = {name: judge.moments(judge.read(scale, pictures)[1]) for name, pictures in
               (("train", real_train), ("held_out", real_held_out))}  # fmt: skip
    drawn_moments = judge.moments(features)
    sample_moments = judge.moments(judge.read(scale, sample(train_split))[1])
    correct = read == labels
    reference = {
        "pictures": len(labels), "steps": STEPS, "guidance_scale": GUIDANCE,
        "accuracy": round(correct.double().mean().item(), 4),
        "accuracy_per_class": {c: round(correct[labels == i].double().mean().item(), 3)
                               for i, c in enumerate(data.CHARACTERS)},
        "psnr_of_fewer_steps": {n: round(psnr(pictures, drawn[:72]), 2) for n, pictures in fewer.items()},
        "judge_accuracy_held_out": _accuracy(scale, held_out),
        "judge_accuracy_train": _accuracy(scale, train_split),
        "frechet": {
            "drawn_to_held_out": judge.frechet_distance(drawn_moments, moments["held_out"]),
            "drawn_to_train": judge.frechet_distance(drawn_moments, moments["train"]),
            "floor_train_to_held_out": judge.frechet_distance(moments["train"], moments["held_out"]),
            "floor_train_sample_to_held_out": judge.frechet_distance(sample_moments, moments["held_out"]),
            "floor_train_sample_to_train": judge.frechet_distance(sample_moments, moments["train"]),
        },
        "nearest_training_picture_rms": {
            "drawn": _quantiles(nearest(drawn, real_train)),
            "held_out": _quantiles(nearest(sample(held_out), real_train)),
            "train_to_another": _quantiles(nearest(sample(train_split), real_train, skip_self=True)),
        },
    }  # fmt: skip
    _write_json(options.output / "reference.json", reference)
    (options.output / "README.md").write_text(card(options.output, reference))
    tensors = {f"{n}.{part}": t for n, pair in moments.items() for part, t in zip(("mean", "covariance"), pair)}
    _write_tensors(options.output / "reference.safetensors", tensors)
    summary = {key: reference[key] for key in ("accuracy", "judge_accuracy_held_out", "frechet")}
    print("statistics: " + json.dumps(summary))


def draw(pipe: GlyphsPipeline, labels: list[int], progress: Any, steps: int = STEPS) -> torch.Tensor:
    """Pictures [n, 1, 32, 32] in [0, 1]; picture i comes from seed i."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in progress(range(0, len(labels), 72), desc="draw"):
        chosen = labels[start : start + 72]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chosen))]
        (images,) = pipe(chosen, steps, GUIDANCE, generators, output_type="pt", return_dict=False)
        parts.append(images)
    return torch.cat(parts)


def nearest(pictures: torch.Tensor, train_pictures: torch.Tensor, skip_self: bool = False) -> torch.Tensor:
    """Root mean square pixel difference [n] to the nearest training picture, pixels in [0, 1].

    With `skip_self` an exact copy does not count (for pictures that come from the training set).
    """
    others = train_pictures.flatten(1)
    found = []
    for part in pictures.flatten(1).split(256):
        distances = torch.cdist(part, others, compute_mode="use_mm_for_euclid_dist")
        if skip_self:
            distances[distances < 0.05] = torch.inf  # cdist's rounding leaves copies near, not at, zero
        found.append(distances.min(1).values)
    return torch.cat(found) / pictures[0].numel() ** 0.5


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

Rebuild: `python -m dittocache.bundled.build`. The weights are under the licence of dittocache (Apache-2.0).
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


def read_copyright(path: Path) -> tuple[str, str]:
    """(licence, copyright holders) of a package's own files, from its debian/copyright."""
    text = path.read_text(encoding="utf-8", errors="replace")
    stanza = re.search(r"^Files:\s*\*\s*$.*?(?=^Files:|\Z)", text, re.M | re.S)
    if stanza:
        named = re.search(r"^License:\s*(.+)$", stanza[0], re.M)
        licence = named[1].strip() if named else ""
        field = re.search(r"^Copyright:(.*?)(?=^\S|\Z)", stanza[0], re.M | re.S)
        holders = field[1].split("\n") if field else []
    else:  # older files are prose
        found = re.search(r"SIL Open Font License,? Version ([\d.]+\d)", text)
        licence = f"OFL-{found[1]}" if found else ""
        holders = re.findall(r"^.*Copyright \([cC]\).*$", text, re.M)[:3]
    licence = re.sub(r"\b(SIL-OFL|SIL Open Font License|Open Font License|SIL|OFL)\b(?! *[-\d])", "OFL-1.1", licence)
    licence = licence.replace("Open Font License 1.0", "OFL-1.0").replace("SIL-OFL", "OFL").replace("SIL-1", "OFL-1")
    licence = licence.replace("|", " or ")
    if not licence or ("GPL" in licence):
        raise RuntimeError(f"{path} names no licence that the bundled data may use: {licence!r}")
    return licence, "; ".join(h.strip() for h in holders if h.strip(" ."))


def _accuracy(model: judge.Judge, split: data.Split) -> float:
    found = judge.read(model, judge.to_pictures(split.pictures))[0].numpy()
    return round(float((found == split.labels).mean()), 4)


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    return {n: round(values.quantile(q).item(), 5) for n, q in (("median", 0.5), ("5%", 0.05), ("1%", 0.01))}


def _checkpoint() -> Path:
    return data.cache_folder() / "glyphs-train.safetensors"


def _progress(options: argparse.Namespace) -> Any:
    return lambda items, **settings: tqdm(items, disable=options.quiet, **settings)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes files that only their owner may read


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
