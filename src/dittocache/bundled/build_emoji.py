"""The stages of `build` that are particular to the emoji: data, judge and statistics."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from ..evaluate.metrics import psnr
from . import judge, noto
from .data import Split
from .pipeline import EmojiPipeline
from .report import draw, nearest, quantiles, write_json, write_tensors
from .train import EMOJI as RECIPE

STEPS, GUIDANCE = 50, 2.0  # of the measured pictures
FEWER_STEPS = (25, 17, 10)  # what caching has to beat
HELD_OUT_EACH = 8  # measured pictures of every held-out name; one of every trained name
JUDGE_EPOCHS = 24

__all__ = ["RECIPE", "build_data", "build_judge", "measure", "training_set"]


def build_data(options: argparse.Namespace) -> None:
    emoji, description = noto.build(progress=options.progress)
    noto.save(emoji)
    path = options.output / "data.json"
    before = json.loads(path.read_text()) if path.exists() else description
    if any(before[key] != description[key] for key in ("pictures_sha256", "names_sha256")):
        changed = [k for k in ("pillow", "packages") if before[k] != description[k]]
        print(f"data: the emoji differ from those described in {path.name} (changed: {', '.join(changed) or '-'})")
    else:
        print(f"data: {description['train_emoji']} training and {len(description['held_out'])} held-out emoji")
    write_json(path, description)
    noto.write_index(emoji.emoji, options.output)
    (options.output / "ATTRIBUTION.md").write_text(attribution(description), encoding="utf-8")


def training_set() -> noto.EmojiSet:
    return noto.load().part(held_out=False)


def build_judge(options: argparse.Namespace) -> None:
    """Trained on the shifted pictures of all emoji, the held-out ones too: it has to know them when it sees them."""
    pictures = noto.load().pictures
    labels = np.repeat(np.arange(len(pictures)), pictures.shape[1] - 1)
    shifted = Split(pictures[:, 1:].reshape(-1, *pictures.shape[2:]), labels)
    model = judge.train_judge(shifted, JUDGE_EPOCHS, options.progress)
    write_tensors(
        options.output / "judge.safetensors",
        {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()},
    )
    found = judge.read(model, judge.to_pictures(pictures[:, 0]))[0]
    print(f"judge: accuracy {(found == torch.arange(len(found))).double().mean():.4f} on plain pictures")


def measure(options: argparse.Namespace) -> None:
    """Judge the shipped model: can the emoji that was asked for be found from the picture that was drawn?"""
    data = noto.load()
    scale = judge.load_judge(options.output)
    pipe = EmojiPipeline.from_pretrained(str(options.output), local_files_only=True, low_cpu_mem_usage=False)
    plain = judge.to_pictures(data.pictures[:, 0])
    trained, new = (torch.tensor([i for i, e in enumerate(data.emoji) if e.held_out == out]) for out in (False, True))
    held_out = new.repeat(HELD_OUT_EACH)

    def drawn(rows: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
        return draw(pipe, [data.emoji[i].name for i in rows], steps, GUIDANCE, options.progress)

    def ranks(pictures: torch.Tensor, rows: torch.Tensor) -> dict[str, dict[str, float]]:
        """How often the right one of all emoji comes first, or among the first five."""
        features = judge.read(scale, pictures)[1]
        by_judge = scale.head(features.float())
        by_pixels = -torch.cdist(blurred(pictures), blurred(plain))
        return {"judge": shares(by_judge, rows), "blurred_pixels": shares(by_pixels, rows)}

    # In another order than the list's, so that the first 72, drawn again with fewer steps, are of all groups.
    trained = trained[torch.randperm(len(trained), generator=torch.Generator().manual_seed(0))]
    pictures, of_held_out = drawn(trained), drawn(held_out)
    fewer = {str(n): psnr(drawn(trained[:72], n), pictures[:72]) for n in FEWER_STEPS}
    shifted = judge.to_pictures(data.pictures[trained, 1])
    training_pictures = judge.to_pictures(data.pictures[trained].reshape(-1, *data.pictures.shape[2:]))
    right = judge.read(scale, pictures)[0] == trained
    groups = [data.emoji[i].group for i in trained]
    names = [data.emoji[i].name for i in held_out]
    read_as: dict[str, Counter[str]] = {name: Counter() for name in names}
    for name, found in zip(names, judge.read(scale, of_held_out)[0].tolist()):
        read_as[name][data.emoji[found].name] += 1
    reference = {
        "steps": STEPS, "guidance_scale": GUIDANCE, "emoji_to_choose_from": len(data.emoji),
        "trained": {"pictures": len(trained), **ranks(pictures, trained)},
        "held_out": {"pictures": len(held_out), **ranks(of_held_out, held_out)},
        "real": {"pictures": len(shifted), **ranks(shifted, trained)},
        "trained_top1_per_group": {g: round(right[[h == g for h in groups]].double().mean().item(), 3)
                                   for g in sorted(set(groups))},
        "held_out_read_as": {name: dict(counts.most_common(2)) for name, counts in read_as.items()},
        "psnr_of_fewer_steps": {n: round(value, 2) for n, value in fewer.items()},
        "nearest_training_picture_rms": {
            "drawn": quantiles(nearest(pictures, training_pictures)),
            "drawn_of_held_out": quantiles(nearest(of_held_out, training_pictures)),
            "held_out": quantiles(nearest(plain[new], training_pictures)),
            "train_to_another": quantiles(nearest(shifted, training_pictures, skip_self=True)),
        },
    }  # fmt: skip
    write_json(options.output / "reference.json", reference)
    (options.output / "README.md").write_text(card(options.output, reference), encoding="utf-8")
    print("statistics: " + json.dumps({key: reference[key] for key in ("trained", "held_out", "real")}))


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 pixels, [n, 192]: what is left of a picture when a shift by a pixel should not matter."""
    return avg_pool2d(pictures.float(), 2).flatten(1)


