"""What calibrated methods need: statistics of uncached runs, and the recipes that are made of them."""

from . import block_caching, dpcache, eb_cache, eoc, goc, icc, lemica, magcache, teacache
from .base import CALIBRATORS, Calibrator, make
from .run import calibrate, fit, merged, record, shard
from .setup import Setup
from .statistics import Statistics, merge

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "Setup",
    "Statistics",
    "block_caching",
    "calibrate",
    "dpcache",
    "eb_cache",
    "eoc",
    "fit",
    "goc",
    "icc",
    "lemica",
    "magcache",
    "make",
    "merge",
    "merged",
    "record",
    "shard",
    "teacache",
]
