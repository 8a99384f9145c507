"""DiCache (arXiv 2508.17356)."""

from typing import Annotated, Literal

from ..fill import Aligned
from ..parameters import Int, Number
from ..recipe import Recipe, method
from ..when import ProbeChange


@method(
    name="dicache",
    title="DiCache: Let Diffusion Model Determine Its Own Cache",
    arxiv="2508.17356",
    bibtex="""@article{bu2025dicache,
  title={DiCache: Let Diffusion Model Determine Its Own Cache},
  author={Bu, Jiazi and Ling, Pengyang and Zhou, Yujie and Wang, Yibin and Zang, Yuhang and Wu, Tong and Lin, Dahua
    and Wang, Jiaqi},
  journal={arXiv preprint arXiv:2508.17356},
  year={2025}
}""",
    settings={
        "FLUX.1-dev": {"threshold": 0.4, "retention": 0.2},
        "FLUX.1-dev, difference": {"error": "difference", "threshold": 0.08, "retention": 0.0},
        "HunyuanVideo": {
            "threshold": 0.1,
            "warmup_inclusive": False,
            "strict": False,
            "last_step_full": False,
        },
        "Wan2.1": {"threshold": 0.08, "last_step_full": False, "max_gain": 2.0},
    },
)
def dicache(
    threshold: Annotated[float, Number(0, help="accumulated error, below which the rest is skipped")] = 0.4,
    error: Annotated[
        Literal["probe", "difference"],
        "what is accumulated: the change of the probe (delta_y), or how it differs from its input's (delta_minus)",
    ] = "probe",
    probe_depth: Annotated[int, Int(1, help="blocks that always run")] = 1,
    retention: Annotated[float, Number(0, 1, help="share of the run that is computed at its start")] = 0.2,
    warmup_inclusive: Annotated[bool, "step int(retention T) belongs to the start"] = True,
    strict: Annotated[bool, "an error equal to the threshold is not below it"] = True,
    last_step_full: Annotated[bool, "the last step is computed"] = True,
    max_gain: Annotated[
        float, Number(1, help="how far a skipped step may go beyond the one before the last full")
    ] = 1.5,
    batch: Annotated[
        Literal["sample", "batch"], "decide for every sample on its own, or once for all, as the authors do"
    ] = "sample",
) -> Recipe:
    """The first blocks always run; while they change little the rest is skipped, and goes on as far as they do."""
    when = ProbeChange(threshold, probe_depth, error, retention, warmup_inclusive, strict, last_step_full, batch)
    return Recipe(when=when, where="stack", keeps="change", fill=Aligned(max_gain))
