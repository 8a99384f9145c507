"""Reads a pack of parity cases: networks, inputs, samplers, guidance, and what this version cannot run yet."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

import dittocache
from dittocache.models.facebook_dit import convert_facebook_dit, load_facebook_dit
from dittocache.models.stdit3 import load_stdit3
from dittocache.models.uvit import load_uvit

from . import sampling, units

Case = dict[str, Any]
Parameters = dict[str, Any]  # of a method, by name

LOADERS = {"facebook-dit": load_facebook_dit, "stdit3": load_stdit3, "uvit": load_uvit}  # besides diffusers' classes
CLASSES = {"DiT", "UViT", *sampling.CALLS}  # networks that can be called
FOR_THE_RUN = {"noise", "random_scores"}  # artifacts that are handed to the sampler or the selector, not to the recipe


class Pack:
    """A folder with `cases.json`, `networks/`, `inputs/`, `artifacts/` and `cases/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        self.cases: list[Case] = self.data["cases"]

    def __repr__(self) -> str:
        return str(self.folder)

    def missing(self, case: Case) -> str | None:
        """Why a case cannot run yet, or None."""
        method = case["method"]
        if method not in dittocache.methods():
            return f"method {method} does not exist yet"
        if case["kind"] == "unit":
            return None if units.find(case) else f"unit case {case['id']} of {method} has no counterpart yet"
        network, sampler = self.data["networks"][case["network"]], self.sampler(case)["kind"]
        if network["kind"] not in ("diffusers", *LOADERS):
            return f"network {case['network']} ({network['kind']}) does not exist yet"
        if network["class"] not in CLASSES:
            return f"calling {network['class']} does not exist yet"
        if sampler not in (*sampling.UPDATES, sampling.UVIT):
            return f"sampler {case['sampler']} does not exist yet"
        if method not in METHODS:
            return f"settings of {method} are not read yet"
        if network["class"] not in METHODS[method].networks:
            return f"{method} on {network['class']} does not exist yet"
        return None

    def sampler(self, case: Case) -> dict[str, Any]:
        return self.data["samplers"][case["sampler"]]

    def guidance(self, case: Case) -> dict[str, Any]:
        return self.data["guidance"][case["guidance"]]

    def tensors(self, file: str) -> dict[str, Tensor]:
        return load_file(self.folder / file)

    def expected(self, case: Case) -> dict[str, Tensor]:
        return self.tensors(case["expect"]["file"])

    def artifact(self, reference: dict[str, Any]) -> Tensor:
        return self.tensors(reference["file"])[reference["key"]]

    def inputs(self, case: Case) -> dict[str, Tensor]:
        spec = self.data["inputs"][case["input"]]
        tensors = self.tensors(spec["file"])
        if "rows" in spec:
            tensors = {name: t[spec["rows"][0] : spec["rows"][1]] for name, t in tensors.items()}
        return tensors

    @functools.cache  # noqa: B019
    def network(self, name: str) -> torch.nn.Module:
        spec = self.data["networks"][name]
        state = self.tensors(spec["file"])
        if spec["kind"] in LOADERS:
            return LOADERS[spec["kind"]](state, heads=spec["config"]["num_heads"])
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["config"].items()}
        model = getattr(diffusers, spec["class"])(**config)
        if spec.get("layout") == "facebook-dit":
            state = convert_facebook_dit(state)
        absent, foreign = model.load_state_dict(state, strict=False)
        assert not foreign and all("pos_embed" in name for name in absent), (absent, foreign)
        return model.eval()


# ---- settings -------------------------------------------------------------------------------------------------------
def trend_of(goldens: Pack, case: Case, tensors: dict[str, Tensor]) -> Parameters:
    """The pack's [2, blocks, steps, tokens, channels] by site and step."""
    named = {}
    for entry in dittocache.describe(goldens.network(case["network"])).entries:
        kind = 0 if entry.site.kind == "attention" else 1
        for n, step in enumerate(case["settings"]["trend_steps"]):
            named[f"{entry.site.name}@{step}"] = tensors["trend"][kind, entry.site.block, n]
    return {"trend": named}


def factors_of(goldens: Pack, case: Case, tensors: dict[str, Tensor]) -> Parameters:
    """The pack's factors, stacked over the blocks for every kind of linear layer, by site; none for plain reuse."""
    if not tensors:
        return {}
    linears = dittocache.describe(goldens.network(case["network"])).linears
    sites = [(entry.site, letter) for entry in linears for letter in "AB"]
    return {"factor_tensors": {f"{site.name}/{x}": tensors[f"{site.kind}_{x}"][site.block] for site, x in sites}}


def kinds_of(goldens: Pack, case: Case, tensors: dict[str, Tensor]) -> Parameters:
    """diffusers' hook takes cross-attention for self-attention where its module does not say what it is, as in LTX."""
    entries = dittocache.describe(goldens.network(case["network"])).entries
    cross = [entry.module for entry in entries if entry.site.kind == "cross-attention"]
    if not cross or any(hasattr(module, "is_cross_attention") for module in cross):
        return {}
    return {f"cross_{name}": case["settings"][name] for name in ("interval", "timestep_range")}


def by_name(goldens: Pack, case: Case, tensors: dict[str, Tensor]) -> Parameters:
    return dict(tensors)


def per_block_kind(decided: str) -> Parameters:
    return {"per_block_kind": decided.startswith("per block")}


DIT = ("DiT", "DiTTransformer2DModel")
FLUX = ("FluxTransformer2DModel",)
TRANSFORMERS = tuple(CLASSES - {"UNet2DConditionModel"})


@dataclass(frozen=True)
class Reads:
    """How settings and artifacts of a method's cases become its parameters: by their own names, except for these."""

    networks: tuple[str, ...] = DIT  # classes that the method runs on
    drop: tuple[str, ...] = ()  # settings that describe what the method always does, or that the network decides
    become: dict[str, Callable[[Any], Parameters]] = field(default_factory=dict)  # settings of other names or values
    artifacts: Callable[[Pack, Case, dict[str, Tensor]], Parameters] = by_name
    variants: dict[str, Parameters] = field(default_factory=dict)  # what the variant of the case decides
    by_network: dict[str, Parameters] = field(default_factory=dict)  # what its class decides, unless settings do


# what the authors' programs for a network always do
BY_NETWORK: dict[str, Parameters] = {
    "PixArtTransformer2DModel": {"sensitive_window": None, "step_order": "up"},
    "FluxTransformer2DModel": {"spatial_bonus": None, "select_text": True, "first_full": 3, "layer_divisor": 27},
    "STDiT3": {"spatial_bonus": None},
}
SELECTORS = {"cross-entropy": "cross-attention-entropy", "kv-norm": "value-norm", "v-norm": "value-norm"}
SELECTORS |= {"k-norm": "key-norm"}
TOKENS: dict[str, Callable[[Any], Parameters]] = {
    "kind_decided": per_block_kind,
    "shared_indices": lambda shared: {"share_guidance_indices": shared},
    "selector": lambda name: {"selector": SELECTORS.get(name, name)},
}
SELECTING = (*DIT, "PixArtTransformer2DModel", "FluxTransformer2DModel", "STDiT3")
METHODS = {
    "none": Reads(networks=tuple(CLASSES)),
    "fora": Reads(drop=("cached",)),
    "toca": Reads(networks=SELECTING, become=TOKENS, by_network=BY_NETWORK),
    "duca": Reads(networks=SELECTING, drop=("aggressive", "last_block"), become=TOKENS, by_network=BY_NETWORK),
    "l2c": Reads(networks=(*DIT, "UViT"), drop=("router",), variants={"uvit": {"rows": "outer"}}),
    "eoc": Reads(drop=("trend_steps",), artifacts=trend_of),
    "goc": Reads(),
    "icc": Reads(artifacts=factors_of),
    "magcache": Reads(
        networks=TRANSFORMERS, artifacts=lambda goldens, case, tensors: {"ratios": tensors["ratios"].tolist()}
    ),
    "pab": Reads(networks=TRANSFORMERS, artifacts=kinds_of),
    "taylorseer": Reads(
        networks=(*DIT, *FLUX),
        drop=("sites", "factors_dtype"),  # a kept output is in its own dtype
        become={"lite": lambda lite: {"lite": True} if lite else {"sites": "attention"}},
        variants={"diffusers-hook": {"schedule": "diffusers"}},
    ),
    "teacache": Reads(networks=TRANSFORMERS, drop=("coefficient_order",), variants={"authors": {"batch": "batch"}}),
    "fbcache": Reads(
        networks=TRANSFORMERS,
        become={"taylor_order": lambda n: {"order": n}, "channel_stride": lambda n: {"downsample_factor": n}},
        variants={name: {"batch": "batch"} for name in ("paraattention", "diffusers-hook")},
    ),
    "dicache": Reads(
        networks=TRANSFORMERS,
        become={"error": lambda words: {"error": "probe" if words == "probe change" else "difference"}},
        variants={"authors": {"batch": "batch"}},
    ),
    "deepcache": Reads(
        networks=("UNet2DConditionModel",), drop=("level", "layer"), become={"branch": lambda b: {"branch_id": b}}
    ),
    "eb-cache": Reads(drop=("codes",), become={"table_order": lambda words: {"table_order": words.split()[0]}}),
}


def recipe_of(goldens: Pack, case: Case) -> dittocache.Recipe:
    """The recipe that the case's settings, artifacts and variant name."""
    reads, network = METHODS[case["method"]], goldens.data["networks"][case["network"]]["class"]
    settings: Parameters = dict(reads.by_network.get(network, {}))
    for name, value in case["settings"].items():
        if name in reads.become:
            settings |= reads.become[name](value)
        elif name not in reads.drop:
            settings[name] = value
    tensors = {name: goldens.artifact(entry) for name, entry in case["artifacts"].items() if name not in FOR_THE_RUN}
    settings |= reads.artifacts(goldens, case, tensors) | reads.variants.get(case["variant"], {})
    if network in FLUX and settings.get("selector") == "value-norm":
        settings["selector"] = "large-value-norm"  # the authors' for FLUX prefers large ones
    return dittocache.recipe(case["method"], **settings)
