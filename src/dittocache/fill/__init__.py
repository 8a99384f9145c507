"""What stands in for what was not computed? Tensors in, tensors out."""

from .aligned import Aligned
from .base import At, Entry, Features, Fill
from .gradient import GradientQueue
from .hold import Hold
from .increment import LowRankIncrement
from .linear import Linear
from .taylor import Forecast, Orders, Taylor
from .trend import Trend

__all__ = [
    "Aligned",
    "At",
    "Entry",
    "Features",
    "Fill",
    "Forecast",
    "GradientQueue",
    "Hold",
    "Linear",
    "LowRankIncrement",
    "Orders",
    "Taylor",
    "Trend",
]
