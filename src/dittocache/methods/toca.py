"""ToCa (arXiv 2410.05317), as its authors run it on DiT."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..fill import Hold
from ..recipe import Int, Number, Recipe, method
from ..when import SoftInterval
from ..which.tokens import selector as token_selector

Interval = Annotated[int, Int(1, help="base interval N between full steps")]
Ratio = Annotated[float, Number(0, 1, help="base share R of the tokens that partial steps compute")]
RatioSchedule = Annotated[
    Literal[
        "ddim50",
        "ddpm250",
        "linear-layerwise",
        "constant",
        "linear",
        "exp",
        "linear-mode",
        "layerwise",
        "pixart",
        "flux",
    ],
    "how the share varies over steps and blocks",
]
Selector = Annotated[
    Literal["attention", "value-norm", "random", "similarity", "norm", "compress", "straight"],
    "what makes a token worth computing",
]
SoftWeight = Annotated[float, Number(0, help="weight of a token's age in its score (s3); 0 for none")]
SpatialBonus = Annotated[float | None, Number(0, help="bonus for the best token of every cell (s4); None for none")]
SpatialGrid = Annotated[int, Int(1, help="side of a cell, in tokens")]
IntervalWarp = Annotated[float, Number(0, 0.95, help="how much the interval varies: N/(1+w) to N/(1-w)")]
SensitiveWindow = Annotated[
    tuple[float, float] | None, "share of the run, counted from its end, in which every second step is full"
]
ModuleRatioFactor = Annotated[
    float | None, Number(-float("inf"), help="factor F of the ratio schedule; None for the authors' value")
]
LayerDivisor = Annotated[
    int | None, Int(1, help="what block indices are divided by; None for depth - 1, 27 is the authors' literal")
]
PerBlockKind = Annotated[
    bool, "decide the kind of step again in every block, as the authors' code does; False: once a step"
]
ShareGuidanceIndices = Annotated[bool, "one selection for both halves of batched guidance"]


@method(
    name="toca",
    title="Accelerating Diffusion Transformers with Token-wise Feature Caching",
    arxiv="2410.05317",
    bibtex="""@article{zou2024toca,
  title={Accelerating Diffusion Transformers with Token-wise Feature Caching},
  author={Zou, Chang and Liu, Xuyang and Liu, Ting and Huang, Siteng and Zhang, Linfeng},
  journal={arXiv preprint arXiv:2410.05317},
  year={2024}
}""",
    settings={
        "DiT-XL/2 256, DDIM 50 steps": {"interval": 3, "ratio": 0.07, "ratio_schedule": "ddim50"},
        "DiT-XL/2 256, DDPM 250 steps": {"interval": 4, "ratio": 0.07, "ratio_schedule": "ddpm250"},
    },
)
def toca(
    interval: Interval = 3,
    ratio: Ratio = 0.07,
    ratio_schedule: RatioSchedule = "ddim50",
    selector: Selector = "attention",
    soft_weight: SoftWeight = 0.25,
    spatial_bonus: SpatialBonus = 0.6,
    spatial_grid: SpatialGrid = 2,
    interval_warp: IntervalWarp = 0.4,
    sensitive_window: SensitiveWindow = (0.2, 0.4),
    module_ratio_factor: ModuleRatioFactor = None,
    layer_divisor: LayerDivisor = None,
    per_block_kind: PerBlockKind = True,
    share_guidance_indices: ShareGuidanceIndices = False,
) -> Recipe:
    """Between full steps, attention is reused and the feed-forward computed for the most important tokens only."""
    return token_wise(SoftInterval, locals())


def token_wise(schedule: type[SoftInterval], settings: dict[str, Any]) -> Recipe:
    """The composition that ToCa and DuCa share; with ratio 0 the interval does not vary, as in the authors' code."""
    varies = settings["ratio"] > 0
    when = schedule(
        interval=settings["interval"],
        warp=settings["interval_warp"] if varies else 0.0,
        sensitive_window=settings["sensitive_window"] if varies else None,
        per_block_kind=settings["per_block_kind"],
    )
    scoring = ("ratio", "ratio_schedule", "module_ratio_factor", "layer_divisor", "interval", "soft_weight")
    spread = ("spatial_bonus", "spatial_grid", "share_guidance_indices")
    which = token_selector(settings["selector"], **{name: settings[name] for name in scoring + spread})
    return Recipe(where="module", when=when, which=which, fill=Hold())
