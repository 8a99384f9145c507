"""Token scores and selections of ToCa and DuCa (arXiv 2410.05317, 2412.18911) as pure tensor functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(score: Tensor) -> Tensor:
    """Scales scores [batch, tokens] to unit L2 norm over the tokens of each row."""
    return F.normalize(score, dim=-1)


def attention_received(
    query: Tensor, key: Tensor, scale: float, chunk: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """How much attention every token receives: column sums of the head-averaged softmax map.

    Queries are taken in chunks, so that the largest temporary is [batch, heads, chunk, tokens]; also faster than
    the whole map, which does not fit into a cache.

    Args:
        query: [batch, heads, queries, channels].
        key: [batch, heads, tokens, channels].
        scale: factor of the logits, usually channels ** -0.5.
        chunk: number of queries at a time; None for a quarter of them, at most 128.
        mask: added to the logits, broadcastable to [batch, heads, queries, tokens]; optional.

    Returns:
        [batch, tokens], float32.
    """
    chunk = chunk or min(128, -(-query.shape[2] // 4))
    received = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
    for start in range(0, query.shape[2], chunk):
        logits = (query[:, :, start : start + chunk] * scale) @ key.transpose(-2, -1)
        if mask is not None:
            logits = logits + (mask[..., start : start + chunk, :] if mask.shape[-2] > 1 else mask)
        received += logits.softmax(-1, dtype=torch.float32).mean(1).sum(1)
    return received


def value_norms(norms: Tensor) -> Tensor:
    """Raw score [batch, tokens] from value norms [batch, heads, tokens]: sum over heads of 1 - norm, small ones win."""
    return (1 - norms).sum(1)


def mean_norms(vectors: Tensor) -> Tensor:
    """Raw score [batch, tokens] from vectors [batch, heads, tokens, channels]: mean norm over the heads, large wins."""
    return vectors.norm(dim=-1).float().mean(1)


def attention_map(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Head-averaged softmax map [batch, queries, tokens], float32; arguments as in `attention_received`."""
    logits = (query * scale) @ key.transpose(-2, -1)
    return (logits if mask is None else logits + mask).softmax(-1, dtype=torch.float32).mean(1)


def cross_attention_entropy(attention_map: Tensor) -> Tensor:
    """Score from a cross-attention map [batch, tokens, text], first half of the batch one guidance half (ToCa s2).

    The halves are averaged column by column, E = -sum M log(M + 1e-7), and the normalised 1 + E serves both.
    """
    half = attention_map.unflatten(0, (2, -1)).mean(0)
    entropy = -(half * torch.log(half + 1e-7)).sum(-1)
    return normalize(1 + entropy).repeat(2, 1)


def entropy_rows(attention_map: Tensor, halves: int) -> Tensor:
    """Entropy [rows, tokens] of maps [rows, tokens, text] whose rows attend to texts of their own.

    In the authors' layout all texts stand side by side, so the mean over the guidance halves is 1/halves times each of
    them, and the entropies of the rows of a sample add up.
    """
    share = attention_map / halves
    return -(share * torch.log(share + 1e-7)).sum(-1)


def spatial_bonus(score: Tensor, grid: tuple[int, int], cell: int, bonus: float) -> Tensor:
    """Multiplies the highest score of every cell of `cell` x `cell` neighbouring tokens by 1 + bonus.

    Args:
        score: [batch, tokens], tokens row by row on the grid.
        grid: (height, width) in tokens; both multiples of `cell`.
        cell: side of a cell in tokens.
        bonus: a negative maximum becomes smaller, as in the authors' code.
    """
    rows, columns = grid[0] // cell, grid[1] // cell
    cells = score.reshape(-1, rows, cell, columns, cell).transpose(2, 3).reshape(-1, rows, columns, cell * cell)
    best = cells.argmax(-1, keepdim=True)
    cells = cells.scatter(-1, best, cells.gather(-1, best) * (1 + bonus))
    return cells.reshape(-1, rows, columns, cell, cell).transpose(2, 3).reshape(score.shape)


def select(score: Tensor, count: int) -> Tensor:
    """Indices [batch, count] of the highest scores [batch, tokens], best first; equal scores in order of index."""
    return score.argsort(dim=-1, descending=True, stable=True)[:, :count]
