"""GOC, Gradient-Optimized Cache (arXiv 2503.05156)."""

from typing import Annotated, Literal

from ..fill import GradientQueue
from ..parameters import Number, Steps
from ..recipe import Recipe, method
from .base import Interval, ReuseList, RouterLogits, Threshold, schedule

# the shipped list for 20 steps, every second one reused: step 17 is left out, an inflection
SHIPPED = (3, 5, 7, 9, 11, 13, 15, 19)


@method(
    name="goc",
    title="Accelerating Diffusion Transformer via Gradient-Optimized Cache",
    arxiv="2503.05156",
    bibtex="""@inproceedings{qiu2025goc,
  title={Accelerating Diffusion Transformer via Gradient-Optimized Cache},
  author={Qiu, Junxiang and Liu, Lin and Wang, Shuo and Lu, Jinda and Chen, Kezhou and Hao, Yanbin},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  note={arXiv:2503.05156}
}""",
    settings={
        "DiT-XL/2 256, DDIM 20 steps, 25 % reused": {
            "eta": 1.2,
            "reuse_steps": (1, 3, 5, 7, 9),
            "correct_steps": (3, 5, 7, 9),
        },
        "DiT-XL/2 256, DDIM 20 steps, 50 % reused": {"eta": 1.2, "interval": 2, "correct_steps": SHIPPED},
        "DiT-XL/2 256, DDIM 20 steps, on L2C": {"eta": 0.8, "base": "l2c", "correct_steps": SHIPPED},
    },
)
def goc(
    eta: Annotated[
        float | None,
        Number(-float("inf"), help="strength; None for the authors' 1.2 with a list, 0.8 on L2C or without one"),
    ] = None,
    base: Annotated[Literal["static", "l2c"], "schedule: fixed steps, or L2C's router"] = "static",
    interval: Interval = 2,
    reuse_steps: ReuseList = None,
    correct_steps: Annotated[
        tuple[int, ...] | None, Steps(0, help="steps that are corrected; None for all that are reused")
    ] = None,
    router_logits: RouterLogits = None,
    threshold: Threshold = 0.1,
    computed_only: Annotated[
        bool, "take the difference of the last two computed features, for intervals above 2 (an extension)"
    ] = False,
) -> Recipe:
    """What is reused is extrapolated along the difference of the two newest features: F1 + eta (F1 - F2)."""
    if (base == "l2c") != (router_logits is not None):
        raise ValueError(f"base='l2c' and router_logits go together; got base={base!r}")
    # above 1, errors of stand-ins grow from correction to correction: not without a list that leaves steps out
    eta = eta if eta is not None else 0.8 if base == "l2c" or correct_steps is None else 1.2
    return Recipe(
        where="module",
        when=schedule(interval, reuse_steps, router_logits, threshold),
        fill=GradientQueue(eta, correct_steps, require_both=base == "l2c", computed_only=computed_only),
    )
