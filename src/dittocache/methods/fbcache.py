"""First Block Cache, of ParaAttention and diffusers (no paper)."""

from typing import Annotated, Literal

from ..fill import Fill, Hold, Taylor
from ..parameters import Int, Number
from ..recipe import Recipe, method
from ..when import HeadChange


@method(
    name="fbcache",
    title="First Block Cache (ParaAttention, diffusers)",
    arxiv="",
    bibtex="""@misc{paraattention,
  title={ParaAttention},
  author={{chengzeyi}},
  howpublished={\\url{https://github.com/chengzeyi/ParaAttention}},
  year={2024}
}""",
    settings={  # latencies of the README: 26.36 s uncached, then 21.83, 17.01, 16.00, 13.78 s
        "FLUX.1-dev, 28 steps, 1.21x": {"threshold": 0.06},
        "FLUX.1-dev, 28 steps, 1.55x": {"threshold": 0.08},
        "FLUX.1-dev, 28 steps, 1.65x": {"threshold": 0.1},
        "FLUX.1-dev, 28 steps, 1.91x": {"threshold": 0.12},
    },
)
def fbcache(
    threshold: Annotated[
        float, Number(0, help="relative change of what the first block adds, below which the rest is skipped")
    ] = 0.05,
    warmup_steps: Annotated[int, Int(0, help="steps computed at the start, whatever has changed")] = 0,
    downsample_factor: Annotated[int, Int(1, help="look at every n-th channel only")] = 1,
    order: Annotated[
        int | None, Int(1, help="forecast the remaining blocks by a Taylor series of this order; None holds them")
    ] = None,
    batch: Annotated[
        Literal["sample", "batch"], "decide for every sample on its own, or once for all, as the authors do"
    ] = "sample",
) -> Recipe:
    """The first block always runs; if what it adds has hardly changed, the change over all other blocks is reused."""
    fill: Fill = Hold() if order is None else Taylor(order, start=1)
    when = HeadChange(threshold, warmup_steps, downsample_factor, batch)
    return Recipe(when=when, where="tail", keeps="change", fill=fill)
