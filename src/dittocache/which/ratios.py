"""How many tokens: the ratio schedules of ToCa and DuCa. Plain numbers in, plain numbers out."""

from __future__ import annotations

import numpy as np

# (step slope, layer slope) of the schedules R F (1 + wl - 2 wl l/d)(1 + ws - 2 ws i/T)
_LAYERED = {"ddim50": (2.0, -0.2), "ddpm250": (0.4, 0.8), "linear-layerwise": (0.4, 0.8)}
SCHEDULES = (*_LAYERED, "constant", "linear", "exp", "linear-mode", "layerwise", "pixart", "flux")


def default_factor(schedule: str, kind: str) -> float:
    """The authors' module factor F for a kind of site; 1 where a schedule has none."""
    if schedule in _LAYERED:
        return 2.5
    return {("pixart", "cross-attention"): 0.6, ("pixart", "feed-forward"): 1.6}.get((schedule, kind), 1.0)


def ratio_at(
    schedule: str, ratio: float, factor: float, step: int, num_steps: int, layer: int, divisor: int, interval: int
) -> float:
    """Share of the tokens to compute, not yet clamped to [0, 1].

    Args:
        schedule: name of the schedule.
        ratio: base ratio R.
        factor: module factor F, used by the layered schedules, `pixart` and `flux`.
        step: k, 0 = noisiest. The DiT schedules are written in i = T-1-k, `pixart` in k, `flux` in neither.
        num_steps: T.
        layer: block l.
        divisor: number that l is divided by, d.
        interval: base interval N (`linear-mode` only).
    """
    i, depth = num_steps - 1 - step, layer / max(divisor, 1)
    if schedule in _LAYERED:
        ws, wl = _LAYERED[schedule]
        return ratio * factor * (1 + wl - 2 * wl * depth) * (1 + ws - 2 * ws * i / num_steps)
    if schedule == "constant":
        return ratio
    if schedule == "linear":
        return ratio * (1.9 - 1.8 * i / num_steps)
    if schedule == "exp":
        return ratio * 0.9 ** (i / num_steps)
    if schedule == "linear-mode":
        return ratio * (1.9 - 1.8 * i / num_steps + 0.1 * ((i % interval) / interval - 0.5))
    if schedule == "layerwise":
        return ratio * (1.9 - 1.8 * depth)
    if schedule == "pixart":
        return ratio * (1.9 - 1.8 * step / num_steps) * (1.6 - 1.2 * depth) * factor
    if schedule == "flux":
        return ratio * (1.5 - depth) * factor
    raise ValueError(f"unknown ratio schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def token_count(ratio: float, tokens: int) -> int:
    """Number of tokens of a ratio: clamped, multiplied in float32 and cut off, as the authors compute it."""
    return int(np.clip(np.float32(ratio), np.float32(0), np.float32(1)) * np.float32(tokens))
