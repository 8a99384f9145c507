"""What a calibrated or trained recipe was made for, and whether that is what it meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .parts import check_number, show

SAMPLED = 64  # weights that stand for a model's; fine-tuning hardly turns this vector, another training does
OTHER_STEPS = "calibrate or tune for these steps, or carry it over with dittocache.tune.resample"
ALIKE = 0.9  # least cosine between the two


def made_for(transformer: nn.Module, scheduler: Any = None, timesteps: Sequence[float] | None = None) -> dict[str, Any]:
    """The model, scheduler and steps that a recipe is made for, as JSON values (`Recipe.made_for`)."""
    found: dict[str, Any] = {"model": type(transformer).__name__, "weights": _weights(transformer)}
    if scheduler is not None:
        found["scheduler"] = type(scheduler).__name__
    if timesteps is not None:
        found["timesteps"] = [round(float(t), 3) for t in timesteps]
    return found


def check(wanted: Mapping[str, Any]) -> None:
    """Raises a ValueError unless these are entries that `made_for` could have written; others may stand beside them."""
    for name in ("model", "scheduler"):
        if not isinstance(wanted.get(name, ""), str):
            raise ValueError(f"made_for's {name} must be the name of a class; got {show(wanted[name])}")
    timesteps, weights = wanted.get("timesteps", [0]), wanted.get("weights", {})
    if not isinstance(timesteps, (list, tuple)) or not timesteps:
        raise ValueError(f"made_for's timesteps must be a list of numbers; got {show(timesteps)}")
    if not isinstance(weights, Mapping):
        raise ValueError(f"made_for's weights must be numbers by name; got {show(weights)}")
    for value in (*timesteps, *weights.values()):
        check_number("every entry of made_for's timesteps and weights", value)


def check_model(wanted: Mapping[str, Any], transformer: nn.Module, scheduler: Any = None) -> None:
    """Raises a ValueError if a recipe is for another model, other weights, or another scheduler."""
    name = type(transformer).__name__
    if wanted.get("model", name) != name:
        raise ValueError(
            f"the recipe was made for {wanted['model']}, not for {name}: calibrate or train for this model"
        )
    if "weights" in wanted:
        likeness = _likeness(wanted["weights"], transformer)
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
        raise ValueError(f"the recipe was made for {len(theirs)} steps, but this run has {num_steps}: {OTHER_STEPS}")
    if timesteps is None or num_steps < 2:
        return
    apart = max(abs(float(a) - b) for a, b in zip(timesteps, theirs, strict=True))
    if apart > 0.5 * abs(theirs[0] - theirs[-1]) / (num_steps - 1):
        raise ValueError(
            f"the recipe was made for timesteps {show(theirs)}, which are up to {apart:g} away from this run's: use "
            f"the spacing that it was made with, or {OTHER_STEPS}"
        )


def _parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices by name; an adapter (peft) that wraps a layer does not rename its weights."""
    found = {name.replace(".base_layer.", "."): p for name, p in transformer.named_parameters()}
    return {name: p for name, p in found.items() if p.ndim > 1 and p.numel() and not p.is_meta}


def _weights(transformer: nn.Module) -> dict[str, float]:
    """Single weights from all over the model, "name[index]" -> four digits of it.

    By name, so that what is added later (an adapter, a fused projection) does not matter.
    """
    matrices = [(name, p) for name, p in _parameters(transformer).items() if p.is_floating_point()]
    picked: dict[str, float] = {}
    for n in range(SAMPLED if matrices else 0):
        name, matrix = matrices[n * len(matrices) // SAMPLED]
        index = n * 7919 % matrix.numel()
        picked[f"{name}[{index}]"] = float(f"{float(matrix.detach().reshape(-1)[index]):.4g}")
    return picked


def _likeness(theirs: Mapping[str, float], transformer: nn.Module) -> float:
    """Cosine between the sampled weights of two models; one that is missing here counts as 0, quantised ones do not."""
    matrices, pairs = _parameters(transformer), []
    for key, value in theirs.items():
        name, _, index = key.removesuffix("]").rpartition("[")
        matrix = matrices.get(name)
        if matrix is None or not index.isdecimal() or int(index) >= matrix.numel():
            pairs.append((0.0, value))
        elif matrix.is_floating_point():
            pairs.append((float(matrix.detach().reshape(-1)[int(index)]), value))
    if not pairs:
        return 1.0
    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return float(x.dot(y) / (x.norm() * y.norm()).clamp(min=1e-12))
