"""What calibrated methods need: statistics of uncached runs, and the recipes that are made of them."""

from . import eb_cache, eoc, goc, icc
from .base import CALIBRATORS, Calibrator, make
from .run import calibrate, fit, merged, record, shard
from .setup import Setup
from .statistics import Statistics, merge

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "Setup",
    "Statistics",
    "calibrate",
    "eb_cache",
    "eoc",
    "fit",
    "goc",
    "icc",
    "make",
    "merge",
    "merged",
    "record",
    "shard",
]
