"""MagCache (arXiv 2506.09045), as diffusers runs it."""

from typing import Annotated

from ..fill import Hold
from ..parameters import Int, Number, Numbers
from ..recipe import Recipe, method
from ..when import RatioBudget

Ratios = Annotated[
    tuple[float, ...] | None,
    Numbers(0, help="how much larger the trunk's change is than at the step before, for every step; the first is 1"),
]
Threshold = Annotated[float, Number(0, help="budget of the error estimate that reused steps in a row add up to")]
MaxSkip = Annotated[int, Int(0, help="K, most reused steps in a row")]
Retention = Annotated[float, Number(0, 1, help="share of the run that is computed at its start")]
# of FLUX.1-dev and schnell over 28 steps, as diffusers has them
FLUX = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
)  # fmt: skip


@method(
    name="magcache",
    title="MagCache: Fast Video Generation with Magnitude-Aware Cache",
    arxiv="2506.09045",
    bibtex="""@article{ma2025magcache,
  title={MagCache: Fast Video Generation with Magnitude-Aware Cache},
  author={Ma, Zehong and Wei, Longhui and Wang, Feng and Zhang, Shiliang and Tian, Qi},
  journal={arXiv preprint arXiv:2506.09045},
  year={2025}
}""",
    needs="calibration",
    settings={
        "diffusers' default, 28 steps": {"threshold": 0.06, "max_skip": 3, "retention": 0.2},
        "FLUX.1, ratios of 28 steps": {"ratios": FLUX, "threshold": 0.06, "max_skip": 3, "retention": 0.2},
    },
)
def magcache(
    ratios: Ratios = None, threshold: Threshold = 0.06, max_skip: MaxSkip = 3, retention: Retention = 0.2
) -> Recipe:
    """The change of the whole trunk is reused while a calibrated estimate of its error stays within a budget."""
    if ratios is None:
        raise ValueError("magcache needs ratios: run `dittocache calibrate magcache`, or pass a list of them")
    return Recipe(where="stack", keeps="change", when=RatioBudget(ratios, threshold, max_skip, retention), fill=Hold())
