"""U-ViT (All are Worth Words, arXiv 2209.12152): a plain transformer over time, label and patches, with long skips.

The network under the state-dict names of the authors' release, written from its description, and its blocks' family.
The sampler that the release uses for latent ImageNet models is in `dpm_solver`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..describe import Family, register_family
from . import published


class UViTAttention(nn.Module):
    """Self-attention; rows of `qkv` are q, k, v, and in each by head. [batch, tokens, width] to the same."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UViTMlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them. [batch, tokens, width] to the same, token by token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class UViTBlock(nn.Module):
    """A pre-norm block without gates or modulation; in the second half of the network it first joins a long skip."""

    def __init__(self, width: int, heads: int, hidden: int, qkv_bias: bool, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = UViTAttention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = UViTMlp(width, hidden)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def join(self, x: Tensor, skip: Any) -> Tensor:
        """The input with the long skip in it, both [batch, tokens, width]; without `skip_linear`, the input."""
        return x if self.skip_linear is None else self.skip_linear(torch.cat([x, skip], dim=-1))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.join(x, skip)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """The noise prediction network; its blocks run in the order `in_blocks`, `mid_block`, `out_blocks`.

    Args:
        img_size, patch_size: sides of the (latent) image and of a patch in pixels; the one divides the other.
        in_chans: channels of the image, and of the output.
        embed_dim: width, even and a multiple of `num_heads`.
        depth: number of blocks besides `mid_block`, half of them before and half after it.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forwards over `embed_dim`.
        qkv_bias: whether the projection to q, k and v has a bias.
        mlp_time_embed: whether the time token goes through an mlp (`time_embed`).
        num_classes: rows of `label_emb`, the null label among them; 0 or less for a network without labels.
        conv: whether a 3 x 3 convolution (`final_layer`) ends the network.
        skip: whether the long skips exist.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        embed_dim: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = 1001,
        conv: bool = False,
        skip: bool = True,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size {patch_size}; got {img_size}")
        if embed_dim % 2 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, an even number; got {num_heads}")
        if depth % 2:
            raise ValueError(f"depth must be even, since mid_block is not counted; got {depth}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.embed_dim, self.num_classes = embed_dim, max(num_classes, 0)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)))
        layers = [nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim)]
        self.time_embed = nn.Sequential(*(layers if mlp_time_embed else []))
        self.label_emb = nn.Embedding(num_classes, embed_dim) if self.num_classes else None
        self.extras = 2 if self.num_classes else 1
        self.pos_embed = nn.Parameter(torch.empty(1, self.extras + (img_size // patch_size) ** 2, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

        def block(joins: bool) -> UViTBlock:
            return UViTBlock(embed_dim, num_heads, round(embed_dim * mlp_ratio), qkv_bias, joins)

        self.in_blocks = nn.ModuleList([block(False) for _ in range(depth // 2)])
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList([block(skip) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The predicted noise [batch, channels, height, width].

        Args:
            x: noisy (latent) images [batch, channels, height, width].
            timesteps: 1000 times the time in (0, 1], whole or fractional; [batch], or one for all rows.
            y: labels [batch], int64; None for a network without labels.

        Raises:
            ValueError: images of another size, or labels where there are none, or none where there are.
        """
        size = (self.in_chans, self.img_size, self.img_size)
        if x.shape[1:] != size:
            raise ValueError(f"x must be [batch, {', '.join(map(str, size))}]; got {list(x.shape)}")
        if (y is None) != (self.label_emb is None):
            wanted, got = ("labels [batch]", "None") if y is None else ("None: the network has no labels", "labels")
            raise ValueError(f"y must be {wanted}; got {got}")
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)  # patches row by row
        embedding = time_embedding(timesteps.expand(len(x)), self.embed_dim).to(tokens)
        tokens = torch.cat([self.time_embed(embedding).unsqueeze(1), tokens], dim=1)
        if self.label_emb is not None:
            tokens = torch.cat([self.label_emb(y).unsqueeze(1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens))[:, self.extras :]
        rows = self.img_size // self.patch_size
        # a token's channels are (patch row, patch column, image channel)
        patches = patches.unflatten(-1, (self.patch_size, self.patch_size, -1)).unflatten(1, (rows, rows))
        return self.final_layer(patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape))


def time_embedding(timesteps: Tensor, width: int) -> Tensor:
    """cos, then sin, of the timesteps [batch] at width / 2 frequencies 10000^(-2j / width): [batch, width], float32."""
    half = torch.arange(width // 2, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float().unsqueeze(-1) * torch.exp(-math.log(10000) * half / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def load_uvit(state: Mapping[str, Tensor], heads: int) -> UViT:
    """A `UViT` with the weights of the authors' release: float32, whatever they are kept in, on the CPU, in eval mode.

    Args:
        state: the release's state dict; sizes are read off its tensors, and these are copied.
        heads: number of attention heads, the one size that no tensor shows.

    Raises:
        ValueError: not a state dict of U-ViT, or heads that do not divide its width.
    """
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        width, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
        classes = shapes.get("label_emb.weight", (0,))[0]
        grid = math.isqrt(shapes["pos_embed"][1] - (2 if classes else 1))
        hidden = shapes["mid_block.mlp.fc1.weight"][0]
        if 0 in (width, channels, patch_size):
            raise ValueError("'patch_embed.proj.weight' is empty")
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"not a state dict of U-ViT: {error}") from None
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width}; got {heads!r}")
    with torch.device("meta"):
        model = UViT(
            img_size=grid * patch_size,
            patch_size=patch_size,
            in_chans=channels,
            embed_dim=width,
            depth=2 * len({name.split(".")[1] for name in shapes if name.startswith("in_blocks.")}),
            num_heads=heads,
            mlp_ratio=hidden / width,
            qkv_bias="mid_block.attn.qkv.bias" in shapes,
            mlp_time_embed="time_embed.0.weight" in shapes,
            num_classes=classes,
            conv="final_layer.weight" in shapes,
            skip="out_blocks.0.skip_linear.weight" in shapes,
        )
    published.load(model, state, "U-ViT")
    return model


def reuse_block(block: UViTBlock, features: dict[str, tuple[Tensor, ...]], x: Tensor, skip: Any = None) -> Tensor:
    """The block from kept outputs: the long skip and two additions. x and skip are [batch, tokens, width]."""
    return block.join(x, skip) + features["attn"][0] + features["mlp"][0]


register_family(
    Family(blocks=("UViTBlock",), reuse_block=reuse_block, ff_input=lambda block: "norm2", package="dittocache")
)
