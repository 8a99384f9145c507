"""What stands in for what was not computed? Tensors in, tensors out."""

from .base import Entry, Fill
from .hold import Hold

__all__ = ["Entry", "Fill", "Hold"]
