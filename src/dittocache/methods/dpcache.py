"""DPCache (arXiv 2602.22654)."""

from collections.abc import Sequence
from typing import Annotated

from ..fill import Taylor
from ..parameters import Int, Steps
from ..parts import show
from ..recipe import Recipe, method
from ..when import ReuseSteps

FullSteps = Annotated[tuple[int, ...] | None, Steps(0, help="the steps that are computed; all others are made up")]
NumSteps = Annotated[int, Int(1, help="T, the number of steps that the list is for")]
Order = Annotated[int, Int(1, help="highest power of the forecast")]
FirstFull = Annotated[int, Int(0, help="steps computed at the start; all but the last two have no differences")]


def others(method: str, full_steps: Sequence[int] | None, num_steps: int) -> ReuseSteps:
    """The schedule that computes the listed steps.

    Raises:
        ValueError: there is no list, or step 0 is not on it, or one beyond the run is.
    """
    if full_steps is None:
        raise ValueError(f"{method} needs full_steps: run `dittocache calibrate {method}`, or pass a list of steps")
    if 0 not in full_steps or max(full_steps) >= num_steps:
        raise ValueError(f"full_steps are step 0 and others below num_steps={num_steps}; got {show(full_steps)}")
    return ReuseSteps(tuple(k for k in range(num_steps) if k not in full_steps))


@method(
    name="dpcache",
    title="Denoising as Path Planning: Training-Free Acceleration of Diffusion Models with DPCache",
    arxiv="2602.22654",
    bibtex="""@inproceedings{cui2026dpcache,
  title={Denoising as Path Planning: Training-Free Acceleration of Diffusion Models with DPCache},
  author={Cui, Bowen and Wang, Yuanbin and Xu, Huajiang and Chen, Biaolong and Zhang, Aixi and Jiang, Hao and
    Jin, Zhengzheng and Liu, Xu and Huang, Pipei},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2026},
  note={arXiv:2602.22654}
}""",
    needs="calibration",
    settings={
        "FLUX.1-dev, 50 steps, K = 13": {
            "full_steps": (0, 1, 2, 4, 7, 10, 14, 19, 23, 28, 34, 40, 45),
            "num_steps": 50,
        },
        "FLUX.1-dev, 50 steps, K = 9": {"full_steps": (0, 1, 2, 5, 9, 14, 21, 28, 38), "num_steps": 50},
        "Wan2.1 I2V 14B, 50 steps, K = 12": {
            "full_steps": (0, 1, 2, 3, 5, 8, 13, 19, 26, 34, 42, 49),
            "num_steps": 50,
            "first_full": 4,
        },
    },
)
def dpcache(
    full_steps: FullSteps = None, num_steps: NumSteps = 50, order: Order = 2, first_full: FirstFull = 3
) -> Recipe:
    """At steps that a planner chose, all is computed; between them the last hidden state is forecast."""
    when = others("dpcache", full_steps, num_steps)
    return Recipe(where="stack", when=when, fill=Taylor(order, start=max(first_full - 2, 0)))
