"""DeepCache (arXiv 2312.00858)."""

from typing import Annotated, Literal

from ..fill import Hold
from ..parameters import Int, Number
from ..recipe import Recipe, method
from ..when import Every, PowerSteps


@method(
    name="deepcache",
    title="DeepCache: Accelerating Diffusion Models for Free",
    arxiv="2312.00858",
    bibtex="""@inproceedings{ma2024deepcache,
  title={DeepCache: Accelerating Diffusion Models for Free},
  author={Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024},
  note={arXiv:2312.00858}
}""",
    settings={
        "Stable Diffusion 1.5, 50 steps, paper": {"interval": 5, "branch_id": 1},
        "Stable Diffusion 1.5, 50 steps, paper, not uniform": {
            "interval": 5,
            "branch_id": 1,
            "schedule": "centred",
            "center": 10,
            "power": 1.5,
        },
        "Stable Diffusion, authors' plug-in": {"interval": 3, "branch_id": 0},
    },
)
def deepcache(
    interval: Annotated[int, Int(1, help="every interval-th step is full; on average, if not uniform")] = 3,
    branch_id: Annotated[
        int, Int(0, help="skip branch, numbered as in the authors' plug-in: 0 is conv_in's, all above is deeper")
    ] = 0,
    schedule: Annotated[
        Literal["uniform", "centred", "one-sided"],
        "full steps: at equal distances, dense around a centre, or dense at the start (the authors' for LDM)",
    ] = "uniform",
    center: Annotated[int, Int(0, help="of 'centred': the step around which full steps are dense")] = 15,
    power: Annotated[float, Number(1, help="of 'centred' and 'one-sided': larger is denser there")] = 1.4,
) -> Recipe:
    """Between full steps a U-Net runs down to one skip branch only; what lies deeper is that of the last full step."""
    uneven = PowerSteps(interval, power, center if schedule == "centred" else None)
    return Recipe(
        where=f"deep.{branch_id}",
        when=Every(interval, anchor="start") if schedule == "uniform" else uneven,
        fill=Hold(),
    )
