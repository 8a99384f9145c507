"""Search for the plan that loses the least at a budget."""

from .errors import StepErrors, measure
from .path import Paths, cheapest
from .plan import candidates, loss, planned, search, solve

__all__ = ["Paths", "StepErrors", "candidates", "cheapest", "loss", "measure", "planned", "search", "solve"]
