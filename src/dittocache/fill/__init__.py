"""What stands in for what was not computed? Tensors in, tensors out."""

from .aligned import Aligned
from .base import At, Entry, Features, Fill
from .chosen import Chosen
from .gradient import GradientQueue
from .hold import Hold
from .increment import LowRankIncrement
from .linear import Linear
from .taylor import Forecast, Taylor
from .trend import Trend

__all__ = [
    "Aligned",
    "At",
    "Chosen",
    "Entry",
    "Features",
    "Fill",
    "Forecast",
    "GradientQueue",
    "Hold",
    "Linear",
    "LowRankIncrement",
    "Taylor",
    "Trend",
]
