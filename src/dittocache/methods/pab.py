"""PAB, Pyramid Attention Broadcast (arXiv 2408.12588), as diffusers runs it."""

from typing import Annotated

from ..fill import Hold
from ..parameters import Int, Numbers
from ..recipe import Recipe, method
from ..when import Broadcast

Range = Annotated[tuple[float, float], Numbers(count=2, help="(low, high): reuse is limited to timesteps within")]
Interval = Annotated[int | None, Int(1, help="every interval-th step is computed in its range; None for all steps")]


@method(
    name="pab",
    title="Real-Time Video Generation with Pyramid Attention Broadcast",
    arxiv="2408.12588",
    bibtex="""@article{zhao2024pab,
  title={Real-Time Video Generation with Pyramid Attention Broadcast},
  author={Zhao, Xuanlei and Jin, Xiaolong and Wang, Kai and You, Yang},
  journal={arXiv preprint arXiv:2408.12588},
  year={2024}
}""",
    settings={"diffusers' default": {"interval": 2, "timestep_range": (100, 800)}},
)
def pab(
    interval: Interval = 2,
    timestep_range: Range = (100, 800),
    temporal_interval: Interval = None,
    temporal_timestep_range: Range = (100, 800),
    cross_interval: Interval = None,
    cross_timestep_range: Range = (100, 800),
) -> Recipe:
    """In the middle of the run attention is computed every few steps, with an interval for each kind of attention."""
    if interval is temporal_interval is cross_interval is None:
        raise ValueError("pab reuses nothing unless one of interval, temporal_interval and cross_interval is a number")
    when = Broadcast(
        interval, timestep_range, temporal_interval, temporal_timestep_range, cross_interval, cross_timestep_range
    )
    return Recipe(where="attention", when=when, fill=Hold())
