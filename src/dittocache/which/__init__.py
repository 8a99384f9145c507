"""Which tokens does a partial step compute? Pure tensor mathematics: scores and selections, no models."""

from .tokens import (
    SELECTORS,
    AttentionReceived,
    Compress,
    RandomTokens,
    Similarity,
    Straight,
    TokenNorm,
    ValueNorm,
    Which,
)

__all__ = [
    "SELECTORS",
    "AttentionReceived",
    "Compress",
    "RandomTokens",
    "Similarity",
    "Straight",
    "TokenNorm",
    "ValueNorm",
    "Which",
]
