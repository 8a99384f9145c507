"""How much an error at a step matters for the final picture: measured, since the loss of a step does not know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibrate.setup import Setup
from ..calibrate.trial import Trial
from ..recipe import recipe
from .loop import Data, Settings, generator
from .objective import Objective, Predict
from .steps import Pairs

if TYPE_CHECKING:
    from ..evaluate.compare import Progress

CERTAIN = 5.0  # a logit that decides


def measured(
    pipe: Any,
    predict: Predict,
    walk: Pairs,
    data: Data,
    setup: Setup,
    count: int,
    settings: Settings,
    progress: Progress | None = None,
) -> Tensor:
    """Weights of the squared errors of the router's rows, [rows] float64: 0 for those that are not trained.

    For each of them, the cache step is reused as a whole, once in whole runs of the sampler with guidance and once in
    the objective; the weight is the squared error of the final pictures over that of the prediction. All are divided by
    their geometric mean, so that a penalty means about the same as without weights.

    Args:
        setup: of the runs, of which `count` are drawn uncached, and again for every row.
    """
    network, total = pipe.transformer, len(walk.trained)
    trial = Trial(pipe, setup, range(count), batch=count)
    random = generator(settings.seed, 2)
    found = torch.zeros(walk.rows, dtype=torch.float64)
    for n, row in enumerate(walk.trained):
        with Objective(network, predict) as objective:
            which = torch.randint(len(data.x0), (count,), generator=random)
            noise = torch.randn(count, *data.x0.shape[1:], generator=random).to(data.x0)
            device = next(network.parameters()).device
            logits = torch.full((walk.rows, objective.columns), CERTAIN, device=device)
            x0, conditions = data.x0[which].to(device), data.conditions[which].to(device)
            with torch.no_grad():  # at threshold 1 everything is reused
                rows = torch.full((count,), row)
                terms = objective(
                    walk, list(logits), rows, x0, noise.to(device), conditions, penalty=0.0, threshold=1.0
                )
        logits[row] = -CERTAIN
        error = trial.error(recipe("l2c", router_logits=logits, threshold=0.5))
        found[row] = error / terms.data.cpu().double().mean().clamp(min=1e-30)
        if progress is not None:
            progress(n + 1, total, "weights of the steps")
    ones = found[list(walk.trained)]
    scale = ones.clamp(min=1e-6 * float(ones.max())).log().mean().exp()
    return found / scale if ones.any() else found
