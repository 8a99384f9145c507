"""Unit cases: a function of ours for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dittocache
from dittocache.calibrate import planners
from dittocache.calibrate.base import Recorder
from dittocache.calibrate.channels import channel_statistic, channel_weights, low_rank_factors
from dittocache.calibrate.magcache import CalibrateMagCache, magnitudes
from dittocache.fill import At, Entry, Fill
from dittocache.fill.base import Features
from dittocache.plan import COMPUTE, REUSE, Site
from dittocache.train.loop import clamp, optimizer_of
from dittocache.train.objective import Objective, class_conditional
from dittocache.train.steps import OuterSteps, Pairs
from dittocache.when import Counter, DualInterval, DualModuleIntervals, Every, ModuleIntervals, SoftInterval
from dittocache.when.power import spread
from dittocache.which import scores
from dittocache.which.ratios import factor_of, ratio_at, token_count

from . import sampling

Inputs = dict[str, Tensor]


# functions that also get the pack and the case: (settings, inputs, goldens, case)
WITH_NETWORK: list[Callable[..., Inputs]] = []
# tensors that are held to a relative L2 tolerance, by the tolerance's name
RELATIVE = {
    "loss": "loss_rel",
    "router_grad": "grad_rel_l2",
    "router_after_step": None,
    **dict.fromkeys(
        ("model_out_full", "teacher_out", "student_out", "mse_per_sample", "penalty_sum", "x_noised", "out_start")
        + ("x_mid", "out_mid", "x_next", "data_loss_per_sample"),
        "outputs_rel_l2",
    ),
}


def relative_tolerance(tolerance: dict[str, Any], name: str) -> float | None:
    """The relative L2 tolerance that a tensor of a unit case is held to, or None for another sort of comparison."""
    for key in (RELATIVE.get(name), "rel_l2", "product_rel_l2"):
        if key in tolerance:
            return tolerance[key]
    return None


def products(factors: Inputs) -> Inputs:
    """A @ B of factors named NAME_A and NAME_B: the factors themselves are not unique."""
    names = {name[:-2] for name in factors}
    return {name: factors[f"{name}_A"].double() @ factors[f"{name}_B"].double() for name in names}


def entropy_score(maps: Tensor) -> Tensor:
    """PixArt's base score [samples, tokens] from maps [2 x samples, tokens, text]."""
    rows = scores.entropy_rows(maps, 2)
    return scores.normalize(1 + rows.unflatten(0, (2, -1)).sum(0))


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
    if what.startswith("value-norm score (PixArt"):
        return lambda s, x: {
            "score": scores.normalize(scores.value_norms(x["x"]).unflatten(0, (2, -1)).mean(0)).repeat(2, 1)
        }
    if what == "cross-attention entropy score from maps in the padded layout":
        return lambda s, x: {"scores": torch.stack([entropy_score(m) for m in x["maps"]])}
    if what.startswith("cross-attention entropy score"):
        return lambda s, x: {"score": scores.cross_attention_entropy(x["x"])}
    if what == "non-uniform schedule":
        return spread_steps
    if what == "one router training step":
        return l2c_training
    if what.startswith("magnitude ratios"):
        return magnitude_ratios
    if case["method"] in ("toca", "duca") and "-unit-schedule-" in case["id"]:
        if "module_intervals" in settings:
            return opensora
        if isinstance(settings.get("module_ratio_factor"), dict) and "double" in settings["module_ratio_factor"]:
            return flux
        return pixart if "module_ratio_factor" in settings else dit
    if case["method"] == "icc" and what.startswith("channel weights"):
        return icc_statistics
    if case["method"] == "icc" and what.endswith("factors"):
        return icc_factors
    if what.startswith("path-aware cost tensor"):
        return dpcache_costs
    if what.startswith("dynamic programme over the cost tensor"):
        return dpcache_plans
    if what.startswith("forecast of the final hidden state"):
        return dpcache_forecasts
    if what.startswith("lexicographic minimax path"):
        return lemica_plans
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
    warp = settings["interval_warp"] if settings["ratio"] else 0.0
    when = schedule(settings["interval"], warp, None, direction="up")
    kinds, intervals = when.kinds(steps, blocks)

    def counts(kind: str) -> Tensor:
        factor = settings["module_ratio_factor"][{"feed-forward": "mlp"}.get(kind, kind)]
        assert factor == factor_of(None, "pixart", kind)
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
    by = {name.replace("-", "_"): interval for name, interval in settings["module_intervals"].items()}
    schedule = DualModuleIntervals if settings["method"] == "duca" else ModuleIntervals
    kinds = ("attention", "cross-attention", "feed-forward")
    sites = [Site(f"{b}.{kind}", kind, "blocks", b, 2, b) for b in range(2) for kind in kinds]
    sites.append(Site("blocks", "stack", "blocks", 1, 2, 1))
    table = schedule(**by, first_full=settings["full_first"]).table(settings["num_steps"], sites)
    types = np.where(table[:, :-1] == COMPUTE, 0, 1)
    types[table[:, -1] == REUSE] = 2
    return {"types": torch.tensor(types.reshape(-1, 2, 3))}


