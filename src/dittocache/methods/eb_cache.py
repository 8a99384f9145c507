"""EB-Cache / FEB-Cache (arXiv 2503.07120)."""

from typing import Annotated, Literal

from ..fill import Hold
from ..fix import NoiseScale
from ..parameters import Int, Number, Steps
from ..recipe import Recipe, method
from ..when import States


@method(
    name="eb-cache",
    title="Exposure Bias Reduction for Enhancing Diffusion Transformer Feature Caching (later: FEB-Cache)",
    arxiv="2503.07120",
    bibtex="""@article{zou2025ebcache,
  title={Exposure Bias Reduction for Enhancing Diffusion Transformer Feature Caching},
  author={Zou, Zhen and Yu, Hu and Xiao, Jie and Zhao, Feng},
  journal={arXiv preprint arXiv:2503.07120},
  year={2025}
}""",
    settings={
        "DiT-XL/2 256, DDPM 50 steps, the shipped script": {"table_order": "index", "noise_scale": 0.965},
        "DiT-XL/2 256, the paper's b(t)": {"noise_bias": True},
    },
)
def eb_cache(
    table: Annotated[
        tuple[int, ...] | None,
        Steps(
            0,
            3,
            help="state of every step: 0 full, 1 reuse attention, 2 reuse both, 3 reuse the feed-forward; "
            "None for the authors' schedule",
        ),
    ] = None,
    interval: Annotated[int, Int(1, help="base interval of the authors' schedule")] = 1,
    table_order: Annotated[
        Literal["sampling", "index"],
        "entry k is step k, as the schedule was designed, or counts from the end, as the release reads it",
    ] = "sampling",
    noise_scale: Annotated[
        float, Number(0, help="the predicted noise is divided by it at every step; the authors' script has 0.965")
    ] = 1.0,
    noise_bias: Annotated[bool, "multiply the predicted noise with the paper's b(t) (version 3)"] = False,
) -> Recipe:
    """A table of step states, reuse where it is noisy, and predicted noise rescaled against exposure bias."""
    fix = NoiseScale(noise_scale, noise_bias) if noise_bias or noise_scale != 1 else None
    return Recipe(where="module", when=States(table, interval, table_order), fill=Hold(), fix=fix)
