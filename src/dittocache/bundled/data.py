"""Pictures of the 36 characters A-Z and 0-9, rendered from free Debian fonts.

The fonts are fetched with ``apt-get download`` and unpacked (not installed) with ``dpkg -x`` into the cache folder.
Pictures are uint8 arrays [n, 32, 32], dark ink (0) on white (255); labels are int64 [n], 0 = "A" ... 35 = "9".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, features

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIZE = 32  # pixels a side
SUPERSAMPLING = 4  # glyphs are drawn and warped at 4x, then averaged down
GLYPH_HEIGHT, GLYPH_MAX_WIDTH = 22, 27  # pixels, before the random affine map
VARIANTS = 4  # pictures per face and character
FACES_PER_FAMILY = 16  # the largest families (40 weights and widths) would otherwise dominate
HELD_OUT_DESIGNS = 15
AMBIGUOUS = 0.15  # relative ink difference below which a face's I and 1, or O and 0, are taken for one drawing
SEED = 0

# OFL, Apache, Bitstream Vera, MIT, BSD or public domain only. Left out on purpose: fonts-b612 and fonts-jura (mixed
# licences), fonts-liberation (the same outlines as fonts-liberation2).
_PACKAGES = """
3270 anonymous-pro averia-gwf averia-sans-gwf averia-serif-gwf bebas-neue blankenburg breip bwht cabin cantarell
comfortaa courier-prime croscore crosextra-caladea crosextra-carlito dancingscript dejavu-core dejavu-extra dosis
ebgaramond ebgaramond-extra eurofurence fantasque-sans fanwood firacode gfs-didot gfs-neohellenic go
goudybookletter hack havana inconsolata inter jetbrains-mono junction karla lato league-mono leckerli-one
liberation2 lindenhill lobster lobstertwo monoid mononoki national-park noto-core noto-mono oldstandard open-sans
opendin play prociono quicksand radisnoir roboto-slab roboto-unhinted sil-andika sil-charis sil-gentium
sil-gentium-basic tuffy vollkorn yanone-kaffeesatz
"""
PACKAGES = tuple(f"fonts-{name}" for name in _PACKAGES.split())
# Families that are redrawings of another one: they must not sit on both sides of the train / held-out split.
SAME_DESIGN = {
    "arimo": "liberation", "tinos": "liberation", "cousine": "liberation", "carlito": "lato", "hack": "dejavu",
    "gentiumalt": "gentium", "unifur": "eurofurence", "monoisome": "monoid",
}  # fmt: skip
SKIPPED_FAMILIES = re.compile(r"Math|Symbols|Nushu")  # not text faces


class Split(NamedTuple):
    """Pictures uint8 [n, 32, 32] (or [n, side, side, 3], in colour) and labels int64 [n]."""

    pictures: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Face:
    package: str
    file: str  # path below the package's unpacked folder
    family: str  # as in the font's name table
    design: str  # what the train / held-out split is made by


def cache_folder() -> Path:
    """Where fonts, arrays and checkpoints live: ``$DITTOCACHE_CACHE``, else ``~/.cache/dittocache``."""
    return Path(os.environ.get("DITTOCACHE_CACHE") or Path.home() / ".cache" / "dittocache")


def fetch_fonts(folder: Path, packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Download and unpack the font packages that `folder` lacks; returns package -> version."""
    archives, unpacked = folder / "deb", folder / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    versions = {}
    missing = [p for p in packages if not any(archives.glob(f"{p}_*.deb"))]
    if missing:
        for tool in ("apt-get", "dpkg"):
            if shutil.which(tool) is None:
                raise RuntimeError(
                    f"{tool} was not found: the fonts come from Debian packages, so rebuilding the data needs Debian "
                    f"or Ubuntu (or fill {archives} with the .deb files by hand). Using the bundled model does not."
                )
        done = subprocess.run(["apt-get", "download", *missing], cwd=archives, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                "apt-get download failed (is the package list fresh? try `apt-get update`): "
                + (done.stderr.strip().splitlines() or ["no message"])[-1]
            )
    for package in packages:
        archive = sorted(archives.glob(f"{package}_*.deb"))[-1]
        versions[package] = archive.name.split("_")[1].replace("%3a", ":")
        target = unpacked / package
        if not target.exists():
            partial = target.with_name(package + ".part")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            done = subprocess.run(["dpkg", "-x", str(archive), str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"dpkg could not unpack {archive} (delete it and try again): {done.stderr.strip()}")
            partial.rename(target)
    return versions


def find_faces(folder: Path) -> list[Face]:
    """Faces that contain all 36 characters, at most `FACES_PER_FAMILY` of a family, in a fixed order."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        raise RuntimeError("rebuilding the data needs fontTools: pip install 'dittocache[build]'") from None

    families: dict[str, list[Face]] = defaultdict(list)
    for package in PACKAGES:
        root = folder / "unpacked" / package
        for path in sorted(p for p in root.rglob("*.[ot]tf") if p.is_file()):
            font = TTFont(path, lazy=True)
            family = font["name"].getDebugName(16) or font["name"].getDebugName(1)
            if SKIPPED_FAMILIES.search(family) or not all(ord(c) in font.getBestCmap() for c in CHARACTERS):
                continue
            first = re.split(r"[\s_]", family.lower())[0]
            face = Face(package, path.relative_to(root).as_posix(), family, SAME_DESIGN.get(first, first))
            families[family].append(face)
    chosen = []
    for faces in families.values():
        chosen += sorted(faces, key=lambda f: _digest(f.file))[:FACES_PER_FAMILY]
    return sorted(chosen, key=lambda f: (f.package, f.file))


def held_out_designs(faces: Iterable[Face]) -> list[str]:
    """The designs kept for testing: the 15 whose names have the smallest sha256."""
    return sorted(sorted({f.design for f in faces}, key=_digest)[:HELD_OUT_DESIGNS])


def draw_character(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Ink mask (white on black) at 4x with the glyph centred and as tall as a capital; None where there is no ink."""
    side = SIZE * SUPERSAMPLING
    box = font.getbbox(character)
    width, height = int(box[2] - box[0]), int(box[3] - box[1])
    if width < 1 or height < 1:
        return None
    glyph = Image.new("L", (width, height), 0)
    ImageDraw.Draw(glyph).text((-box[0], -box[1]), character, font=font, fill=255)
    ink = glyph.getbbox()
    if ink is None:
        return None
    glyph = glyph.crop(ink)
    # Old-style figures are small in their font: every glyph is scaled to cap height by itself.
    scale = SUPERSAMPLING * min(GLYPH_HEIGHT / glyph.height, GLYPH_MAX_WIDTH / glyph.width)
    glyph = glyph.resize(
        (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.LANCZOS
    )
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return canvas


def warp(mask: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Random small affine map and reduction to 32x32: rotation +-8 deg, shear +-0.1, scale +-8 %, shift +-1.5 px."""
    angle, shear, scale = np.radians(rng.uniform(-8, 8)), rng.uniform(-0.1, 0.1), rng.uniform(0.92, 1.08)
    shift = rng.uniform(-1.5, 1.5, 2) * SUPERSAMPLING
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(scale * rotation @ np.array([[1.0, shear], [0.0, 1.0]]))
    centre = np.full(2, mask.width / 2)
    offset = centre - inverse @ (centre + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    moved = mask.transform(mask.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC)
    return 255 - np.asarray(moved.reduce(SUPERSAMPLING))


def render_face(path: Path, seed: int) -> tuple[np.ndarray, str] | None:
    """Pictures [36, VARIANTS, 32, 32] and a hash of the unwarped glyphs; None for faces that cannot be read.

    Those lack the ink of a character, or draw I and 1 or O and 0 alike (nobody could tell the classes apart).
    """
    font = ImageFont.truetype(str(path), 160, layout_engine=ImageFont.Layout.BASIC)
    masks = [m for m in (draw_character(font, c) for c in CHARACTERS) if m is not None]
    if len(masks) < len(CHARACTERS):
        return None
    plain = np.stack([np.asarray(m.reduce(SUPERSAMPLING)) for m in masks])
    if any(_difference(plain, *pair) < AMBIGUOUS for pair in ("I1", "O0")):
        return None
    fingerprint = hashlib.sha256(plain.tobytes()).hexdigest()
    rng = np.random.default_rng(seed)
    return np.stack([np.stack([warp(m, rng) for _ in range(VARIANTS)]) for m in masks]), fingerprint


def build(
    folder: Path | None = None, progress: Callable[..., Any] = lambda items, **_: items
) -> tuple[Split, Split, dict]:
    """Render everything; returns (train, held_out, description). `progress` wraps the loop over faces (tqdm)."""
    folder = folder or cache_folder()
    fonts = folder / "fonts"
    versions = fetch_fonts(fonts)
    faces = find_faces(fonts)
    held_out = held_out_designs(faces)  # some of them may lose all their faces below
    seen, used = set(), []
    pictures: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for face in progress(faces, desc="render"):
        # The seed belongs to the face, so that a package more or less leaves the other pictures alone.
        seed = int(_digest(f"{SEED}/{face.package}/{face.file}")[:16], 16)
        rendered = render_face(fonts / "unpacked" / face.package / face.file, seed)
        if rendered is None or rendered[1] in seen:
            continue
        seen.add(rendered[1])
        used.append(face)
        pictures[face.design in held_out].append(rendered[0])
    train, test = (_split(pictures[side]) for side in (False, True))
    description = {
        "characters": CHARACTERS, "size": SIZE, "variants": VARIANTS, "seed": SEED,
        "faces": len(used), "families": len({f.family for f in used}), "designs": len({f.design for f in used}),
        "held_out_designs": sorted({f.design for f in used if f.design in held_out}),
        "held_out_families": sorted({f.family for f in used if f.design in held_out}),
        "train_pictures": len(train.labels), "held_out_pictures": len(test.labels),
        "train_sha256": _array_digest(train), "held_out_sha256": _array_digest(test),
        "faces_per_package": {p: sum(f.package == p for f in used) for p in PACKAGES},
        "packages": versions,
        "pillow": PIL.__version__, "freetype": features.version("freetype2"),
    }  # fmt: skip
    return train, test, description


def save(train: Split, test: Split, description: dict, folder: Path | None = None) -> Path:
    path = (folder or cache_folder()) / "glyphs-data.npz"
    np.savez_compressed(
        path, train=train.pictures, train_labels=train.labels, test=test.pictures, test_labels=test.labels
    )
    path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")
    return path


def load(folder: Path | None = None) -> tuple[Split, Split]:
    """(train, held_out) as written by `save`."""
    path = (folder or cache_folder()) / "glyphs-data.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m dittocache.bundled.build --stage data` first")
    with np.load(path, allow_pickle=False) as arrays:
        return Split(arrays["train"], arrays["train_labels"]), Split(arrays["test"], arrays["test_labels"])


def to_model_range(pictures: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32] -> float32 [n, 1, 32, 32] in [-1, 1]."""
    return (pictures.astype(np.float32) / 127.5 - 1.0)[:, None]


def _split(faces: list[np.ndarray]) -> Split:
    stacked = np.stack(faces)  # [faces, 36, VARIANTS, 32, 32]
    labels = np.broadcast_to(np.arange(len(CHARACTERS))[None, :, None], stacked.shape[:3])
    return Split(stacked.reshape(-1, SIZE, SIZE), labels.reshape(-1).copy())


def _difference(plain: np.ndarray, a: str, b: str) -> float:
    first, second = (plain[CHARACTERS.index(c)].astype(float) for c in (a, b))
    return float(np.abs(first - second).sum() / min(first.sum(), second.sum()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _array_digest(split: Split) -> str:
    return hashlib.sha256(split.pictures.tobytes() + split.labels.astype("<i8").tobytes()).hexdigest()
