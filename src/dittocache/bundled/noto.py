"""Pictures and names of the emoji in Debian's Noto Color Emoji font.

Pictures come from the font's bitmap table (CBDT, 136x128), names and order from Unicode's emoji-test.txt, keywords from
the CLDR annotations. Skin tone variants are left out. Pictures are uint8 arrays [emoji, VARIANTS, 16, 16, 3] on white.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL
from PIL import Image

from .data import cache_folder, fetch_fonts
from .text import words

PACKAGES = ("fonts-noto-color-emoji", "unicode-data", "unicode-cldr-core")
SIZE = 16  # pixels a side
SUPERSAMPLING = 8  # bitmaps are moved at 8x, then averaged down
EXTENT = 15.0  # pixels of the font's 136 pixel cell, before the random shift and scale
VARIANTS = 8  # pictures per emoji: the plain one, then shifted and scaled ones
# The vocabulary: the emoji of Unicode 6.0, without the buttons and arrows. All 1,861 want ten times the training.
LATEST = 0.6  # emoji version
LEFT_OUT = ("Symbols",)  # groups
HELD_OUT = 60  # of all emoji whose names are new combinations of known words
SEED = 0


@dataclass(frozen=True)
class Emoji:
    character: str
    name: str
    group: str
    keywords: tuple[str, ...]
    held_out: bool = False
    version: float = 0.0


class EmojiSet(NamedTuple):
    """Emoji and their pictures uint8 [n, VARIANTS, 16, 16, 3]."""

    emoji: list[Emoji]
    pictures: np.ndarray

    def part(self, held_out: bool) -> EmojiSet:
        """The held-out emoji, or the others."""
        rows = [i for i, e in enumerate(self.emoji) if e.held_out == held_out]
        return EmojiSet([self.emoji[i] for i in rows], self.pictures[rows])


def read_names(unpacked: Path) -> list[Emoji]:
    """All fully qualified emoji without a skin tone, in Unicode's order, with their CLDR keywords."""
    names, annotations = (unpacked / p / "usr/share/unicode" for p in PACKAGES[1:])
    keywords: dict[str, tuple[str, ...]] = {}
    for file in ("annotations/en.xml", "annotationsDerived/en.xml"):
        for node in ElementTree.parse(annotations / "cldr/common" / file).iter("annotation"):
            if node.get("type") is None and node.text:
                keywords[node.attrib["cp"]] = tuple(part.strip() for part in node.text.split("|"))
    found, group = [], ""
    for line in (names / "emoji/emoji-test.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        match = re.match(r"([0-9A-F ]+?) +; fully-qualified +# \S+ E([\d.]+) (.+)", line)
        if match and "skin tone" not in match[3]:
            character = "".join(chr(int(code, 16)) for code in match[1].split())
            described = keywords.get(character.replace("\ufe0f", ""), ())
            found.append(Emoji(character, match[3], group, described, version=float(match[2])))
    return found


def hold_out(emoji: Sequence[Emoji], count: int = HELD_OUT) -> set[str]:
    """Names to keep from training: new combinations of known words, one word away from one not chosen before.

    Each of their words is in at least two other names that stay ("woman walking", with "man walking" and many a
    "woman"). Flags are left alone (a country's colours cannot be combined). In the order of the sha256 of the names.
    """
    used = Counter(word for e in emoji for word in set(words(e.name)))
    names = {e.name: words(e.name) for e in emoji}
    chosen: set[str] = set()
    for e in sorted(emoji, key=lambda e: hashlib.sha256(e.name.encode()).hexdigest()):
        mine = names[e.name]
        if e.group == "Flags" or len(mine) < 2 or any(used[word] < 3 for word in set(mine)):
            continue
        stay = (other for name, other in names.items() if name not in chosen and len(other) == len(mine))
        if any(sum(a != b for a, b in zip(mine, other)) == 1 for other in stay):
            chosen.add(e.name)
            used.subtract(set(mine))
        if len(chosen) == count:
            break
    return chosen


def vocabulary(emoji: Sequence[Emoji]) -> list[Emoji]:
    """The emoji to train on, up to version `LATEST` and without the groups `LEFT_OUT`, and those to hold out.

    The latter are chosen among all emoji, so that a larger vocabulary keeps the same ones from training; of them those
    remain, of any version, all of whose words are in names to train on.
    """
    away = hold_out(emoji)
    listed = [e for e in emoji if e.group not in LEFT_OUT]
    known = {word for e in listed if e.version <= LATEST and e.name not in away for word in words(e.name)}
    return [
        replace(e, held_out=e.name in away)
        for e in listed
        if (known.issuperset(words(e.name)) if e.name in away else e.version <= LATEST)
    ]


def read_bitmaps(font_path: Path, emoji: Sequence[Emoji]) -> Iterator[Image.Image]:
    """The font's picture of each emoji, RGBA, 136x128 pixels."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        raise RuntimeError("rebuilding the data needs fontTools: pip install 'dittocache[build]'") from None
    font = TTFont(font_path)
    glyph_of, strike = font.getBestCmap(), font["CBDT"].strikeData[0]
    ligatures: dict[tuple[str, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else ():
            for first, entries in table.ligatures.items():
                ligatures |= {(first, *entry.Component): entry.LigGlyph for entry in entries}
    for e in emoji:
        glyphs = tuple(glyph_of.get(ord(c), "") for c in e.character if c != "\ufe0f")
        glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs, "")
        if glyph not in strike:
            raise RuntimeError(f"{font_path.name} has no picture of {e.name!r}: fonts and unicode-data do not match")
        yield Image.open(io.BytesIO(strike[glyph].imageData)).convert("RGBA")


def place(bitmap: Image.Image, scale: float = 1.0, shift: Sequence[float] = (0.0, 0.0)) -> np.ndarray:
    """A bitmap over white, uint8 [16, 16, 3]; scaled about the centre, then moved by `shift` pixels."""
    side = SIZE * SUPERSAMPLING
    factor = SUPERSAMPLING * EXTENT * scale / max(bitmap.size)
    centre = np.array(bitmap.size) / 2 - (side / 2 + SUPERSAMPLING * np.array(shift)) / factor
    coefficients = (1 / factor, 0.0, float(centre[0]), 0.0, 1 / factor, float(centre[1]))
    # With the alpha multiplied in (mode "RGBa") the transparent pixels' colour cannot bleed into the edges.
    layer = bitmap.convert("RGBa").transform(
        (side, side), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC
    )
    white = Image.new("RGBA", layer.size, "white")
    return np.asarray(Image.alpha_composite(white, layer.convert("RGBA")).convert("RGB").reduce(SUPERSAMPLING))


def variants(bitmap: Image.Image, seed: int) -> np.ndarray:
    """uint8 [VARIANTS, 16, 16, 3]: the plain picture, then scales 0.94 to 1.03 and shifts of up to half a pixel."""
    rng = np.random.default_rng(seed)
    moved = [place(bitmap, rng.uniform(0.94, 1.03), rng.uniform(-0.5, 0.5, 2).tolist()) for _ in range(VARIANTS - 1)]
    return np.stack([place(bitmap), *moved])


def build(folder: Path | None = None, progress: Callable[..., Any] = lambda items, **_: items) -> tuple[EmojiSet, dict]:
    """Read and render everything; returns the emoji and a description. `progress` wraps the loop (tqdm)."""
    fonts = (folder or cache_folder()) / "fonts"
    versions = fetch_fonts(fonts, PACKAGES)
    root = fonts / "unpacked"
    listed = read_names(root)
    bitmaps = read_bitmaps(root / PACKAGES[0] / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", listed)
    unique: dict[bytes, tuple[Emoji, Image.Image]] = {}
    for e, bitmap in zip(listed, bitmaps):  # some flags are one picture under two names: the first counts
        unique.setdefault(hashlib.sha256(bitmap.tobytes()).digest(), (e, bitmap))
    bitmap_of = {e.name: bitmap for e, bitmap in unique.values()}
    emoji = vocabulary([e for e, _ in unique.values()])
    pictures = np.stack([
        variants(bitmap_of[e.name], int(hashlib.sha256(f"{SEED}/{e.name}".encode()).hexdigest()[:16], 16))
        for e in progress(emoji, desc="render")
    ])  # fmt: skip
    away = [e.name for e in emoji if e.held_out]
    description = {
        "latest_version": LATEST, "groups_left_out": LEFT_OUT, "size": SIZE, "variants": VARIANTS,
        "seed": SEED, "emoji_listed": len(listed), "emoji": len(emoji),
        "train_emoji": len(emoji) - len(away), "held_out": sorted(away),
        "pictures_sha256": hashlib.sha256(pictures.tobytes()).hexdigest(),
        "names_sha256": hashlib.sha256("\n".join(e.name for e in emoji).encode()).hexdigest(),
        "packages": versions, "pillow": PIL.__version__,
    }  # fmt: skip
    return EmojiSet(emoji, pictures), description


def save(data: EmojiSet, folder: Path | None = None) -> Path:
    path = (folder or cache_folder()) / "emoji-data.npz"
    np.savez_compressed(path, pictures=data.pictures)
    path.with_suffix(".json").write_text(json.dumps([asdict(e) for e in data.emoji], ensure_ascii=False) + "\n")
    return path


def write_index(emoji: Sequence[Emoji], folder: Path) -> None:
    """The list that ships, `index.json`: character, name, group and whether held out, in the judge's order."""
    rows = (json.dumps([e.character, e.name, e.group, e.held_out], ensure_ascii=False) for e in emoji)
    (folder / "index.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def read_index(folder: Path) -> list[Emoji]:
    """What `write_index` wrote, without keywords."""
    rows = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [Emoji(character, name, group, (), held_out) for character, name, group, held_out in rows]


def load(folder: Path | None = None) -> EmojiSet:
    """What `save` wrote."""
    path = (folder or cache_folder()) / "emoji-data.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m dittocache.bundled.build emoji --stage data` first")
    entries = json.loads(path.with_suffix(".json").read_text())
    with np.load(path, allow_pickle=False) as arrays:
        return EmojiSet([Emoji(**{**e, "keywords": tuple(e["keywords"])}) for e in entries], arrays["pictures"])
