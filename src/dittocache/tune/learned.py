"""Factors of past outputs that are learned by gradient descent, after L2P (arXiv 2604.26365).

What is the paper's: outputs of filled steps are linear in those of computed ones, with factors of each step that are
trained. It is not its authors' code: that was not there to compare with. `predictor` finds factors in closed form, and
along the cached run; this is for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..fill import Linear
from ..parts import check_int
from ..recipe import Recipe
from ..when import ReuseSteps
from .trajectory import Trajectories


def learned(runs: Trajectories, computed: Sequence[int], outputs: int = 3, rounds: int = 2000) -> Recipe:
    """The recipe that computes some steps, and predicts the others with factors trained on uncached runs.

    The loss is the squared error of every filled step's prediction, as a share of its square; Adam, from holding.

    Args:
        runs: uncached.
        computed: steps; 0 is among them.
        outputs: how many a prediction is made of, at most.
        rounds: of gradient descent.
    """
    check_int("outputs", outputs, 1)
    check_int("rounds", rounds, 1)
    steps = len(runs)
    flat = runs.predictions.flatten(1).cpu().double()
    inner = flat @ flat.T / flat.square().sum(1).mean()
    filled = [k for k in range(steps) if k not in computed]
    histories = [sorted((a for a in computed if a < k), reverse=True)[:outputs] for k in filled]
    factors = torch.zeros(steps, outputs, dtype=torch.float64)
    factors[:, 0] = 1
    factors.requires_grad_()
    descent = torch.optim.Adam([factors], lr=0.01)
    for _ in range(rounds):
        loss = torch.zeros((), dtype=torch.float64)
        for k, history in zip(filled, histories, strict=True):
            own = factors[k, : len(history)]
            missed = own @ inner[history][:, history] @ own - 2 * own @ inner[history, k] + inner[k, k]
            loss = loss + missed / inner[k, k]
        descent.zero_grad()
        loss.backward()
        descent.step()
    table = tuple(tuple(row) for row in factors.detach().tolist())
    return Recipe(where="model", when=ReuseSteps(tuple(filled)), fill=Linear(table))
