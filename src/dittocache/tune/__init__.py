"""Search for the plan that loses the least at a budget."""

from .path import Paths, cheapest

__all__ = ["Paths", "cheapest"]
