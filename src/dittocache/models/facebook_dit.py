"""Checkpoints of the original DiT (facebookresearch/DiT, arXiv 2212.09748) in diffusers' class, with equal outputs."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import DiTTransformer2DModel
from torch import Tensor


def load_facebook_dit(state: Mapping[str, Tensor], heads: int) -> DiTTransformer2DModel:
    """A `DiTTransformer2DModel` that computes what the original network with these weights computes.

    Sizes are read off the tensors. diffusers' class embeds time with a frequency shift of 1 where the original has
    none, and normalises with another epsilon; both are set to the original's here.

    Args:
        state: the original's state dict (`x_embedder`, `t_embedder`, `y_embedder`, `blocks.N`, `final_layer`).
        heads: number of attention heads, the one size that no tensor shows.

    Raises:
        ValueError: not a state dict of the original DiT.
    """
    try:
        patch = state["x_embedder.proj.weight"]
        width, channels, patch_size, _ = patch.shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
        tokens = state["pos_embed"].shape[1]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a state dict of the original DiT: {error}") from None
    if width % heads:
        raise ValueError(f"heads must divide the width {width}; got {heads}")
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=out_channels,
        num_layers=depth,
        sample_size=round(tokens**0.5) * patch_size,
        patch_size=patch_size,
        num_embeds_ada_norm=classes,
        norm_eps=1e-6,
    )
    missing, unexpected = model.load_state_dict(convert_facebook_dit(state), strict=False)
    left = [name for name in missing if not name.startswith("pos_embed.pos_embed")] + list(unexpected)
    if left:
        raise ValueError(f"not a state dict of the original DiT: {left[0]!r} does not fit")
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()


def convert_facebook_dit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors under the names of diffusers' `DiTTransformer2DModel`."""
    out: dict[str, Tensor] = {}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))

    def take(new: str, old: str, rows: tuple[int, int] | None = None) -> None:
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in state:
                tensor = state[f"{old}.{kind}"]
                out[f"{new}.{kind}"] = tensor if rows is None else tensor.chunk(rows[1])[rows[0]]

    take("pos_embed.proj", "x_embedder.proj")
    take("proj_out_1", "final_layer.adaLN_modulation.1")
    take("proj_out_2", "final_layer.linear")
    for n in range(depth):
        new, old = f"transformer_blocks.{n}", f"blocks.{n}"
        for part, source in (("linear_1", "mlp.0"), ("linear_2", "mlp.2")):
            take(f"{new}.norm1.emb.timestep_embedder.{part}", f"t_embedder.{source}")
        take(f"{new}.norm1.emb.class_embedder.embedding_table", "y_embedder.embedding_table")
        take(f"{new}.norm1.linear", f"{old}.adaLN_modulation.1")
        for row, name in enumerate(("to_q", "to_k", "to_v")):
            take(f"{new}.attn1.{name}", f"{old}.attn.qkv", (row, 3))
        take(f"{new}.attn1.to_out.0", f"{old}.attn.proj")
        take(f"{new}.ff.net.0.proj", f"{old}.mlp.fc1")
        take(f"{new}.ff.net.2", f"{old}.mlp.fc2")
    return out
