"""Paired evaluation: the same pictures drawn with and without caching, how much faster, how close, on one page."""

from .compare import Row, compare, standard_rows
from .comparison import Comparison, Result
from .metrics import accuracy, frechet_distance, psnr, ssim
from .page import write_page

__all__ = [
    "Comparison",
    "Result",
    "Row",
    "accuracy",
    "compare",
    "frechet_distance",
    "psnr",
    "ssim",
    "standard_rows",
    "write_page",
]
