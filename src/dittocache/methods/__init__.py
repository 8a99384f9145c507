"""The published methods, one short file each: the composition, its defaults, settings per model, how to cite it."""

from . import duca, eb_cache, eoc, fora, goc, icc, l2c, none, toca

__all__ = ["duca", "eb_cache", "eoc", "fora", "goc", "icc", "l2c", "none", "toca"]
