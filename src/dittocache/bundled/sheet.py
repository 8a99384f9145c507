"""Draw the picture of the documentation: ``python -m dittocache.bundled.sheet FILE.png`` (needs the stage data).

Above, emoji drawn from names the model was trained on; below, from names that were kept from it, over the real
pictures. Nothing is picked by hand: the names are fixed, and picture i comes from seed i.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import load, noto
from .build_emoji import GUIDANCE, STEPS
from .report import draw

ZOOM, COLUMNS, MARGIN = 6, 10, 12
SIDE = noto.SIZE * ZOOM
TRAINED = (
    "smiling face with heart-eyes", "face with tears of joy", "red heart", "cat face", "dog face", "panda", "octopus",
    "tulip", "strawberry", "pizza", "rocket", "sun", "rainbow", "guitar", "soccer ball", "fire", "Christmas tree",
    "house with garden", "flag: Japan", "hamburger",
)  # fmt: skip
HELD_OUT = 10  # of the held-out names, evenly spread over the list


def sheet() -> Image.Image:
    """The picture, RGB."""
    pipe, data = load("emoji"), noto.load()
    held_out = [e.name for e in data.emoji if e.held_out]
    chosen = held_out[:: len(held_out) // HELD_OUT][:HELD_OUT]
    real = {e.name: picture[0] for e, picture in zip(data.emoji, data.pictures)}
    images = draw(pipe, [*TRAINED, *chosen], STEPS, GUIDANCE, lambda items, **_: items)
    drawn = [np.asarray(p) for p in (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)]
    known, new = drawn[: len(TRAINED)], drawn[len(TRAINED) :]
    parts = [
        _title("Drawn from names it was trained on"),
        *(_row(known[i : i + COLUMNS], TRAINED[i : i + COLUMNS]) for i in range(0, len(known), COLUMNS)),
        _title("Drawn from names it never saw: new combinations of known words"),
        _row(new, chosen),
        _title("The real pictures of those names"),
        _row([real[name] for name in chosen], [""] * len(chosen)),
    ]
    page = Image.new("RGB", (parts[0].width, sum(p.height for p in parts) + MARGIN), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def _title(text: str) -> Image.Image:
    strip = Image.new("RGB", (MARGIN + COLUMNS * (SIDE + MARGIN), 40), "white")
    ImageDraw.Draw(strip).text((MARGIN, 14), text, font=ImageFont.load_default(17), fill="#333333")
    return strip


def _row(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    lines = [textwrap.wrap(caption, 15) for caption in captions]
    below = 16 * max(len(wrapped) for wrapped in lines)
    strip = Image.new("RGB", (MARGIN + COLUMNS * (SIDE + MARGIN), SIDE + below + MARGIN), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    for i, (picture, wrapped) in enumerate(zip(pictures, lines)):
        left = MARGIN + i * (SIDE + MARGIN)
        strip.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, 0))
        for j, line in enumerate(wrapped):
            pen.text((left + SIDE / 2, SIDE + 6 + 16 * j), line, font=font, fill="#555555", anchor="mt")
    return strip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dittocache.bundled.sheet", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="PNG file to write")
    try:
        sheet().save(parser.parse_args(arguments).file)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
