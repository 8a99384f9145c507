"""Routers that are learned: L2C (arXiv 2406.01733).

`train_l2c` makes a recipe for a class-conditional pipeline; `train_router` is for networks of one's own:

>>> walk = OuterSteps(50)  # U-ViT; Pairs.of(scheduler, num_steps) for samplers of first order
>>> trained = train_router(network, predict, walk, Data(x0, labels, null), Settings(penalty=0.1), path=checkpoint)
>>> recipe = as_recipe(trained, made_for={}, provenance={})
"""

from .l2c import as_recipe, train_l2c
from .loop import Data, Settings, Training
from .loop import train as train_router
from .objective import Objective, class_conditional
from .steps import OuterSteps, Pairs

__all__ = [
    "Data",
    "Objective",
    "OuterSteps",
    "Pairs",
    "Settings",
    "Training",
    "as_recipe",
    "class_conditional",
    "train_l2c",
    "train_router",
]
