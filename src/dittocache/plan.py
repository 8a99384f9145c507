"""The plan: one table, steps x sites, of the share of tokens that is computed.

A plan is what a static method decides before a run, and what any run really did (its trace). Drawing, counting FLOPs,
sharing and comparing all work on this one object.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .parts import check_int, check_number, show

COMPUTE = 1.0
REUSE = 0.0
PARTIAL = -1.0  # the recipe's `which` says how many tokens, once their number is known
OPEN = -2.0  # the recipe's `when` decides during the run

FORMAT = "dittocache-plan-1"


@dataclass(frozen=True)
class Site:
    """A place whose output can be kept: one column of the plan.

    Args:
        name: dotted path of the module inside the transformer.
        kind: of a module `attention`, `cross-attention`, `feed-forward`, `context-feed-forward` or `fused`; of a single
            linear layer `q`, `k`, `v`, `qkv`, `proj`, `fc1`, `fc2` or `linear`; of a span of blocks `block` or `stack`,
            in a U-Net also `deep`, `resnet` or `resample`; `model` of the whole network.
        stack: dotted path of the block list it belongs to.
        block: index of its block within that list.
        depth: number of blocks of that list.
        order: index of its block among all blocks, in order of execution (of its last block, for a stack).
        tokenwise: computing a subset of the tokens gives exactly those rows of the output.
    """

    name: str
    kind: str
    stack: str
    block: int
    depth: int
    order: int
    tokenwise: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Share of tokens computed at every step and site.

    Args:
        table: float array [steps, sites], 1 = all tokens computed, 0 = reused, between = that share of the tokens.
        sites: names of the columns.
        steps: numbers of the sampling steps (k, 0 = noisiest) of the rows; all steps 0..T-1 by default.
        kinds: kind of every site, for grouping in drawings and reports.
        flops: FLOPs of every site when it is computed for all tokens, one forward of each branch; optional.
        flops_rest: FLOPs of a forward that belong to no site and are always spent.
        flops_fill: FLOPs of filling every site when it is reused, for all tokens; optional, none by default.
        fills: name of the fill used at every step; optional.

    Raises:
        ValueError: table and names do not fit, or an entry lies outside [0, 1].
    """

    table: np.ndarray
    sites: tuple[str, ...]
    steps: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    flops: tuple[float, ...] | None = None
    flops_rest: float = 0.0
    flops_fill: tuple[float, ...] | None = None
    fills: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            table = np.array(self.table, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"a plan's table must be an array of numbers; got {show(self.table)}") from None
        if table.ndim != 2:
            raise ValueError(f"a plan's table has 2 dimensions [steps, sites], not {table.ndim}")
        for name in ("sites", "kinds"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"a plan's {name} are a list of names; got {getattr(self, name)!r}")
        sites = tuple(str(s) for s in self.sites)
        steps = tuple(self.steps) or tuple(range(len(table)))
        kinds = tuple(str(kind) for kind in self.kinds) or ("",) * len(sites)
        for k in steps:
            check_int("a plan's step", k, 0)
        if any(after <= before for before, after in itertools.pairwise(steps)):
            raise ValueError(f"a plan names its steps once and in order; got {show(steps)}")
        for what, size in (("steps", len(steps)), ("sites", len(sites))):
            if size != table.shape[what == "sites"]:
                rows, columns = table.shape
                raise ValueError(f"the plan's table is {rows} x {columns}, but there are {size} {what}")
        if len(set(sites)) != len(sites):
            raise ValueError("a plan names every site once")
        costs = [flops for flops in (self.flops, self.flops_fill) if flops is not None]
        if len(kinds) != len(sites) or any(len(flops) != len(sites) for flops in costs):
            raise ValueError(f"a plan's kinds and flops need one entry for each of the {len(sites)} sites")
        for flops in (*(f for cost in costs for f in cost), self.flops_rest):
            check_number("a plan's flops", flops, 0)
        bad = ~((table >= 0) & (table <= 1))
        if bad.any():
            k, s = np.argwhere(bad)[0]
            raise ValueError(f"a plan's entries lie in [0, 1]; step {steps[k]}, site {sites[s]!r} has {table[k, s]}")
        if self.fills is not None and len(self.fills) != len(steps):
            raise ValueError(f"the plan names {len(self.fills)} fills for {len(steps)} steps")
        table.setflags(write=False)
        steps = tuple(int(k) for k in steps)
        for name, value in (("table", table), ("sites", sites), ("steps", steps), ("kinds", kinds)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "meta", copy.deepcopy(dict(self.meta)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Plan)
            and (self.sites, self.steps) == (other.sites, other.steps)
            and np.array_equal(self.table, other.table)
        )

    # ---- counting ---------------------------------------------------------------------------------------------------
    @property
    def flops_full(self) -> float:
        """FLOPs of the run with everything computed; nan when they were not measured."""
        return math.nan if self.flops is None else len(self.steps) * (sum(self.flops) + self.flops_rest)

    @property
    def flops_done(self) -> float:
        """FLOPs that the plan really spends; nan when they were not measured."""
        if self.flops is None:
            return math.nan
        computed = self.table.sum(0)
        filled = (len(self.steps) - computed) @ np.array(self.flops_fill) if self.flops_fill is not None else 0.0
        return float(computed @ np.array(self.flops) + filled) + len(self.steps) * self.flops_rest

    @property
    def compute_fraction(self) -> float:
        """Share of the compute that is done: by FLOPs where they were measured, else the mean of the table."""
        if self.flops_full > 0:
            return self.flops_done / self.flops_full
        return float(self.table.mean()) if self.table.size else 1.0

    @property
    def ideal_speedup(self) -> float:
        """Full over done compute: the speed-up if time followed FLOPs."""
        return 1 / self.compute_fraction if self.compute_fraction > 0 else math.inf

    def share_by_kind(self) -> dict[str, float]:
        """Mean share computed for every kind of site."""
        kinds = np.array(self.kinds)
        return {kind: float(self.table[:, kinds == kind].mean()) for kind in dict.fromkeys(self.kinds)}

    # ---- files ------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "format": FORMAT,
            "steps": list(self.steps),
            "sites": list(self.sites),
            "kinds": list(self.kinds),
            "table": self.table.tolist(),
            "flops": None if self.flops is None else list(self.flops),
            "flops_rest": self.flops_rest,
            "flops_fill": None if self.flops_fill is None else list(self.flops_fill),
            "fills": None if self.fills is None else list(self.fills),
            "meta": dict(self.meta),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            ValueError: not a plan of this format, or a damaged one.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"not a plan: format is {found!r}, expected {FORMAT!r}")
        for name in ("steps", "sites", "kinds", "table"):
            if not isinstance(data.get(name, []), list):
                raise ValueError(f"damaged plan: {name} must be a list; got {show(data[name])}")
        if not isinstance(data.get("meta", {}), Mapping):
            raise ValueError(f"damaged plan: meta must be an object; got {show(data['meta'])}")
        try:
            flops, filling, fills = data.get("flops"), data.get("flops_fill"), data.get("fills")
            empty = np.zeros((0, len(data["sites"])))
            return cls(
                table=data["table"] if data["table"] else empty,
                sites=data["sites"],
                steps=tuple(data["steps"]),
                kinds=data.get("kinds", ()),
                flops=None if flops is None else tuple(flops),
                flops_rest=data.get("flops_rest", 0.0),
                flops_fill=None if filling is None else tuple(filling),
                fills=None if fills is None else tuple(fills),
                meta=dict(data.get("meta", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged plan: {error!r}") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"damaged plan: not JSON ({error})") from None
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    # ---- pictures ---------------------------------------------------------------------------------------------------
    def draw(self, path: str | Path, title: str | None = None) -> None:
        """Writes the heat map steps x sites, sites grouped by kind, as PNG, SVG or PDF (by the ending of `path`).

        Raises:
            ImportError: matplotlib is missing (`pip install dittocache[eval]`).
        """
        from .drawing import draw_plan

        draw_plan(self, path, title)


def align(plan: Plan, sites: Sequence[Site]) -> np.ndarray:
    """The plan's table [steps, len(sites)] with its columns in the order of `sites`; sites it does not name compute.

    Raises:
        ValueError: the plan names a site that the model does not have.
    """
    column = {site.name: j for j, site in enumerate(sites)}
    unknown = [name for name in plan.sites if name not in column]
    if unknown:
        raise ValueError(
            f"the plan's site {unknown[0]!r} is not in this model; its sites are {', '.join(column) or 'none'}"
        )
    table = np.full((len(plan.steps), len(sites)), COMPUTE)
    for j, name in enumerate(plan.sites):
        table[:, column[name]] = plan.table[:, j]
    return table
