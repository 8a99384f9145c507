"""Classes that make sound, embeddings of pictures, and proteins."""

from __future__ import annotations

from typing import Any

import torch

from .base import TEXT, Draw, Entry, entry, rotary

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SIZES: dict[str, Any] = {"sizes": (16, 24)}  # the length


def _protein(d: Draw) -> dict[str, Any]:
    real = torch.ones(d.batch, d.size, dtype=torch.bool)
    return {
        "bb_ca": d.latents(d.size, 3, name="backbone"),
        "local_latents": d.latents(d.size, 4),
        "bb_ca_time": d.time(1),
        "local_latents_time": d.time(1),
        "padding_mask": real,
        "token_type": d.numbers("type", 7, d.size),
        "conditioning": {
            "is_in_context_conditioning": ~real,
            "supports_local_latent": real,
            "molecule_iid": d.numbers("molecule", 2, d.size),
        },
    }


OTHER: list[Entry] = [
    entry(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 9,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": 12,
        },
        lambda model, d: {
            "hidden_states": d.latents(2 * d.size, 4),
            "timestep": d.time(1),
            "timestep_r": d.time(1),
            "encoder_hidden_states": d.text(12),
            "context_latents": d.noise("context", 2 * d.size, 5),
        },
        "layers",
        time=("timestep", "timestep_r"),
        conditions=("encoder_hidden_states", "context_latents"),
        **SIZES,
    ),
    entry(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4},
        lambda model, d: {
            "hidden_states": d.latents(d.size, 4),
            "encoder_hidden_states": d.text(12),
            "encoder_attention_mask": d.mask(),
            "timestep": d.time(1),
            "attention_mask": d.mask(d.size).bool(),
            "latent_cond": d.noise("sound before", d.size, 4),
        },
        "blocks",
        conditions=("encoder_hidden_states", "latent_cond"),
        **SIZES,
    ),
    entry(
        "MiniMaxMusic3Transformer1DModel",
        {**HEADS, "in_channels": 4, "condition_dim": 12, "num_layers": 3, "ff_inner_dim": 48}
        | {"rotary_dim": 8, "fourier_embedding_dim": 16},
        lambda model, d: {
            "hidden_states": d.latents(4, d.size),
            "timestep": d.time(1),
            "encoder_hidden_states": d.text(12, d.size),
        },
        "transformer_blocks",
        **SIZES,
    ),
    entry(
        "StableAudioDiTModel",
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 10,
            "cross_attention_input_dim": 12,
        },
        lambda model, d: {
            "hidden_states": d.latents(4, d.size),
            "timestep": d.time(1),
            "encoder_hidden_states": d.text(12),
            "global_hidden_states": d.text(10, 1, "global"),
            "rotary_embedding": rotary(d.size + 1, 8),
        },
        "transformer_blocks",
        conditions=("encoder_hidden_states", "global_hidden_states"),
        **SIZES,
    ),
    entry(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "cond_token_dim": 12,
            "global_cond_dim": 10,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 3,
        },
        lambda model, d: {
            "hidden_states": d.latents(4, d.size),
            "timestep": d.time(1),
            "encoder_hidden_states": d.text(12),
            "global_hidden_states": d.noise("global", 10),
            "local_add_cond": d.noise("sound before", 5, d.size),
        },
        "transformer_blocks",
        conditions=("encoder_hidden_states", "global_hidden_states", "local_add_cond"),
        **SIZES,
    ),
    entry(
        "T5FilmDecoder",
        {"input_dims": 4, "targets_length": 32, "d_model": 32, "num_layers": 3, "num_heads": 2, "d_kv": 16, "d_ff": 48},
        lambda model, d: {
            "encodings_and_masks": [(d.text(32), d.mask()), (d.text(32, 5, "notes"), d.mask(5))],
            "decoder_input_tokens": d.latents(d.size, 4),
            "decoder_noise_time": d.time(1),
        },
        "decoders",
        latents=("decoder_input_tokens",),
        time=("decoder_noise_time",),
        conditions=("encodings_and_masks",),
        **SIZES,
    ),
    entry(
        "PriorTransformer",
        {**HEADS, "num_layers": 3, "embedding_dim": 12, "num_embeddings": TEXT},
        lambda model, d: {
            "hidden_states": d.latents(12),
            "timestep": d.time(),
            "proj_embedding": d.noise("pooled", 12),
            "encoder_hidden_states": d.text(12),
            "attention_mask": d.mask().bool(),
        },
        "transformer_blocks",
        conditions=("proj_embedding", "encoder_hidden_states"),
        sizes=(1,),  # one embedding
    ),
    entry(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 4,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 4,
            "token_type_emb_dim": 8,
            "t_emb_dim": 16,
            "xt_pair_dist_dim": 6,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "molecule_idx_pair"),
            "tri_mult_c": 8,
            "num_sequence_classes": 9,
        },
        lambda model, d: _protein(d),
        "transformer_layers",
        latents=("bb_ca", "local_latents"),
        time=("bb_ca_time", "local_latents_time"),
        conditions=("token_type", "conditioning"),
        **SIZES,
    ),
]
