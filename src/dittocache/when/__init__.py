"""When is a site computed, partly computed, or not at all? Pure schedules: step and site numbers in, a table out."""

from .base import Look, When
from .budget import ChangeBudget
from .dynamic import HeadChange, ProbeChange, SignalChange
from .fixed import Counter, DualModuleIntervals, Every, ModuleIntervals, Table
from .forecast import Broadcast, RatioBudget, Warmup
from .learned import ReuseSteps, Router, States
from .power import PowerSteps
from .soft import DualInterval, SoftInterval

__all__ = [
    "Broadcast",
    "ChangeBudget",
    "Counter",
    "DualInterval",
    "DualModuleIntervals",
    "Every",
    "HeadChange",
    "Look",
    "ModuleIntervals",
    "PowerSteps",
    "ProbeChange",
    "RatioBudget",
    "ReuseSteps",
    "Router",
    "SignalChange",
    "SoftInterval",
    "States",
    "Table",
    "Warmup",
    "When",
]
