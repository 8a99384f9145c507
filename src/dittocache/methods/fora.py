"""FORA (arXiv 2407.01425)."""

from typing import Annotated, Literal

from ..fill import Hold
from ..parameters import Int
from ..recipe import Recipe, method
from ..when import Every


@method(
    name="fora",
    title="FORA: Fast-Forward Caching in Diffusion Transformer Acceleration",
    arxiv="2407.01425",
    bibtex="""@article{selvaraju2024fora,
  title={FORA: Fast-Forward Caching in Diffusion Transformer Acceleration},
  author={Selvaraju, Pratheba and Ding, Tianyu and Chen, Tianyi and Zharkov, Ilya and Liang, Luming},
  journal={arXiv preprint arXiv:2407.01425},
  year={2024}
}""",
    settings={"DiT-XL/2 256, 50 steps": {"interval": 3}, "DiT-XL/2 256, 50 steps, mild": {"interval": 2}},
)
def fora(
    interval: Annotated[int, Int(1, help="every interval-th step is computed")] = 3,
    anchor: Annotated[
        Literal["end", "start"],
        "the last step is on the grid of computed steps, as in the authors' code, or the first, as in other papers",
    ] = "end",
) -> Recipe:
    """Every interval-th step is full; all others reuse attention and feed-forward outputs of every block."""
    return Recipe(where="module", when=Every(interval, anchor=anchor), fill=Hold())
