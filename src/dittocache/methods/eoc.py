"""EOC, Error-Optimized Cache (arXiv 2501.19243)."""

from typing import Annotated, Any

from ..fill import Trend
from ..parameters import Data, Number
from ..recipe import Recipe, method
from .base import Interval, ReuseList, RouterLogits, Threshold, read_tensors, schedule


@method(
    name="eoc",
    title="Accelerating Diffusion Transformer via Error-Optimized Cache",
    arxiv="2501.19243",
    bibtex="""@article{qiu2025eoc,
  title={Accelerating Diffusion Transformer via Error-Optimized Cache},
  author={Qiu, Junxiang and others},
  journal={arXiv preprint arXiv:2501.19243},
  year={2025}
}""",
    needs="calibration",
    settings={"DiT-XL/2 256, DDIM 20 steps, 25 % reused": {"theta": 0.01, "reuse_steps": (1, 3, 5, 7, 9)}},
)
def eoc(
    trend: Annotated[
        Any, Data("SITE@STEP -> [tokens, channels], mean feature of a step minus that of the last", held="fill.trend")
    ] = None,
    theta: Annotated[float, Number(-float("inf"), help="strength of the correction")] = 0.01,
    interval: Interval = 2,
    reuse_steps: ReuseList = None,
    router_logits: RouterLogits = None,
    threshold: Threshold = 0.1,
    write_back: Annotated[bool, "a corrected output takes the kept one's place, as in the authors' code"] = True,
    additive: Annotated[bool, "c + theta E, which is not the authors'"] = False,
) -> Recipe:
    """What is reused is scaled, element by element, with the calibrated trend of its feature: c (1 + theta E)."""
    if trend is None:
        raise ValueError("eoc needs a trend: calibrate it with `dittocache calibrate eoc`, or pass a file of one")
    return Recipe(
        where="module",
        when=schedule(interval, reuse_steps, router_logits, threshold),
        fill=Trend(read_tensors(trend), theta, write_back, additive),
    )
