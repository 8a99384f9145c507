"""dittocache: diffusion transformers that sample faster by reusing features between denoising steps."""

# ruff: noqa: F401, I001  (sub-packages register themselves first; the functions then take the public names)
__version__ = "0.1.0"

from . import methods as _methods
from . import models as _models
from . import bundled
from .cache import Cache, Report, disable, enable
from .describe import Description, describe
from .plan import Plan
from .recipe import Method, Recipe, methods, recipe

__all__ = [
    "Cache",
    "Description",
    "Method",
    "Plan",
    "Recipe",
    "Report",
    "bundled",
    "describe",
    "disable",
    "enable",
    "methods",
    "recipe",
]
