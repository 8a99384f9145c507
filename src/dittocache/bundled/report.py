"""What the statistics of all bundled models share: drawing by seed, distances, licences, and files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .pipeline import PixelPipeline

BATCH = 72


def draw(
    pipe: PixelPipeline, what: Sequence[Any], steps: int, guidance: float, progress: Callable[..., Any]
) -> torch.Tensor:
    """Pictures [n, channels, height, width] in [0, 1] of labels or prompts; picture i comes from seed i."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in progress(range(0, len(what), BATCH), desc="draw"):
        chosen = list(what[start : start + BATCH])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chosen))]
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
        parts.append(pipe(chosen, **settings, output_type="pt").images)
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


def quantiles(values: torch.Tensor) -> dict[str, float]:
    return {n: round(values.quantile(q).item(), 5) for n, q in (("median", 0.5), ("5%", 0.05), ("1%", 0.01))}


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


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes files that only their owner may read


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
