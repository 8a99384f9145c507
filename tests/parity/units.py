"""Unit cases: a function of ours for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dittocache
from dittocache.plan import COMPUTE, Site
from dittocache.when import Counter, DualInterval, ModuleIntervals, SoftInterval
from dittocache.which import scores
from dittocache.which.ratios import default_factor, ratio_at, token_count

Inputs = dict[str, Tensor]


def find(case: dict[str, Any]) -> Callable[[dict[str, Any], Inputs], Inputs] | None:
    """The function for a unit case, by what it tests."""
    what, settings = case.get("what", ""), case["settings"]
    if what.startswith("spatial bonus") and what.endswith("choice of the k highest tokens"):
        return selection
    if what == "spatial bonus":
        return lambda s, x: {"score": bonus(s, x["x"])}
    if what == "attention-received score":
        return lambda s, x: {"score": scores.normalize(received(x["x"]))}
    if what.startswith("value-norm score (DiT)"):
        return lambda s, x: {"score": scores.normalize(scores.value_norms(x["x"]))}
    if what == "cross-attention entropy score from maps in the padded layout":
        return lambda s, x: {"scores": torch.stack([scores.cross_attention_entropy_rows(m) for m in x["maps"]])}
    if what.startswith("cross-attention entropy score"):
        return lambda s, x: {"score": scores.cross_attention_entropy(x["x"])}
    if case["method"] in ("toca", "duca") and "-unit-schedule-" in case["id"]:
        if "module_intervals" in settings:
            return opensora
        if isinstance(settings.get("module_ratio_factor"), dict) and "double" in settings["module_ratio_factor"]:
            return flux
        return pixart if "module_ratio_factor" in settings else dit
    return None


def received(attention_map: Tensor) -> Tensor:
    """Column sums through the chunked function: logits that are the map's logarithm have it as their softmax."""
    flat = torch.zeros(len(attention_map), 1, attention_map.shape[1], 1)
    return scores.attention_received(flat, flat, 1.0, chunk=10, mask=attention_map.log()[:, None])


def bonus(settings: dict[str, Any], score: Tensor) -> Tensor:
    grid = tuple(settings["token_grid"])
    flat = score.reshape(-1, score.shape[-1])
    return scores.spatial_bonus(flat, grid, settings["spatial_grid"], settings["spatial_bonus"]).reshape(score.shape)


def selection(settings: dict[str, Any], x: Inputs) -> Inputs:
    ranked = bonus(settings, x["scores"])
    counts = x["k"].tolist()
    chosen = torch.full((*ranked.shape[:2], max(counts)), -1)
    for call, count in enumerate(counts):
        chosen[call, :, :count] = scores.select(ranked[call], count)
    return {"scores_after_bonus": ranked, "selection_indices": chosen}


def sites_of(blocks: int) -> list[Site]:
    return [Site(f"{n}.ff", "feed-forward", "blocks", n, blocks, n, True) for n in range(blocks)]


def dit(settings: dict[str, Any], x: Inputs) -> Inputs:
    """Through the recipe itself: `method` is filled in by the runner."""
    names = ("interval", "ratio", "ratio_schedule", "interval_warp", "layer_divisor")
    recipe = dittocache.recipe(settings["method"], **{name: settings[name] for name in names})
    steps, blocks, tokens = (settings[name] for name in ("num_steps", "blocks", "tokens"))
    kinds, intervals = recipe.when.kinds(steps, blocks)
    counts = np.array([[recipe.which.count(site, k, steps, tokens) for site in sites_of(blocks)] for k in range(steps)])
    counts = np.where(kinds == 0, tokens, np.where(kinds == 2, -1, counts))
    return {
        "index": torch.arange(steps).flip(0),
        "types": torch.tensor(kinds[:, [0, 1, -1]]),
        "interval": torch.tensor(intervals),
        "tokens": torch.tensor(counts),
    }


def pixart(settings: dict[str, Any], x: Inputs) -> Inputs:
    schedule = DualInterval if settings["method"] == "duca" else SoftInterval
    steps, blocks = settings["num_steps"], settings["blocks"]
    when = schedule(settings["interval"], settings["interval_warp"], None, direction="up")
    kinds, intervals = when.kinds(steps, blocks)

    def counts(kind: str) -> Tensor:
        factor = settings["module_ratio_factor"][{"feed-forward": "mlp"}.get(kind, kind)]
        assert factor == default_factor("pixart", kind)
        numbers = [
            [
                token_count(
                    ratio_at("pixart", settings["ratio"], factor, k, steps, n, settings["layer_divisor"], 1),
                    settings["tokens"],
                )
                for n in range(blocks)
            ]
            for k in range(steps)
        ]
        return torch.tensor(numbers)

    return {
        "step": torch.arange(steps),
        "types": torch.tensor(kinds[:, [0, 1, -1]]),
        "interval": torch.tensor(intervals),
        "tokens_cross": counts("cross-attention"),
        "tokens_mlp": counts("feed-forward"),
    }


def flux(settings: dict[str, Any], x: Inputs) -> Inputs:
    when = Counter(settings["interval"], first_full=3 if settings["ratio"] else 1)
    full = when.table(settings["num_steps"], sites_of(1))[:, 0] == COMPUTE
    out = {"full_steps": torch.tensor(np.flatnonzero(full))}
    for name, blocks, tokens in (("double_stream", 19, 4096), ("double_stream", 19, 512), ("single_stream", 38, 4608)):
        factor = settings["module_ratio_factor"][name.split("_")[0]]
        ratios = [
            ratio_at("flux", settings["ratio"], factor, 0, settings["num_steps"], n, 27, 1) for n in range(blocks)
        ]
        out[f"tokens_{name}_{tokens}"] = torch.tensor([token_count(r, tokens) for r in ratios])
    return out


def opensora(settings: dict[str, Any], x: Inputs) -> Inputs:
    by = settings["module_intervals"]
    when = ModuleIntervals(by["attention"], by["cross-attention"], by["mlp"], settings["full_first"])
    kinds = ("attention", "cross-attention", "feed-forward")
    sites = [Site(f"{b}.{kind}", kind, "blocks", b, 2, b) for b in range(2) for kind in kinds]
    table = when.table(settings["num_steps"], sites)
    return {"types": torch.tensor(np.where(table == COMPUTE, 0, 1).reshape(-1, 2, 3))}
