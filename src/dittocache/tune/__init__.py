"""Search for the plan that loses the least at a budget."""

from .effort import Effort
from .errors import StepErrors, measure
from .forecasts import Forecasts, candidates, loss, planned, solve
from .genetic import Candidate, evolve
from .goal import Goal
from .path import Paths, cheapest, shortest
from .predictor import Predictors
from .resample import resample
from .search import Planner, search
from .tuned import Tuned, save
from .tuner import SCHEDULERS, Unreachable, tune

__all__ = [
    "SCHEDULERS",
    "Candidate",
    "Effort",
    "Forecasts",
    "Goal",
    "Paths",
    "Planner",
    "Predictors",
    "StepErrors",
    "Tuned",
    "Unreachable",
    "candidates",
    "cheapest",
    "evolve",
    "loss",
    "measure",
    "planned",
    "resample",
    "save",
    "search",
    "shortest",
    "solve",
    "tune",
]
