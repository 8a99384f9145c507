"""TaylorSeer (arXiv 2503.06923), as its authors run it and as diffusers does."""

from typing import Annotated, Literal

from ..fill import Taylor
from ..parameters import Int
from ..recipe import Recipe, method
from ..when import Counter, Warmup


@method(
    name="taylorseer",
    title="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
    arxiv="2503.06923",
    bibtex="""@inproceedings{liu2025taylorseer,
  title={From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers},
  author={Liu, Jiacheng and Zou, Chang and Lyu, Yuanhuiyi and Chen, Junjie and Zhang, Linfeng},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  note={arXiv:2503.06923}
}""",
    settings={
        "DiT-XL/2 256, DDIM 50 steps": {"interval": 4, "order": 4, "first_full": 2},
        "DiT-XL/2 256, DDIM 50 steps, mild": {"interval": 3, "order": 3, "first_full": 2},
        "FLUX.1-dev, 50 steps": {"interval": 6, "order": 1, "first_full": 3},
        "Qwen-Image": {"interval": 6, "order": 1, "first_full": 3},
        "HunyuanVideo, Wan 2.1": {"interval": 5, "order": 1, "first_full": 1},
        "HiDream-I1": {"interval": 4, "order": 2, "first_full": 1},
        "HunyuanImage 2.1, lite": {"interval": 5, "order": 2, "first_full": 3, "lite": True},
        "diffusers' hook": {"interval": 5, "order": 1, "schedule": "diffusers", "sites": "attention"},
    },
)
def taylorseer(
    interval: Annotated[int, Int(1, help="every interval-th step is computed")] = 4,
    order: Annotated[int, Int(0, help="highest power of the series; 0 holds the last output")] = 4,
    first_full: Annotated[
        int,
        Int(
            1,
            help="steps computed at the start; with 3 or more, all but the last two of them "
            "are left out of the differences (authors' schedule)",
        ),
    ] = 2,
    schedule: Annotated[
        Literal["authors", "diffusers"], "computed every interval-th step after the first ones, or as diffusers' hook"
    ] = "authors",
    warmup_steps: Annotated[int, Int(1, help="steps computed at the start (diffusers' schedule)")] = 3,
    disable_after: Annotated[
        int | None, Int(0, help="from this step on all are computed (diffusers' schedule); None for never")
    ] = None,
    sites: Annotated[Literal["module", "attention"], "attention and feed-forward are forecast, or attention only"] = (
        "module"
    ),
    lite: Annotated[bool, "forecast what the network returns instead, which keeps one site only"] = False,
) -> Recipe:
    """Between full steps, outputs go on along a Taylor series of their last differences."""
    if lite and sites != "module":
        raise ValueError(f"lite forecasts what the network returns: sites does not go with it; got sites={sites!r}")
    authors = schedule == "authors"
    return Recipe(
        where="model" if lite else sites,
        when=Counter(interval, first_full) if authors else Warmup(interval, warmup_steps, disable_after),
        fill=Taylor(order, start=max(first_full - 2, 0) if authors else 0),
    )
