"""STDiT3, the network of Open-Sora 1.2 (github.com/hpcaitech/Open-Sora): spatial and temporal blocks in turn.

The network under the state-dict names of the authors' release, written from its description, and its blocks' family.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..describe import Family, Layout, register_family, register_layout
from . import published
from .uvit import time_embedding

Rotation = tuple[Tensor, Tensor]  # cos and sin of the angles, both [frames, channels of a head / 2]
FREQUENCIES = 256  # channels of the sinusoids of time and of fps


class STDiT3Attention(nn.Module):
    """Self-attention in groups of tokens; rows of `qkv` are q, k, v, and in each by head; q and k are normalised."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, frames: int, rotation: Rotation | None = None) -> Tensor:
        """[batch, frames * tokens, width] to the same.

        Args:
            x: the tokens, frame by frame.
            frames: number of frames.
            rotation: given, every position attends along the frames, with q and k rotated; None: every frame within
                itself.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unflatten(1, (frames, -1))
        if rotation is not None:
            qkv = qkv.transpose(1, 2)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # [batch * groups, heads, members, channels]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (len(x), -1))
        return self.proj((x if rotation is None else x.transpose(1, 2)).flatten(1, 2))


class STDiT3CrossAttention(nn.Module):
    """Attention of image tokens to the text of their own row; rows of `kv_linear` are k, v, and in each by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, any number of tokens, width] to the same; text [batch, text, width], mask [batch, text] bool."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class STDiT3Mlp(nn.Module):
    """Two linear layers with the tanh GELU between them, token by token."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class STDiT3Block(nn.Module):
    """Self-attention and feed-forward with fresh scales, shifts and gates, and between them plain cross-attention.

    Spatial and temporal blocks are alike; the latter are given a rotation.
    """

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = STDiT3Attention(width, heads, qk_norm)
        self.cross_attn = STDiT3CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = STDiT3Mlp(width, hidden, width)

    def modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, gate of the attention, then of the feed-forward, each [batch, frames or 1, 1, width]."""
        return (self.scale_shift_table + time).unbind(-2)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        mask: Tensor | None,
        time: Tensor,
        frames: int,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """[batch, frames * tokens, width] to the same.

        Args:
            x: the tokens, frame by frame.
            text: [batch, text, width].
            mask: the text tokens that are seen, [batch, text] bool; None for all.
            time: six embeddings of time, [batch, frames or 1, 1, 6, width].
            frames: number of frames.
            rotation: for attention along the frames; None for attention within each frame.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)
        attended = self.attn(by_frame(self.norm1(x), 1 + scale1, shift1), frames, rotation)
        x = x + by_frame(attended, gate1)
        x = x + self.cross_attn(x, text, mask)
        return x + by_frame(self.mlp(by_frame(self.norm2(x), 1 + scale2, shift2)), gate2)


class STDiT3Embedder(nn.Module):
    """A number a row [batch] as an embedding [batch, width]: time, or frames a second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_embedding(values, FREQUENCIES).to(dtype))


