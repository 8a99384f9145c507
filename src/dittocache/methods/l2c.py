"""L2C, Learning-to-Cache (arXiv 2406.01733)."""

from typing import Annotated, Literal

from ..fill import Hold
from ..recipe import Recipe, method
from ..when import Router
from .base import RouterLogits, Threshold, read_router


@method(
    name="l2c",
    title="Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching",
    arxiv="2406.01733",
    bibtex="""@inproceedings{ma2024learningtocache,
  title={Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching},
  author={Ma, Xinyin and Fang, Gongfan and Mi, Michael Bi and Wang, Xinchao},
  booktitle={Advances in Neural Information Processing Systems},
  volume={37},
  pages={133282--133304},
  year={2024},
  note={arXiv:2406.01733}
}""",
    needs="training",
    settings={
        "DiT-XL/2 256, 10, 20 or 50 steps": {"threshold": 0.1},
        "DiT-XL/2 512, 50 steps": {"threshold": 0.9},
        "U-ViT-H/2 256, 20 or 50 evaluations": {"threshold": 0.9, "rows": "outer"},
    },
)
def l2c(
    router_logits: RouterLogits = None,
    threshold: Threshold = 0.1,
    rows: Annotated[
        Literal["index", "outer"],
        "row i of the table is the i-th step from the end, or (second-order solvers, U-ViT) the outer step",
    ] = "index",
) -> Recipe:
    """A trained table says which modules every second step reuses; nothing kept is older than one step."""
    if router_logits is None:
        raise ValueError("l2c needs router_logits: train them with `dittocache train l2c`, or pass a file of them")
    return Recipe(where="module", when=Router(read_router(router_logits), threshold, rows), fill=Hold())
