"""Reads a pack of parity cases: networks, inputs, samplers, guidance, and what this version cannot run yet."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

import dittocache
from dittocache.models.facebook_dit import convert_facebook_dit, load_facebook_dit
from dittocache.models.uvit import load_uvit

from . import sampling, units

Case = dict[str, Any]

# settings that describe what the method always does, or that the network decides
DESCRIPTIVE = {
    "fora": {"cached"},
    "toca": {"kind_decided"},
    "duca": {"kind_decided", "aggressive", "last_block"},
    "none": set(),
    "l2c": {"router"},
    "eoc": {"trend_steps"},
    "goc": set(),
    "icc": set(),
    "eb-cache": {"codes", "table_order"},
}


class Missing(Exception):
    """This version has no such method, network or sampler."""


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
        if case["method"] not in dittocache.methods():
            return f"method {case['method']} does not exist yet"
        if case["kind"] == "unit":
            return None if units.find(case) else f"unit case {case['id']} of {case['method']} has no counterpart yet"
        network = self.data["networks"][case["network"]]
        if network["kind"] not in ("facebook-dit", "diffusers", "uvit"):
            return f"network {case['network']} ({network['kind']}) does not exist yet"
        if case["method"] in DESCRIPTIVE and not runs_on(case, network):
            return f"{case['method']} on {network['class']} does not exist yet"
        if self.sampler(case)["kind"] not in (*sampling.UPDATES, sampling.UVIT):
            return f"sampler {case['sampler']} does not exist yet"
        if network.get("class") not in (
            None,
            "DiT",
            "DiTTransformer2DModel",
            "FluxTransformer2DModel",
            "PixArtTransformer2DModel",
            "UViT",
        ):
            return f"calling {network['class']} does not exist yet"
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
        if spec["kind"] == "uvit":
            return load_uvit(state, heads=spec["config"]["num_heads"])
        if spec["kind"] == "facebook-dit":
            return load_facebook_dit(state, heads=spec["config"]["num_heads"])
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["config"].items()}
        model = getattr(diffusers, spec["class"])(**config)
        if spec.get("layout") == "facebook-dit":
            state = convert_facebook_dit(state)
        absent, foreign = model.load_state_dict(state, strict=False)
        assert not foreign and all("pos_embed" in name for name in absent), (absent, foreign)
        return model.eval()


def runs_on(case: Case, network: dict[str, Any]) -> bool:
    is_dit = network["kind"] == "facebook-dit" or network.get("class") == "DiTTransformer2DModel"
    return is_dit or case["method"] == "none" or (case["method"] == "l2c" and network["kind"] == "uvit")


def recipe_of(goldens: Pack, case: Case) -> dittocache.Recipe:
    """The recipe that the case's settings and artifacts name."""
    method = case["method"]
    settings = {k: v for k, v in case["settings"].items() if k not in DESCRIPTIVE[method]}
    decided = case["settings"].get("kind_decided", "")
    if decided:
        settings["per_block_kind"] = decided.startswith("per block")
    artifacts = {name: goldens.artifact(reference) for name, reference in case["artifacts"].items()}
    if method == "eb-cache":
        settings["table_order"] = case["settings"]["table_order"].split()[0]
    if "router_logits" in artifacts:
        settings["router_logits"] = artifacts["router_logits"]
    if method == "l2c" and case["variant"] == "uvit":
        settings["rows"] = "outer"
    if method == "eoc":
        settings["trend"] = trend_of(goldens, case, artifacts["trend"])
    if method == "icc" and settings["factors"] != "reuse":
        settings["factor_tensors"] = factors_of(goldens, case, artifacts)
    return dittocache.recipe(method, **settings)


def trend_of(goldens: Pack, case: Case, trend: Tensor) -> dict[str, Tensor]:
    """The pack's [2, blocks, steps, tokens, channels] by site and step."""
    named = {}
    for entry in dittocache.describe(goldens.network(case["network"])).entries:
        kind = 0 if entry.site.kind == "attention" else 1
        for n, step in enumerate(case["settings"]["trend_steps"]):
            named[f"{entry.site.name}@{step}"] = trend[kind, entry.site.block, n]
    return named


def factors_of(goldens: Pack, case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pack's factors, stacked over the blocks for every kind of linear layer, by site."""
    linears = dittocache.describe(goldens.network(case["network"])).linears
    return {f"{e.site.name}/{x}": tensors[f"{e.site.kind}_{x}"][e.site.block] for e in linears for x in "AB"}
