"""LeMiCa (arXiv 2511.00090)."""

from ..fill import Hold
from ..recipe import Recipe, method
from .dpcache import FullSteps, NumSteps, others


@method(
    name="lemica",
    title="LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation",
    arxiv="2511.00090",
    bibtex="""@inproceedings{gao2025lemica,
  title={LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation},
  author={Gao, Huanlin and Chen, Ping and Shi, Fuyuan and Tan, Chao and Liu, Zhaoxiang and Zhao, Fang and Wang, Kai and
    Lian, Shiguo},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
  note={arXiv:2511.00090}
}""",
    needs="calibration",
    settings={
        "FLUX.1-dev, 50 steps, B = 15": {
            "full_steps": (0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 27, 34, 41, 47, 49),
            "num_steps": 50,
        },
        "FLUX.1-dev, Qwen-Image, 50 steps, B = 10": {
            "full_steps": (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
            "num_steps": 50,
        },
        "Wan2.1 T2V 14B, 50 steps, B = 17": {
            "full_steps": (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 22, 29, 36, 43, 47, 49),
            "num_steps": 50,
        },
        "Wan2.1 I2V 14B, 40 steps, B = 14": {
            "full_steps": (0, 1, 2, 3, 4, 6, 8, 11, 15, 22, 29, 34, 37, 39),
            "num_steps": 40,
        },
        "HunyuanVideo-1.5, 50 steps, B = 15": {
            "full_steps": (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 25, 33, 41, 49),
            "num_steps": 50,
        },
        "Z-Image, 10 steps, B = 7": {"full_steps": (0, 1, 2, 4, 6, 8, 9), "num_steps": 10},
    },
)
def lemica(full_steps: FullSteps = None, num_steps: NumSteps = 50) -> Recipe:
    """At steps that a planner chose, all is computed; between them the change over all blocks is reused."""
    return Recipe(where="stack", keeps="change", when=others("lemica", full_steps, num_steps), fill=Hold())
