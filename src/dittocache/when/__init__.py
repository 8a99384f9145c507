"""When is a site computed, partly computed, or not at all? Pure schedules: step and site numbers in, a table out."""

from .base import Look, When
from .fixed import Counter, DualModuleIntervals, Every, ModuleIntervals, Table
from .learned import ReuseSteps, Router, States
from .soft import DualInterval, SoftInterval

__all__ = [
    "Counter",
    "DualInterval",
    "DualModuleIntervals",
    "Every",
    "Look",
    "ModuleIntervals",
    "ReuseSteps",
    "Router",
    "SoftInterval",
    "States",
    "Table",
    "When",
]