def spread_steps(settings: dict[str, Any], x: Inputs) -> Inputs:
    """DeepCache's steps of full computation; without a centre they are dense at the start."""
    assert ("center" in settings) == (settings["form"] == "centred")
    numbers = (settings[name] for name in ("num_steps", "full_steps", "power"))
    steps, power = spread(*numbers, settings.get("center"))
    return {"full_steps": torch.tensor(steps), "power_used": torch.tensor([power])}


class Listener(Fill):
    """Holds the input and output of every linear layer in the latest forward, by kind and block."""

    keeps_inputs = True

    def __init__(self) -> None:
        self.heard: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        assert at.inputs is not None
        self.heard[at.site.kind, at.site.block] = (at.inputs, value[0])


def linear_features(x: Inputs, timesteps: Tensor, network: Any) -> list[dict[tuple[str, int], tuple[Tensor, Tensor]]]:
    """(input, output) of every linear layer in every call, by kind and block."""
    calls, listener = [], Listener()
    recipe = dittocache.Recipe(Every(1), where="linear", fill=listener)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*skipped nothing")
        with dittocache.enable(network, recipe) as cache, cache.run(len(x["x_t"])):
            for call, (x_t, i, y) in enumerate(zip(x["x_t"], x["t_index"], x["y"], strict=True)):
                cache.step(call)
                network(x_t, timestep=timesteps[-1 - i], class_labels=y)
                calls.append(listener.heard)
                listener.heard = {}
    return calls


def icc_statistics(settings: dict[str, Any], x: Inputs, goldens: Any, case: dict[str, Any]) -> Inputs:
    """Statistics of single forwards or, if of changes, of pairs: a forward at i, and one at i - 1."""
    timesteps = torch.tensor(goldens.data["samplers"][settings["sampler"]]["timesteps"])
    calls = linear_features(x, timesteps, goldens.network(case["network"]))
    if "change" in settings["statistic"]:
        assert torch.equal(x["t_index"][1::2], x["t_index"][::2] - 1), "calls in pairs of adjacent steps"
        calls = [
            {at: (new[at][0] - old[at][0], new[at][1] - old[at][1]) for at in new}
            for old, new in zip(calls[::2], calls[1::2], strict=True)
        ]
    samples, blocks = len(calls) * x["x_t"].shape[1], max(block for _, block in calls[0]) + 1

    def weights(side: int, *kinds: str) -> Tensor:
        sums = [
            sum(channel_statistic(*(call[kind, block][side] for kind in kinds)) for call in calls)
            for block in range(blocks)
        ]
        parameters = settings["power"], settings["floor_ratio"], len(kinds)
        return torch.stack([channel_weights(total / samples, *parameters) for total in sums])

    left = dict(zip("qkv", weights(1, "q", "k", "v").chunk(3, dim=1)))
    left |= {kind: weights(1, kind) for kind in ("proj", "fc1", "fc2")}
    right = {kind: weights(0, kind) for kind in left}
    return {f"{kind}_left": w for kind, w in left.items()} | {f"{kind}_right": w for kind, w in right.items()}