def shares(scores: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    """Shares of pictures for which the score of the right emoji is the highest, or one of the five highest."""
    place = (scores > scores.gather(1, rows[:, None])).sum(1)
    return {f"top{n}": round((place < n).double().mean().item(), 4) for n in (1, 5)}


def card(folder: Path, reference: dict) -> str:
    """The text of the model card (README.md)."""
    described, state = (json.loads((folder / name).read_text()) for name in ("data.json", "training.json"))
    near = reference["nearest_training_picture_rms"]

    def both(part: str) -> str:
        found = reference[part]
        return " / ".join(f"{found[by]['top1']:.2f}, {found[by]['top5']:.2f}" for by in ("judge", "blurred_pixels"))

    return f"""# emoji

A small text-to-image diffusion transformer that draws emoji from their names: 16x16 pixels, RGB, on white. It is a test
bed for feature caching with cross-attention, not an artist: it repeats the pictures it was trained on.

```python
from dittocache import bundled

bundled.load("emoji")(["red heart", "cat face"], num_inference_steps=50, guidance_scale={GUIDANCE}).images
```

| | |
| --- | --- |
| network | diffusers' `PixArtTransformer2DModel` in pixel space: 8 blocks of width 128, 64 tokens, 2.3 M parameters, float16 |
| text | a table of 4096 hashed words and letter triples, one token per word, trained along: 0.3 M parameters |
| diffusion | v-prediction, cosine schedule, 1000 steps; the empty text means "no text" (for guidance) |
| trained on | {described["train_emoji"]} emoji of Noto Color Emoji, {described["variants"]} pictures of each ([ATTRIBUTION.md](ATTRIBUTION.md)); {len(described["held_out"])} new combinations of known words held out |
| training | {state["images"]} images in {state["seconds"] / 60:.0f} minutes on a CPU ({state["precision"]}), AdamW, averaged weights{state.get("note", "")} |
| right emoji first, among the first five | by the judge / by blurred pixels, of {reference["emoji_to_choose_from"]} |
| pictures of trained names | {both("trained")} |
| pictures of held-out names | {both("held_out")} |
| real pictures, shifted | {both("real")} |
| distance to the nearest training picture | median {near["drawn"]["median"]:.3f}; of real held-out emoji {near["held_out"]["median"]:.3f}; of a training picture to the next {near["train_to_another"]["median"]:.3f} (RMS of pixels in [0, 1]) |

More figures are in `reference.json`; the classifier is in `judge.safetensors`, its classes are in `index.json`.

Rebuild: `python -m dittocache.bundled.build emoji`. The code is under the licence of dittocache (Apache-2.0); the
pictures that the weights reproduce are Google's, see [ATTRIBUTION.md](ATTRIBUTION.md).
"""  # noqa: E501


def attribution(description: dict) -> str:
    """The text of ATTRIBUTION.md."""
    version = description["packages"]
    return f"""# What the bundled `emoji` model was trained on

The model, its judge and the statistics were computed from the pictures and names below. No font and no picture of it is
part of this package, but the model was made to reproduce these pictures, reduced to 16x16 pixels, and does.

| Debian package | version | what was taken | licence | copyright |
| --- | --- | --- | --- | --- |
| fonts-noto-color-emoji | {version["fonts-noto-color-emoji"]} | pictures | artwork Apache-2.0, font files OFL-1.1 | 2013-2017 Google Inc., Arjen Nienhuis <a.g.nienhuis@gmail.com> |
| unicode-data | {version["unicode-data"]} | names, groups (emoji-test.txt) | Unicode data files licence | Unicode, Inc. |
| unicode-cldr-core | {version["unicode-cldr-core"]} | keywords (annotations) | Unicode-DFS-2016 | 1991-2022 Unicode, Inc. |

- Apache-2.0: <https://www.apache.org/licenses/LICENSE-2.0>; artwork: <https://github.com/googlefonts/noto-emoji>
- OFL-1.1: <https://openfontlicense.org>
- Unicode licence and terms of use: <https://www.unicode.org/copyright.html>. Names, groups and the order of
  `index.json` are from the data files; they were filtered (no skin tones, no second name of one picture).
"""  # noqa: E501
