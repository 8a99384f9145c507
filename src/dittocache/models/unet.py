"""U-Nets of diffusers' UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL): what lies below each skip branch.

Skip sources are numbered as the forward makes them: 0 is `conv_in`, then every pair of resnet and attention and every
downsampler on the way down. The up path takes them back in reverse. The span `deep.b` is everything between source b
and the place where it is taken back; what leaves the span is the one tensor that source b is joined with (DeepCache,
arXiv 2312.00858). With two pairs to a level, b is the branch number of the authors' plug-in.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from ..describe import Block, Description, Family, Layout, Site, Span, register_layout

# levels of which the forward is pairs in turn, then resampling, and one skip for each
LEVELS = {
    "DownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D",
    "UpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D",
    "UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn",
}  # fmt: skip


def spans(unet: Any, description: Description) -> list[Span] | None:
    """Spans `deep.0` to `deep.N`, the widest first, then every resnet, attention and resampler on its own.

    Attentions are the blocks of a U-Net, and keep the shape of what they are given. None where a level is of a kind
    whose skips are not known.
    """
    levels = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    if any(type(level).__name__ not in LEVELS for level in levels):
        return None
    down: list[list[str]] = []  # what makes source 1, 2, ...
    for q, level in enumerate(unet.down_blocks):
        down += [*_pairs(f"down_blocks.{q}", level), _listed(f"down_blocks.{q}.downsamplers", level)]
    down = [made for made in down if made]  # the deepest level has no downsampler
    middle = _pairs("mid_block", unet.mid_block)
    up: list[list[str]] = []  # what follows on the last source, the one before, ...
    for q, level in enumerate(unet.up_blocks):
        up += _pairs(f"up_blocks.{q}", level)
        up[-1] += _listed(f"up_blocks.{q}.upsamplers", level)
    numbers = {path: n for n, path in enumerate(chain(*down, *middle, *up), len(description.blocks))}
    singles = [_single(unet, path, n, description) for path, n in numbers.items()]
    deep = []
    for b in range(len(up)):
        members = [*chain(*down[b:], *middle, *up[: len(up) - 1 - b])]
        if members:
            site = Site(f"deep.{b}", "deep", "deep", b, len(up), numbers[members[-1]])
            deep.append(Span(site, tuple(numbers[path] for path in members)))
    return deep + singles


def _pairs(prefix: str, level: Any) -> list[list[str]]:
    """Paths of each resnet of a level with the attention that follows on it, if there is one."""
    if level is None:
        return []
    attentions = {l for l, module in enumerate(getattr(level, "attentions", None) or ()) if module is not None}
    return [
        [f"{prefix}.resnets.{l}", *([f"{prefix}.attentions.{l}"] if l in attentions else [])]
        for l in range(len(level.resnets))
    ]


def _listed(prefix: str, level: Any) -> list[str]:
    """Paths of a level's down- or upsamplers; none at the deepest or the last."""
    return [f"{prefix}.{l}" for l in range(len(getattr(level, prefix.rpartition(".")[2], None) or ()))]


def _single(unet: Any, path: str, n: int, description: Description) -> Span:
    """Adds the block at a path, number n, and returns the span that it is on its own."""
    module, (stack, _, l) = unet.get_submodule(path), path.rpartition(".")
    kind = {"attentions": "block", "resnets": "resnet"}.get(stack.rpartition(".")[2], "resample")
    family = Family(blocks=(type(module).__name__,))
    description.blocks.append(Block(module, path, (), family, reshapes=kind != "block"))
    return Span(Site(path, kind, stack, int(l), len(unet.get_submodule(stack)), n), (n,))


register_layout(
    Layout(models=("UNet2DConditionModel", "UNet2DModel"), order=("down_blocks", "mid_block", "up_blocks"), spans=spans)
)
