"""The published methods, one short file each: the composition, its defaults, settings per model, how to cite it."""

from . import duca, fora, none, toca

__all__ = ["duca", "fora", "none", "toca"]