def icc_factors(settings: dict[str, Any], x: Inputs, goldens: Any, case: dict[str, Any]) -> Inputs:
    """Products of the factors of every linear layer; without channel weights among the inputs, of the plain SVD."""
    found: dict[str, list[Tensor]] = {}
    for entry in dittocache.describe(goldens.network(case["network"])).linears:
        kind, block = entry.site.kind, entry.site.block
        left, right = (x[f"{kind}_{side}"][block] if f"{kind}_{side}" in x else None for side in ("left", "right"))
        for letter, factor in zip("AB", low_rank_factors(entry.module.weight, left, right, settings["rank"])):
            found.setdefault(f"{kind}_{letter}", []).append(factor)
    return products({name: torch.stack(factors) for name, factors in found.items()})


WITH_NETWORK += [icc_statistics, icc_factors]


def magnitude_ratios(settings: dict[str, Any], x: Inputs, goldens: Any, case: dict[str, Any]) -> Inputs:
    """MagCache's ratios of an uncached run, as calibration records them; of all rows, both halves of guidance."""
    network, spec, inputs = goldens.network(case["network"]), goldens.sampler(settings), goldens.inputs(settings)
    guidance, sums = goldens.guidance(settings), Inputs()
    rows = len(sampling.start(inputs)) * (1 if guidance["scale"] is None else 2)
    recorder = Recorder(magnitudes(network, sums), False, None, rows, once=True)
    recipe = CalibrateMagCache().recording(recorder)
    with dittocache.enable(network, recipe) as cache, cache.run(spec["num_steps"]):
        sampling.run(network, inputs, spec, guidance, cache)
    return {"ratios": sums["ratios"] / rows}


WITH_NETWORK.append(magnitude_ratios)


# ---- DPCache and LeMiCa ---------------------------------------------------------------------------------------------
def width(case: dict[str, Any], name: str) -> int:
    return int(case["expect"]["tensors"][name]["shape"][1])


def padded(plans: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*plan, *[-1] * (length - len(plan))] for plan in plans])


def dpcache_costs(settings: dict[str, Any], x: Inputs) -> Inputs:
    share = settings["sentinel_alpha"]
    return {
        "cost": planners.segment_costs(x["features"], settings["order"], settings["max_gap"], end_share=share),
    }


def dpcache_plans(settings: dict[str, Any], x: Inputs, goldens: Any, case: dict[str, Any]) -> Inputs:
    """The authors' plans and the cheapest ones, with what they cost."""
    steps, gap = settings["num_steps"], settings["max_gap"]
    plans: dict[str, list[planners.Plan]] = {"schedule": [], "exact_schedule": []}
    costs: dict[str, list[float]] = {"schedule_cost": [], "exact_cost": []}
    for budget, first, last in x["combos"].tolist():
        forced = planners.forced_steps(steps, first, last)
        allowed = planners.allowed(x["cost"], forced, gap)
        authors, exact = planners.authors_plan(allowed, budget), planners.exact_plan(allowed, budget)
        plans["schedule"].append(authors)
        plans["exact_schedule"].append(exact)
        costs["schedule_cost"].append(planners.path_cost(allowed, authors))
        costs["exact_cost"].append(planners.path_cost(allowed, exact) if exact else float("inf"))
    return {name: padded(found, width(case, name)) for name, found in plans.items()} | {
        name: torch.tensor(found, dtype=torch.float64) for name, found in costs.items()
    }


