"""How many tokens: the ratio schedules of ToCa and DuCa. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# (step slope, layer slope) of the schedules R F (1 + wl - 2 wl l/d)(1 + ws - 2 ws i/T)
_LAYERED = {"ddim50": (2.0, -0.2), "ddpm250": (0.4, 0.8), "linear-layerwise": (0.4, 0.8)}
SCHEDULES = (*_LAYERED, "constant", "linear", "exp", "linear-mode", "layerwise", "pixart", "stdit3", "flux")
# the authors' factors, by schedule and part
_FACTORS = {
    "pixart": {"cross_attention": 0.6, "mlp": 1.6},
    "stdit3": {"cross_attention": 1 - 0.67 * 1.5, "mlp": 1 + 0.33 * 1.5},
    "flux": {"double": 0.4, "single": 1.6},
}
# what the authors call the modules, by kind of site
PARTS = {
    "cross-attention": ("cross_attention",),
    "feed-forward": ("mlp", "double"),
    "context-feed-forward": ("mlp", "double"),
    "fused": ("single",),
}


def factor_of(factors: Mapping[str, float] | float | None, schedule: str, kind: str) -> float:
    """The module factor F for a kind of site: as given, else the authors' for the schedule, else 1."""
    if isinstance(factors, (int, float)):
        return float(factors)
    known = {**_FACTORS.get(schedule, {}), **(factors or {})}
    return next((known[part] for part in PARTS.get(kind, ()) if part in known), 2.5 if schedule in _LAYERED else 1.0)


def ratio_at(
    schedule: str,
    ratio: float,
    factor: float,
    step: int,
    num_steps: int,
    layer: int,
    divisor: int,
    interval: int,
    step_order: str = "down",
) -> float:
    """Share of the tokens to compute, not yet clamped to [0, 1].

    Args:
        schedule: name of the schedule.
        ratio: base ratio R.
        factor: module factor F.
        step: k, 0 = noisiest.
        num_steps: T.
        layer: block l.
        divisor: number that l is divided by, d.
        interval: base interval N (`linear-mode` only).
        step_order: the index i of a step is T-1-k ("down": DiT) or k ("up": PixArt, Open-Sora, FLUX). `pixart` is
            written in k, whatever the order.
    """
    i, depth = step if step_order == "up" else num_steps - 1 - step, layer / max(divisor, 1)
    if schedule in _LAYERED:
        ws, wl = _LAYERED[schedule]
        return ratio * factor * (1 + wl - 2 * wl * depth) * (1 + ws - 2 * ws * i / num_steps)
    if schedule in ("constant", "stdit3"):
        return ratio * factor
    if schedule == "linear":
        return ratio * factor * (1.9 - 1.8 * i / num_steps)
    if schedule == "exp":
        return ratio * factor * 0.9 ** (i / num_steps)
    if schedule == "linear-mode":
        return ratio * factor * (1.9 - 1.8 * i / num_steps + 0.1 * ((i % interval) / interval - 0.5))
    if schedule == "layerwise":
        return ratio * factor * (1.9 - 1.8 * depth)
    if schedule == "pixart":
        return ratio * (1.9 - 1.8 * step / num_steps) * (1.6 - 1.2 * depth) * factor
    if schedule == "flux":
        return ratio * (1.5 - depth) * factor
    raise ValueError(f"unknown ratio schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def token_count(ratio: float, tokens: int) -> int:
    """Number of tokens of a ratio: clamped, multiplied in float32 and cut off, as the authors compute it."""
    return int(np.clip(np.float32(ratio), np.float32(0), np.float32(1)) * np.float32(tokens))
