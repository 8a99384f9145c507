"""Which tokens does a partial step compute? Pure tensor mathematics: scores and selections, no models."""

from .tokens import (
    SELECTORS,
    Attended,
    AttentionReceived,
    Compress,
    CrossAttentionEntropy,
    LargeKeyNorm,
    LargeValueNorm,
    RandomTokens,
    Similarity,
    Straight,
    TokenNorm,
    ValueNorm,
    Which,
)

__all__ = [
    "SELECTORS",
    "Attended",
    "AttentionReceived",
    "Compress",
    "CrossAttentionEntropy",
    "LargeKeyNorm",
    "LargeValueNorm",
    "RandomTokens",
    "Similarity",
    "Straight",
    "TokenNorm",
    "ValueNorm",
    "Which",
]