def dpcache_forecasts(settings: dict[str, Any], x: Inputs) -> Inputs:
    """The recipe's own fill, step by step."""
    names = ("num_steps", "order", "first_full", "full_steps")
    recipe = dittocache.recipe("dpcache", **{name: settings[name] for name in names})
    site, entry, outputs = Site("blocks", "stack", "blocks", 0, 1, 0), Entry(), []
    computed = recipe.when.table(settings["num_steps"], [site])[:, 0] == COMPUTE
    for step, features in enumerate(x["features"]):
        at = At(step, settings["num_steps"], site)
        if computed[step]:
            recipe.fill.keep(entry, (features,), at)
        outputs.append(features if computed[step] else recipe.fill.fill(entry, at)[0])
    return {"output": torch.stack(outputs)}


def lemica_plans(settings: dict[str, Any], x: Inputs, goldens: Any, case: dict[str, Any]) -> Inputs:
    budgets, weights = settings["budgets"], x["weights"].numpy()
    plans = [planners.segment_plan(weights, budget) for budget in budgets]
    sums = [planners.segment_plan(weights, budget, "sum") for budget in budgets]
    edges = width(case, "sorted_weights")
    errors = [planners.segment_errors(weights, plan) if plan else [float("inf")] * edges for plan in plans]
    return {
        "schedule": padded(plans, width(case, "schedule")),
        "sorted_weights": torch.tensor([[*e, *[0.0] * (edges - len(e))] for e in errors], dtype=torch.float64),
        "sum_schedule": padded(sums, width(case, "sum_schedule")),
    }


WITH_NETWORK += [dpcache_plans, lemica_plans]


# ---- L2C's training step --------------------------------------------------------------------------------------------
def l2c_training(settings: dict[str, Any], x: Inputs, goldens: Any, case: dict[str, Any]) -> Inputs:
    """One step of router training: the objective, its gradient, and the row after AdamW (and, for DiT, the clamp)."""
    network, spec = goldens.network(case["network"]), goldens.data["samplers"][settings["sampler"]]
    labels, outer = x["y"], "outer_step" in settings
    walk: Any
    if outer:
        walk, row = OuterSteps(spec["num_steps"]), settings["trained_row"]
        assert row == settings["outer_step"] + 1
        assert walk.whole(row - 1) == settings["noise_index"] and walk.whole(row) == settings["student_timestep"]
    else:
        kept = torch.tensor(spec["alphas_cumprod"], dtype=torch.float64)
        walk, row = Pairs(spec["timesteps"], kept.sqrt(), (1 - kept).sqrt(), "epsilon"), settings["cache_index"]
        assert row == settings["full_index"] - 1
    predict, null = class_conditional(network)
    if "label_dropped" in x:
        labels = torch.where(x["label_dropped"].bool(), null, labels)
    logits = [row.clone().requires_grad_() for row in x["router_logits"]]
    optimizer = optimizer_of(logits, settings["learning_rate"])
    rows = torch.full((len(labels),), row)
    with Objective(network, predict) as objective:
        options = {"penalty": settings["penalty"], "threshold": settings["hard_threshold"]}
        terms = objective(walk, logits, rows, x["x_start"], x["noise"], labels, **options)
    terms.loss.backward()
    assert [n for n, p in enumerate(logits) if p.grad is not None] == [row]
    optimizer.step()
    clamp(logits, walk.limit)
    assert all(torch.equal(p, old) for n, (p, old) in enumerate(zip(logits, x["router_logits"])) if n != row)
    found = {
        "teacher_out": terms.teacher,
        "student_out": terms.student,
        "penalty_sum": terms.penalty[:1],
        "loss": terms.loss,
        "router_grad": logits[row].grad,
        "router_after_step": logits[row],
    }
    if outer:
        (_, start), (x_mid, middle) = terms.recorded
        found |= {"x_noised": terms.noisy, "out_start": start, "x_mid": x_mid, "out_mid": middle, "x_next": terms.x}
        return {name: t.detach() for name, t in (found | {"data_loss_per_sample": terms.data}).items()}
    found |= {"model_out_full": terms.recorded[0][1], "mse_per_sample": terms.data}
    return {name: t.detach() for name, t in found.items()}


WITH_NETWORK.append(l2c_training)
