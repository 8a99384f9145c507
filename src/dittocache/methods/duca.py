"""DuCa (arXiv 2412.18911), as its authors run it on DiT."""

from __future__ import annotations

from ..recipe import Recipe, method
from ..when import DualInterval
from .toca import (
    Interval,
    IntervalWarp,
    LayerDivisor,
    ModuleRatioFactor,
    PerBlockKind,
    Ratio,
    RatioSchedule,
    Selector,
    SensitiveWindow,
    ShareGuidanceIndices,
    SoftWeight,
    SpatialBonus,
    SpatialGrid,
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
    settings={"DiT-XL/2 256, DDIM 50 steps": {"interval": 3, "ratio": 0.05}},
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
) -> Recipe:
    """ToCa, in which every other step between full ones skips all blocks and reuses the last hidden state."""
    return token_wise(DualInterval, locals())
