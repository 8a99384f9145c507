"""What a calibrated or trained recipe was made for, and whether that is what it meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .parts import show

SAMPLED = 64  # weights that stand for a model's; fine-tuning hardly turns this vector, another training does
ALIKE = 0.9  # least cosine between the two


def made_for(transformer: nn.Module, scheduler: Any = None, timesteps: Sequence[float] | None = None) -> dict[str, Any]:
    """The model, scheduler and steps that a recipe is made for, as JSON values (`Recipe.made_for`)."""
    found: dict[str, Any] = {"model": type(transformer).__name__, "weights": _weights(transformer)}
    if scheduler is not None:
        found["scheduler"] = type(scheduler).__name__
    if timesteps is not None:
        found["timesteps"] = [round(float(t), 3) for t in timesteps]
    return found


def check_model(wanted: Mapping[str, Any], transformer: nn.Module, scheduler: Any = None) -> None:
    """Raises a ValueError if a recipe is for another model, other weights, or another scheduler."""
    name = type(transformer).__name__
    if wanted.get("model", name) != name:
        raise ValueError(
            f"the recipe was made for {wanted['model']}, not for {name}: calibrate or train for this model"
        )
    if "weights" in wanted:
        mine, theirs = _weights(transformer), wanted["weights"]
        likeness = _cosine(mine, theirs)
        if likeness < ALIKE:
            raise ValueError(
                f"the recipe was made for a {name} with other weights (likeness {likeness:.2f}, at least {ALIKE} is "
                "needed): calibrate or train for this model"
            )
    found = type(scheduler).__name__
    if scheduler is not None and wanted.get("scheduler", found) != found:
        raise ValueError(
            f"the recipe was made for {wanted['scheduler']}, not for {found}: calibrate or train with this scheduler"
        )


def check_run(wanted: Mapping[str, Any], num_steps: int, timesteps: Sequence[float] | None) -> None:
    """Raises a ValueError if a recipe is for another number of steps, or for other timesteps."""
    theirs = wanted.get("timesteps")
    if theirs is None:
        return
    if num_steps != len(theirs):
        raise ValueError(f"the recipe was made for {len(theirs)} steps, but this run has {num_steps}")
    if timesteps is None or num_steps < 2:
        return
    apart = max(abs(float(a) - b) for a, b in zip(timesteps, theirs, strict=True))
    if apart > 0.5 * abs(theirs[0] - theirs[-1]) / (num_steps - 1):
        raise ValueError(
            f"the recipe was made for timesteps {show(theirs)}, which are up to {apart:g} away from this run's: use the "
            "spacing that it was made with, or make it again"
        )


def _weights(transformer: nn.Module) -> list[float]:
    """Single weights from all over the model, four digits each."""
    matrices = [p for p in transformer.parameters() if p.ndim > 1 and p.is_floating_point() and not p.is_meta]
    if not matrices:
        return []
    picked = []
    for n in range(SAMPLED):
        matrix = matrices[n * len(matrices) // SAMPLED]
        picked.append(matrix.detach().reshape(-1)[n * 7919 % matrix.numel()])
    return [float(f"{float(value):.4g}") for value in picked]


def _cosine(a: Any, b: Any) -> float:
    try:
        x, y = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    except (TypeError, ValueError):
        return 0.0
    return (
        float(Tensor.dot(x, y) / (x.norm() * y.norm()).clamp(min=1e-12)) if x.shape == y.shape and x.ndim == 1 else 0.0
    )
