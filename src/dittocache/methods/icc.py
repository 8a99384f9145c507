"""ICC, Increment-Calibrated Caching (arXiv 2505.05829)."""

from typing import Annotated, Any, Literal

from ..fill import Hold, LowRankIncrement
from ..parameters import Data, Int
from ..recipe import Recipe, method
from ..when import Every
from .base import read_tensors


@method(
    name="icc",
    title="Accelerating Diffusion Transformer via Increment-Calibrated Caching with Channel-Aware Singular Value "
    "Decomposition",
    arxiv="2505.05829",
    bibtex="""@inproceedings{chen2025icc,
  title={Accelerating Diffusion Transformer via Increment-Calibrated Caching with Channel-Aware Singular Value
    Decomposition},
  author={Chen, Zhiyuan and Li, Keyi and Jia, Yifan and Ye, Le and Ma, Yufei},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={18011--18020},
  year={2025},
  note={arXiv:2505.05829}
}""",
    needs="calibration",
    settings={"DiT-XL/2 256, DDIM 100 steps": {"period": 2, "rank": 128, "factors": "activation-svd"}},
)
def icc(
    period: Annotated[int, Int(1, help="step k is full iff k mod period = 0")] = 2,
    factors: Annotated[
        Literal["reuse", "svd", "activation-svd", "change-svd"],
        "how the low-rank factors were made: from the weights alone, or weighted by channel with the size of "
        "activations, or of their change between steps; reuse for none",
    ] = "activation-svd",
    rank: Annotated[int | None, Int(1, help="of the factors, for the record; another one is refused")] = None,
    factor_tensors: Annotated[
        Any, Data("SITE/A -> [out, rank] and SITE/B -> [rank, in] of every linear layer", held="fill.factors")
    ] = None,
) -> Recipe:
    """A reused linear layer adds a low-rank map of its input's change: y_c + A B (x - x_c); attention is computed."""
    when = Every(period, anchor="start")
    if factors == "reuse":
        return Recipe(where="module", when=when, fill=Hold())
    if factor_tensors is None:
        raise ValueError(
            "icc needs factor_tensors: calibrate them with `dittocache calibrate icc` (or factors='reuse')"
        )
    tensors = read_tensors(factor_tensors)
    found = {t.shape[-1] for name, t in tensors.items() if name.endswith("/A") and t.ndim}
    if rank is not None and not found & {rank, 3 * rank}:  # a fused qkv holds three
        raise ValueError(f"rank is {rank}, but the factor_tensors have {', '.join(map(str, sorted(found)))}")
    return Recipe(where="linear", when=when, fill=LowRankIncrement(tensors))
