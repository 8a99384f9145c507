"""ToCa (arXiv 2410.05317), as its authors run it on DiT; settings for PixArt, Open-Sora and FLUX."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..fill import Hold
from ..parameters import Int, Number, PerKind
from ..recipe import Recipe, method
from ..when import Counter, DualInterval, DualModuleIntervals, ModuleIntervals, SoftInterval, When
from ..which import Which
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
        "stdit3",
        "flux",
    ],
    "how the share varies over steps and blocks",
]
Selector = Annotated[
    Literal[
        "attention",
        "value-norm",
        "large-value-norm",
        "key-norm",
        "cross-attention-entropy",
        "random",
        "similarity",
        "norm",
        "compress",
        "straight",
    ],
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
    float | dict[str, float] | None,
    PerKind(
        Number(-float("inf")),
        ("cross_attention", "mlp", "double", "single"),
        "factor F of the ratio schedule, one for all modules or by module; None for the authors' values",
    ),
]
LayerDivisor = Annotated[
    int | None, Int(1, help="what block indices are divided by; None for depth - 1, 27 is the authors' literal")
]
PerBlockKind = Annotated[
    bool, "decide the kind of step again in every block, as the authors' code does; False: once a step"
]
ShareGuidanceIndices = Annotated[bool, "one selection for both halves of batched guidance"]
StepOrder = Annotated[
    Literal["down", "up"],
    "steps are numbered from the last to the first (DiT), or from the first to the last (PixArt, and always with "
    "first_full or module_intervals)",
]
FirstFull = Annotated[
    int | None,
    Int(
        1,
        help="this many full steps first (1 if ratio is 0), then one every interval-th after the last (FLUX); None: a "
        "soft interval",
    ),
]
ModuleIntervalsOf = Annotated[
    dict[str, int] | None,
    PerKind(
        Int(1),
        ("attention", "cross_attention", "mlp"),
        "an interval for each module, after first_full full steps (3 without one), instead of the soft one (Open-Sora)",
        every=True,
    ),
]
SelectText = Annotated[
    bool, "text may be thinned out as well: its own feed-forwards, and blocks that hold text and image at once"
]

PIXART = {"ratio_schedule": "pixart", "selector": "cross-attention-entropy", "spatial_bonus": 0.4, "spatial_grid": 4}
PIXART |= {"sensitive_window": None, "share_guidance_indices": True, "step_order": "up"}
STDIT3 = {"ratio": 0.1, "ratio_schedule": "stdit3", "spatial_bonus": None, "first_full": 3}
STDIT3 |= {"module_intervals": {"attention": 3, "cross_attention": 6, "mlp": 3}}
FLUX = {"ratio": 0.1, "ratio_schedule": "flux", "layer_divisor": 27, "spatial_bonus": None}
FLUX |= {"first_full": 3, "select_text": True}


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
        "PixArt-alpha 256, DPM-Solver++ 20 steps": {**PIXART, "interval": 3, "ratio": 0.3, "interval_warp": 0.2},
        "Open-Sora 1.2, 30 steps": {
            **STDIT3,
            "interval": 3,
            "selector": "cross-attention-entropy",
            "share_guidance_indices": True,
        },
        "FLUX.1-dev, 50 steps": {**FLUX, "interval": 4},
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
    step_order: StepOrder = "down",
    first_full: FirstFull = None,
    module_intervals: ModuleIntervalsOf = None,
    select_text: SelectText = False,
) -> Recipe:
    """Between full steps, attention is reused and the feed-forward computed for the most important tokens only."""
    return token_wise(SoftInterval, locals())


def token_wise(soft: type[SoftInterval], settings: dict[str, Any]) -> Recipe:
    """The composition that ToCa and DuCa share."""
    scoring = ("ratio", "ratio_schedule", "module_ratio_factor", "layer_divisor", "interval", "soft_weight")
    spread = ("spatial_bonus", "spatial_grid", "share_guidance_indices", "select_text")
    chosen = {name: settings[name] for name in scoring + spread}
    counted = settings["first_full"] is not None or settings["module_intervals"] is not None
    which: Which = token_selector(
        settings["selector"], **chosen, step_order="up" if counted else settings["step_order"]
    )
    return Recipe(where="module", when=_schedule(soft, settings), which=which, fill=Hold())


def _schedule(soft: type[SoftInterval], settings: dict[str, Any]) -> When:
    """The soft interval, or what is asked for instead.

    With ratio 0 nothing varies and no more than one step is full at the start, as in the authors' code.
    """
    first_full, intervals, varies = settings["first_full"], settings["module_intervals"], settings["ratio"] > 0
    if intervals is not None:
        dual = DualModuleIntervals if soft is DualInterval else ModuleIntervals
        return dual(**intervals, first_full=first_full or 3)
    if first_full is not None:
        if soft is DualInterval:
            raise ValueError("duca has no rule with first_full and without module_intervals; leave first_full away")
        return Counter(settings["interval"], first_full if varies else 1)
    return soft(
        interval=settings["interval"],
        warp=settings["interval_warp"] if varies else 0.0,
        sensitive_window=settings["sensitive_window"] if varies else None,
        per_block_kind=settings["per_block_kind"],
        direction=settings["step_order"],
    )
