"""DuCa (arXiv 2412.18911), as its authors run it on DiT."""

from __future__ import annotations

from typing import Annotated

from ..recipe import Int, Number, Recipe, method
from ..when import DualInterval
from .toca import RatioSchedule, Selector, token_wise


@method(
    name="duca",
    title="Accelerating Diffusion Transformers with Dual Feature Caching",
    arxiv="2412.18911",
    bibtex="""@article{zou2024duca,
  title={Accelerating Diffusion Transformers with Dual Feature Caching},
  author={Zou, Chang and Zhang, Evelyn and Guo, Runlin and Xu, Haohang and He, Conghui and Hu, Xuming and Zhang, Linfeng},
  journal={arXiv preprint arXiv:2412.18911},
  year={2024}
}""",
    settings={"DiT-XL/2 256, DDIM 50 steps": {"interval": 3, "ratio": 0.05}},
)
def duca(
    interval: Annotated[int, Int(1, help="base interval N between full steps")] = 3,
    ratio: Annotated[float, Number(0, 1, help="base share R of the tokens that partial steps compute")] = 0.05,
    ratio_schedule: Annotated[RatioSchedule, "how the share varies over steps and blocks"] = "ddim50",
    selector: Annotated[Selector, "what makes a token worth computing"] = "attention",
    soft_weight: Annotated[float, Number(0, help="weight of a token's age in its score (s3); 0 for none")] = 0.25,
    spatial_bonus: Annotated[float | None, Number(0, help="bonus for the best token of every cell (s4)")] = 0.8,
    spatial_grid: Annotated[int, Int(1, help="side of a cell, in tokens")] = 2,
    interval_warp: Annotated[float, Number(0, 0.95, help="how much the interval varies: N/(1+w) to N/(1-w)")] = 0.4,
    sensitive_window: Annotated[
        tuple[float, float] | None, "share of the run, counted from its end, in which every second step is full"
    ] = (0.2, 0.4),
    module_ratio_factor: Annotated[
        float | None, Number(-float("inf"), help="factor F of the ratio schedule; None for the authors' value")
    ] = None,
    layer_divisor: Annotated[
        int | None, Int(1, help="the number block indices are divided by; None for depth - 1, 27 is the authors' literal")
    ] = None,
    per_block_kind: Annotated[
        bool, "decide the kind of step again in every block, as the authors' code does; False: once a step"
    ] = True,
    share_guidance_indices: Annotated[bool, "one selection for both halves of batched guidance"] = False,
) -> Recipe:
    """ToCa with aggressive steps in turn with the partial ones: they skip all blocks and reuse the last hidden state."""
    return token_wise(DualInterval, locals())
