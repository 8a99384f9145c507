"""The text encoder of the bundled text-to-image model: hashed words and letter triples, one token per word.

A word is the sum of the rows of its own hash and of those of its letter triples, so that words which share a stem, and
words never seen in training, land near one another (Bojanowski et al. 2017, arXiv:1607.04606, section 3).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

PADDING, START = 0, 1  # rows of the table that no word hashes to
ROWS = 4096  # of the table
MAX_WORDS = 11  # of a text
PIECES = 16  # of a word: itself and up to 15 triples


def words(text: str) -> list[str]:
    """Lower-case words of a text without accents; "#" and "*" count as words, other punctuation is dropped."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+|[#*]", plain)


@lru_cache(maxsize=16384)
def pieces(word: str, rows: int) -> tuple[int, ...]:
    """Rows of a table of `rows` rows for a word: its own, then those of its triples ("cat": <ca, cat, at>)."""
    marked = f"<{word}>"
    parts = [f"={word}", *(marked[i : i + 3] for i in range(len(marked) - 2))][:PIECES]
    return tuple(START + 1 + zlib.crc32(part.encode()) % (rows - START - 1) for part in parts)


def tokenize(texts: Sequence[str], rows: int = ROWS, max_words: int = MAX_WORDS) -> torch.Tensor:
    """Rows of the table, int64 [n, 1 + max_words, PIECES], padded with 0: a start token, then the words.

    What comes after `max_words` words is cut off; an empty text is the start token alone.
    """
    ids = torch.full((len(texts), 1 + max_words, PIECES), PADDING)
    ids[:, 0, 0] = START
    for text, target in zip(texts, ids):
        for word, token in zip(words(text), target[1:]):
            found = pieces(word, rows)
            token[: len(found)] = torch.tensor(found)
    return ids


class HashedTextEncoder(ModelMixin, ConfigMixin):
    """What `tokenize` returns to features for cross-attention: one token per word."""

    @register_to_config
    def __init__(self, rows: int = ROWS, width: int = 64, max_words: int = MAX_WORDS):
        super().__init__()
        self.table = nn.Embedding(rows, width, padding_idx=PADDING)
        self.position = nn.Parameter(torch.randn(1 + max_words, width) * 0.1)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, 1 + max_words, width] of int64 [n, 1 + max_words, PIECES] and their mask, 1 where a word is."""
        used = (ids != PADDING).sum(-1, keepdim=True)
        # Divided by the root of the number of pieces: a long word is as loud as a short one.
        summed = self.table(ids).sum(2)
        summed = summed * used.clamp_min(1).to(summed.dtype).rsqrt()
        mask = (used[..., 0] > 0).to(summed.dtype)
        return self.norm(summed + self.position) * mask[..., None], mask
