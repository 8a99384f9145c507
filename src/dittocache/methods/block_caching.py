"""Block Caching (arXiv 2312.03209)."""

from typing import Annotated, Any

from ..fill import Hold
from ..parameters import Data, Number
from ..recipe import Recipe, method
from ..when import ChangeBudget
from .base import read_tensors


@method(
    name="block-caching",
    title="Cache Me if You Can: Accelerating Diffusion Models through Block Caching",
    arxiv="2312.03209",
    bibtex="""@inproceedings{wimbauer2024cache,
  title={Cache Me if You Can: Accelerating Diffusion Models through Block Caching},
  author={Wimbauer, Felix and others},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024},
  note={arXiv:2312.03209}
}""",
    needs="calibration",
    settings={"LDM-512, 20 or 50 steps": {"delta": 0.5}},
)
def block_caching(
    changes: Annotated[
        Any, Data("BLOCK -> [steps], mean relative L1 change of the block's change at each step", held="when.changes")
    ] = None,
    delta: Annotated[float, Number(0, help="a block is computed when its changes add up to more than this")] = 0.5,
) -> Recipe:
    """Every block keeps what it adds to its input until its calibrated changes have used up a budget."""
    if changes is None:
        raise ValueError(
            "block-caching needs changes: calibrate them with `dittocache calibrate block-caching`, or pass a file"
        )
    return Recipe(where="block", keeps="change", when=ChangeBudget(read_tensors(changes), delta), fill=Hold())
