"""DuCa (arXiv 2412.18911), as its authors run it on DiT; settings for PixArt and Open-Sora."""

from __future__ import annotations

from ..recipe import Recipe, method
from ..when import DualInterval
from .toca import (
    PIXART,
    STDIT3,
    FirstFull,
    Interval,
    IntervalWarp,
    LayerDivisor,
    ModuleIntervalsOf,
    ModuleRatioFactor,
    PerBlockKind,
    Ratio,
    RatioSchedule,
    Selector,
    SelectText,
    SensitiveWindow,
    ShareGuidanceIndices,
    SoftWeight,
    SpatialBonus,
    SpatialGrid,
    StepOrder,
    token_wise,
)


@method(
    name="duca",
    title="Accelerating Diffusion Transformers with Dual Feature Caching",
    arxiv="2412.18911",
    bibtex="""@article{zou2024duca,
  title={Accelerating Diffusion Transformers with Dual Feature Caching},
  author={Zou, Chang and Zhang, Evelyn and Guo, Runlin and Xu, Haohang and He, Conghui and Hu, Xuming and
    Zhang, Linfeng},
  journal={arXiv preprint arXiv:2412.18911},
  year={2024}
}""",
    settings={
        "DiT-XL/2 256, DDIM 50 steps": {"interval": 3, "ratio": 0.05},
        "PixArt-alpha 256, DPM-Solver++ 20 steps": {**PIXART, "interval": 3, "ratio": 0.75, "interval_warp": 0.0},
        "Open-Sora 1.2, 30 steps": {**STDIT3, "interval": 3, "selector": "value-norm"},
    },
)
def duca(
    interval: Interval = 3,
    ratio: Ratio = 0.05,
    ratio_schedule: RatioSchedule = "ddim50",
    selector: Selector = "attention",
    soft_weight: SoftWeight = 0.25,
    spatial_bonus: SpatialBonus = 0.8,
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
    """ToCa, in which every other step between full ones skips all blocks and reuses the last hidden state."""
    return token_wise(DualInterval, locals())
