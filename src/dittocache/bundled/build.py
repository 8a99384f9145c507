"""Rebuild the bundled models from Debian packages: ``python -m dittocache.bundled.build [glyphs|emoji]``.

Stages, in order: data, judge, train, export, statistics. Packages, pictures and training checkpoints go to the cache
folder (``$DITTOCACHE_CACHE``, else ``~/.cache/dittocache``); what ships goes to a folder of the model's name below
``--output``. A stopped training run continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import build_emoji, build_glyphs, data, train
from .report import write_json

MODELS: dict[str, Any] = {"glyphs": build_glyphs, "emoji": build_emoji}
STAGES = ("data", "judge", "train", "export", "statistics")
PER_CLASS = 40


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dittocache.bundled.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", choices=tuple(MODELS), help="one model only; both by default")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="holds a folder for each model")
    parser.add_argument("--images", type=int, help="training images in all (default: as the shipped model)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of training (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use (%(default)s)")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="pictures per glyph to measure (%(default)s)")
    parser.add_argument("--snapshot-every", type=float, default=10.0, help="minutes between checkpoints (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="train from the start, not from the checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    for name in ("images", "threads", "per_class"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    torch.set_num_threads(options.threads)
    options.progress = lambda items, **settings: tqdm(items, disable=options.quiet, **settings)
    root = options.output
    for model in (options.model,) if options.model else MODELS:
        options.model, options.output = model, root / model
        options.output.mkdir(parents=True, exist_ok=True)
        module = MODELS[model]
        stages = {
            "data": module.build_data, "judge": module.build_judge, "train": build_model, "export": export,
            "statistics": module.measure,
        }  # fmt: skip
        for name in STAGES if options.stage == "all" else (options.stage,):
            try:
                stages[name](options)
            except (RuntimeError, FileNotFoundError) as error:
                print(f"error in stage {name} of {model}: {error}", file=sys.stderr)
                return 1
    return 0


def build_model(options: argparse.Namespace) -> None:
    module = MODELS[options.model]
    pictures = module.training_set()
    if options.restart:
        _checkpoint(options).unlink(missing_ok=True)
    train.train(
        pictures, _checkpoint(options), images=options.images, precision=options.precision,
        save_every=options.snapshot_every * 60,
        on_save=lambda model, _: train.export(model, options.output, module.RECIPE),
        progress=None if options.quiet else tqdm, recipe=module.RECIPE,
    )  # fmt: skip


def export(options: argparse.Namespace) -> None:
    checkpoint, recipe = _checkpoint(options), MODELS[options.model].RECIPE
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint} is missing: run the stage train first")
    model, state = train.load_average(checkpoint, recipe)
    train.export(model, options.output, recipe)
    write_json(options.output / "training.json", state)
    print(f"export: model after {state['images']} images, {state['seconds'] / 60:.0f} minutes, to {options.output}")


def _checkpoint(options: argparse.Namespace) -> Path:
    return data.cache_folder() / f"{options.model}-train.safetensors"


if __name__ == "__main__":
    sys.exit(main())
