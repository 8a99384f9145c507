"""Decisions for every sample on its own: a picture does not depend on what else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import dittocache
from dittocache.fill import Chosen, Fill, GradientQueue, Hold, LowRankIncrement, Taylor, Trend
from dittocache.plan import COMPUTE, OPEN
from dittocache.when import Look, When

STEPS = 6


@dataclass(frozen=True)
class InputChange(When):
    """Computes the samples whose input moved by more than `threshold` since they were last computed."""

    threshold: float = 0.12
    per_sample: bool = True

    def table(self, num_steps: int, sites: Any) -> np.ndarray:
        return np.full((num_steps, len(sites)), OPEN)

    def decide(self, look: Look, memory: dict[str, Any]) -> Any:
        x, last = look.state, memory.get("x")
        if last is None:
            memory["x"] = x.clone()
            return COMPUTE
        moved = (x - last).flatten(1).norm(dim=1) / last.flatten(1).norm(dim=1) > self.threshold
        if not self.per_sample:
            moved = moved.any().expand(len(x))
        memory["x"] = torch.where(moved[:, None, None], x, last)
        return moved


@pytest.fixture(scope="module")
def model() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def drift() -> Tensor:
    """Inputs [steps, 3, 4, 8, 8] of which the first hardly moves, the second does, the third moves a lot."""
    generator = torch.Generator().manual_seed(1)
    pace = torch.tensor([0.02, 0.12, 0.5])[:, None, None, None]
    start = torch.randn(1, 3, 4, 8, 8, generator=generator)
    return start + (pace * torch.randn(STEPS, 3, 4, 8, 8, generator=generator)).cumsum(0)


@torch.no_grad()
def outputs(
    model: DiTTransformer2DModel, x: Tensor, labels: Tensor, when: When, fill: Fill | None = None
) -> tuple[Tensor, dittocache.Plan]:
    found = []
    where = "linear" if isinstance(fill, LowRankIncrement) else "module"
    recipe = dittocache.Recipe(when=when, where=where, fill=fill or Hold())
    with dittocache.enable(model, recipe) as cache, cache.run(STEPS):
        for k in range(STEPS):
            cache.step(k)
            time = torch.full((len(labels),), 900 - 100 * k)
            found.append(model(x[k], timestep=time, class_labels=labels).sample)
    return torch.stack(found), cache.trace


def test_alone_equals_in_batch(model: DiTTransformer2DModel) -> None:
    x, labels = drift(), torch.tensor([0, 1, 2])
    together, trace = outputs(model, x, labels, InputChange())
    assert ((trace.table > 0) & (trace.table < 1)).any(), "some rows must be computed beside filled ones"
    for n in range(3):
        alone, _ = outputs(model, x[:, n : n + 1], labels[n : n + 1], InputChange())
        torch.testing.assert_close(together[:, n : n + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_decision_for_the_whole_batch_does_depend_on_it(model: DiTTransformer2DModel) -> None:
    x, labels = drift(), torch.tensor([0, 1, 2])
    together, _ = outputs(model, x, labels, InputChange(per_sample=False))
    alone, _ = outputs(model, x[:, :1], labels[:1], InputChange(per_sample=False))
    assert (together[:, :1] - alone).abs().max() > 1e-4


def fills(model: DiTTransformer2DModel) -> dict[str, Fill]:
    generator = torch.Generator().manual_seed(3)
    found = dittocache.describe(model)
    trend = {
        f"{e.site.name}@{k}": torch.randn(16, 16, generator=generator) for e in found.entries for k in range(1, STEPS)
    }
    factors = {
        f"{e.site.name}/{letter}": 0.1 * torch.randn(*shape, generator=generator)
        for e in found.linears
        for letter, shape in (("A", (e.module.out_features, 2)), ("B", (2, e.module.in_features)))
    }
    return {
        "trend": Trend(trend, 0.5),
        "trend-held-back": Trend(trend, 0.5, write_back=False),
        "gradient": GradientQueue(0.8),
        "gradient-computed-only": GradientQueue(0.8, computed_only=True),
        "increment": LowRankIncrement(factors),
        "chosen-trend": Chosen((Hold(), Trend(trend, 0.5)), (1,) * STEPS),
        "chosen": Chosen((Hold(), Trend(trend, 0.5), Taylor(1)), (0, 2, 1, 2, 1, 0)),
    }


NAMES = ["trend", "trend-held-back", "gradient", "gradient-computed-only", "increment", "chosen-trend", "chosen"]


@pytest.mark.parametrize("name", NAMES)
def test_alone_equals_in_batch_with_every_fill(model: DiTTransformer2DModel, name: str) -> None:
    """What a filled sample goes on from is what it had, whether or not its neighbours were computed."""
    fill = fills(model)[name]
    x, labels = drift(), torch.tensor([0, 1, 2])
    together, trace = outputs(model, x, labels, InputChange(), fill)
    assert ((trace.table > 0) & (trace.table < 1)).any(), "some rows must be computed beside filled ones"
    held, _ = outputs(model, x, labels, InputChange(), LowRankIncrement({}) if name == "increment" else None)
    assert (together - held).abs().max() > 1e-4, "the fill must matter"
    for n in range(3):
        alone, _ = outputs(model, x[:, n : n + 1], labels[n : n + 1], InputChange(), fill)
        torch.testing.assert_close(together[:, n : n + 1], alone, rtol=1e-4, atol=1e-5)