class STDiT3Captions(nn.Module):
    """States of a text encoder as text of the network's width; `y_embedding` [tokens, channels] is the null text."""

    def __init__(self, channels: int, tokens: int, width: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)
        self.y_proj = STDiT3Mlp(channels, width, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class STDiT3Rope(nn.Module):
    """Angles by which temporal attention turns the channels of a head."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000 ** (-torch.arange(0, channels, 2) / channels))

    def forward(self, frames: int) -> Rotation:
        angles = torch.arange(frames, device=self.freqs.device).unsqueeze(-1) * self.freqs.float()
        return angles.cos(), angles.sin()


class STDiT3Final(nn.Module):
    """Norm, shift, scale and projection: [batch, tokens, width] to the pixels of every patch."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, pixels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time is [batch, frames or 1, width]."""
        shift, scale = (self.scale_shift_table + time[:, :, None, None]).unbind(-2)
        return self.linear(by_frame(self.norm_final(x), 1 + scale, shift))


class STDiT3(nn.Module):
    """The velocity prediction network; blocks run in the order spatial 0, temporal 0, spatial 1, temporal 1, ...

    Args:
        input_sq_size: side in pixels of the video that position embeddings are not scaled for.
        in_channels: channels of the (latent) video.
        patch_size: frames, rows and columns of a patch.
        hidden_size: width, a multiple of 4.
        depth: number of spatial blocks, and of temporal ones.
        num_heads: attention heads; the width of each is even.
        mlp_ratio: hidden width of the feed-forwards over `hidden_size`.
        pred_sigma: whether the output has a second half of channels, which samplers ignore.
        caption_channels: channels of the text encoder's states.
        model_max_length: tokens of the null text.
        qk_norm: whether q and k are normalised.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or num_heads < 1 or hidden_size % (2 * num_heads):
            raise ValueError(
                f"num_heads must divide hidden_size {hidden_size}, a multiple of 4, into even parts; got {num_heads}"
            )
        self.input_sq_size, self.in_channels, self.patch_size = input_sq_size, in_channels, patch_size
        self.hidden_size, self.caption_channels = hidden_size, caption_channels
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv3d(in_channels, hidden_size, patch_size, patch_size)))
        self.t_embedder = STDiT3Embedder(hidden_size)
        self.fps_embedder = STDiT3Embedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = STDiT3Captions(caption_channels, model_max_length, hidden_size)
        self.rope = STDiT3Rope(hidden_size // num_heads)

        def block() -> STDiT3Block:
            return STDiT3Block(hidden_size, num_heads, round(hidden_size * mlp_ratio), qk_norm)

        self.spatial_blocks = nn.ModuleList([block() for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([block() for _ in range(depth)])
        self.final_layer = STDiT3Final(hidden_size, math.prod(self.patch_size) * self.out_channels)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | float,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *,
        fps: Tensor | float,
        height: Tensor | float,
        width: Tensor | float,
    ) -> Tensor:
        """The predicted velocity [batch, channels, frames, rows, columns]; with `pred_sigma`, as many channels again.

        Sides that no whole number of patches fits into are padded with zeros at their ends, and the output is cut.

        Args:
            x: noisy (latent) videos [batch, channels, frames, rows, columns].
            timestep: 1000 times the time in (0, 1]; [batch], or one for all rows.
            y: states of the text encoder [batch, 1, text, channels]; `y_embedder.y_embedding` for no text.
            mask: not 0 where a text token is valid, [batch, text]; None if all are.
            x_mask: not 0 where a frame of patches is generated, [batch, frames]; the others are given, and seen at
                timestep 0. None if all are generated.
            fps: frames a second; [batch], or one for all rows.
            height, width: of the video in pixels, which scale the position embedding; [batch], or one for all rows.

        Raises:
            ValueError: an input of another shape, or a row without text.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [batch, {self.in_channels}, frames, rows, columns]; got {list(x.shape)}")
        batch, sides = len(x), x.shape[2:]
        frames, rows, columns = (-(-side // patch) for side, patch in zip(sides, self.patch_size))
        if y.ndim != 4 or y.shape[:2] != (batch, 1) or y.shape[3] != self.caption_channels:
            raise ValueError(f"y must be [{batch}, 1, text, {self.caption_channels}]; got {list(y.shape)}")
        for name, given, shape in (("mask", mask, (batch, y.shape[2])), ("x_mask", x_mask, (batch, frames))):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {list(given.shape)}")
        mask = None if mask is None else mask.bool()
        if mask is not None and not mask.any(1).all():
            raise ValueError("mask must leave every row a text token")
        timestep, fps, height, width = (
            _numbers(name, value, x)
            for name, value in (("timestep", timestep), ("fps", fps), ("height", height), ("width", width))
        )

        rate = self.fps_embedder(fps, x.dtype).unsqueeze(1)
        time = self.t_embedder(timestep, x.dtype).unsqueeze(1) + rate
        if x_mask is not None:
            start = self.t_embedder(torch.zeros_like(timestep), x.dtype).unsqueeze(1) + rate
            time = torch.where(x_mask.bool().unsqueeze(-1), time, start)
        six = self.t_block(time).unflatten(-1, (6, -1)).unsqueeze(2)
        text = self.y_embedder(y.squeeze(1))

        missing = [-side % patch for side, patch in zip(sides, self.patch_size)]
        patches = self.x_embedder(F.pad(x, [n for side in reversed(missing) for n in (0, side)]))
        scale = (height * width).sqrt() / self.input_sq_size
        places = position_embedding(rows, columns, scale, self.hidden_size).to(x)
        tokens = (patches.flatten(3).permute(0, 2, 3, 1) + places.unsqueeze(1)).flatten(1, 2)
        rotation = self.rope(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            tokens = spatial(tokens, text, mask, six, frames)
            tokens = temporal(tokens, text, mask, six, frames, rotation)

        out = self.final_layer(tokens, time)
        # a token's channels are (patch frame, patch row, patch column, output channel)
        out = out.unflatten(-1, (*self.patch_size, self.out_channels)).unflatten(1, (frames, rows, columns))
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        return out[:, :, : sides[0], : sides[1], : sides[2]]


def _numbers(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """One float32 number for every row of x [batch, ...], from as many or from one."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    if numbers.shape not in ((), (1,), (len(x),)):
        raise ValueError(f"{name} must be one number, or [{len(x)}]; got {list(numbers.shape)}")
    return numbers.expand(len(x))


def by_frame(x: Tensor, factor: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """x * factor + shift for tokens x [batch, frames * tokens, width], the others [batch, frames or 1, 1, width]."""
    return (x.unflatten(1, (factor.shape[1], -1)) * factor + shift).flatten(1, 2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding: neighbouring channels of x [..., frames, channels] turned by the angles of their frame."""
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rotation
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x)


def position_embedding(rows: int, columns: int, scale: Tensor, width: int) -> Tensor:
    """Sinusoids of a token's column, then of its row, on a grid that is stretched to a square: float32.

    Args:
        rows, columns: tokens of a frame.
        scale: size of the video over the size that the embedding is not scaled for, [batch].
        width: channels, a multiple of 4.

    Returns:
        [batch, rows * columns, width]: sin and cos of the column, sin and cos of the row, width / 4 channels each.
    """
    half = width // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2, device=scale.device) / half)

    def waves(side: int) -> Tensor:
        places = torch.arange(side, device=scale.device) / scale.unsqueeze(-1) * (round((rows * columns) ** 0.5) / side)
        angles = places.unsqueeze(-1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    both = waves(columns).unsqueeze(1).expand(-1, rows, -1, -1), waves(rows).unsqueeze(2).expand(-1, -1, columns, -1)
    return torch.cat(both, dim=-1).flatten(1, 2)


def load_stdit3(state: Mapping[str, Tensor], heads: int) -> STDiT3:
    """An `STDiT3` with the weights of the authors' release: float32, however they are kept, on the CPU, in eval mode.

    Args:
        state: the release's state dict; sizes are read off its tensors, and these are copied.
        heads: number of attention heads; `rope.freqs` must agree.

    Raises:
        ValueError: not a state dict of STDiT3, or heads that do not divide its width.
    """
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        width, channels, *patch = shapes["x_embedder.proj.weight"]
        text, caption_channels = shapes["y_embedder.y_embedding"]
        (pixels,) = shapes["final_layer.linear.bias"]
        hidden = shapes["spatial_blocks.0.mlp.fc1.weight"][0]
        if len(patch) != 3 or 0 in (width, channels, *patch):
            raise ValueError(f"'x_embedder.proj.weight' is {(width, channels, *patch)}")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"not a state dict of STDiT3: {error}") from None
    if not isinstance(heads, int) or heads < 1 or width % (2 * heads):
        raise ValueError(f"heads must divide the width {width} into even parts; got {heads!r}")
    with torch.device("meta"):
        model = STDiT3(
            in_channels=channels,
            patch_size=(patch[0], patch[1], patch[2]),
            hidden_size=width,
            depth=len({name.split(".")[1] for name in shapes if name.startswith("spatial_blocks.")}),
            num_heads=heads,
            mlp_ratio=hidden / width,
            pred_sigma=pixels == 2 * channels * math.prod(patch),
            caption_channels=caption_channels,
            model_max_length=text,
            qk_norm="spatial_blocks.0.attn.q_norm.weight" in shapes,
        )
    published.load(model, state, "STDiT3")
    return model


def reuse_block(
    block: STDiT3Block,
    features: dict[str, tuple[Tensor, ...]],
    x: Tensor,
    text: Tensor,
    mask: Tensor | None,
    time: Tensor,
    frames: int,
    rotation: Any = None,
) -> Tensor:
    """The block from kept outputs: fresh gates and additions; cross-attention is computed where it is not kept."""
    _, _, gate1, _, _, gate2 = block.modulation(time)
    x = x + by_frame(features["attn"][0], gate1)
    x = x + (features["cross_attn"][0] if "cross_attn" in features else block.cross_attn(x, text, mask))
    return x + by_frame(features["mlp"][0], gate2)


register_family(
    Family(blocks=("STDiT3Block",), reuse_block=reuse_block, ff_input=lambda block: "norm2", package="dittocache")
)
register_layout(Layout(models=("STDiT3",), interleaved=(("spatial_blocks", "temporal_blocks"),), package="dittocache"))
