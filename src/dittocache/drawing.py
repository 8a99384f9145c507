"""Pictures of plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .plan import Plan

REUSED, PARTLY, FULL = "#eceff3", ("#ffdf9e", "#f08a24"), "#1f4e79"


def draw_plan(plan: Plan, path: str | Path, title: str | None = None) -> None:
    """Heat map of a plan: one row a site, grouped by kind, one column a step; see `Plan.draw`."""
    try:
        from matplotlib.colors import LinearSegmentedColormap, to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError("drawing a plan needs matplotlib: pip install 'dittocache[eval]'") from None

    shades = LinearSegmentedColormap.from_list("partial", PARTLY)
    groups = [(kind, np.flatnonzero(np.array(plan.kinds) == kind)) for kind in dict.fromkeys(plan.kinds)]
    heights = [max(len(rows), 2) for _, rows in groups]
    figure = Figure(figsize=(max(5.0, 1.6 + 0.16 * len(plan.steps)), 1.3 + 0.14 * sum(heights) + 0.25 * len(groups)))
    axes = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for ax, (kind, rows) in zip(axes, groups, strict=True):
        share = plan.table[:, rows].T
        # partial shares are often a few per cent: the square root keeps them apart
        image = shades(np.sqrt(share))[..., :3]
        image[share == 0] = to_rgb(REUSED)
        image[share == 1] = to_rgb(FULL)
        ax.pcolormesh(
            np.arange(len(plan.steps) + 1) - 0.5,
            np.arange(len(rows) + 1) - 0.5,
            image,
            edgecolors="white",
            linewidth=0.4,
        )
        ax.invert_yaxis()
        ticks = range(0, len(rows), max(1, -(-len(rows) // 7)))
        ax.set_yticks(list(ticks), [str(t) for t in ticks] if len(rows) > 1 else [""], fontsize=7)
        ax.set_ylabel(
            kind.replace("-", "-\n") if len(rows) < 6 else kind, fontsize=8, rotation=0, ha="right", va="center"
        )
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    axes[-1].set_xlabel("sampling step (0 = noisiest)", fontsize=8)
    ticks = range(0, len(plan.steps), 5 if len(plan.steps) <= 60 else max(1, len(plan.steps) // 10))
    axes[-1].set_xticks(list(ticks), [str(plan.steps[t]) for t in ticks], fontsize=7)
    axes[0].legend(
        handles=[
            Patch(color=FULL, label="computed"),
            Patch(color=shades(0.7), label="some tokens (darker = more)"),
            Patch(color=REUSED, label="reused"),
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1.02),
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    figure.suptitle(title or f"{100 * plan.compute_fraction:.0f} % of the compute", fontsize=9, x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=160)
