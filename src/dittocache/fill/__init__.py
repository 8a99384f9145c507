"""What stands in for what was not computed? Tensors in, tensors out."""

from .base import At, Entry, Fill
from .gradient import GradientQueue
from .hold import Hold
from .increment import LowRankIncrement
from .trend import Trend

__all__ = ["At", "Entry", "Fill", "GradientQueue", "Hold", "LowRankIncrement", "Trend"]
