"""Schedules that are decided at run time by how much has changed: TeaCache, First Block Cache, DiCache.

All skip whole stacks, and decide for every sample on its own unless `batch = "batch"`. A step that some other rule
computes (the first one, inputs of another shape) still leaves its references here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..parts import check_bool, check_choice, check_int, check_number, show
from ..plan import COMPUTE, OPEN, Site
from .base import Look, When

BATCH = ("sample", "batch")


def change(new: Tensor, old: Tensor) -> Tensor:
    """mean|new - old| / mean|old| of every sample, in float32: [samples].

    0 where nothing has changed, also where all is zero, as behind a gate that is still closed.

    Args:
        new, old: [samples, values, channels].
    """
    moved = (new.float() - old.float()).abs().mean((1, 2))
    return torch.where(moved == 0, moved, moved / old.float().abs().mean((1, 2)))


@dataclass(frozen=True)
class _ByChange(When):
    """What the three have in common."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("batch", self.batch, BATCH)

    def table(self, num_steps: int, sites: Sequence[Site]) -> np.ndarray:
        """All open: forced steps are seen, too, for the references that they leave."""
        return np.full((num_steps, len(sites)), OPEN)

    def fits(self, sites: Sequence[Site]) -> None:
        """Raises a ValueError for sites that are no stacks, or for stacks that the head fills."""
        other = next((site for site in sites if site.kind != "stack"), None)
        if other is not None:
            raise ValueError(
                f"{type(self).__name__} decides about whole stacks: where must be stack or tail; {other.name!r} is of "
                f"kind {other.kind!r}"
            )
        blocks = sum(site.depth for site in sites)
        if self.head >= blocks:
            raise ValueError(
                f"the first {self.head} blocks are always computed, but the model has {blocks} in its stacks: "
                "nothing is left to skip"
            )


def _accumulate(look: Look, memory: dict[str, Any], error: Tensor | None, threshold: float, strict: bool) -> Any:
    """Adds to the error since the last computed step; computes, and forgets it, unless the sum is below the threshold.

    Args:
        error: [samples]; None at a forced step.

    Returns:
        What `When.decide` returns.
    """
    if error is None:
        memory["sum"] = None
        return COMPUTE
    total = error if memory["sum"] is None else memory["sum"] + error
    computed = ~(total < threshold if strict else total <= threshold)  # what is not a number is computed
    memory["sum"] = torch.where(computed, 0, total)
    return computed


@dataclass(frozen=True)
class SignalChange(_ByChange):
    """Accumulated polynomial of the change of a signal since the step before (TeaCache, arXiv 2411.19108).

    With r the relative L1 change of the signal, the sum of poly(r) over the steps since the last computed one decides:
    below the threshold a step is skipped. The signal of every step is remembered, skipped ones included. The polynomial
    is taken in float64 and not clamped.

    Args:
        threshold: of the sum; strictly below it is skipped.
        coefficients: of the polynomial, highest power first; (1, 0) leaves r as it is.
        signal: "modulated": what the first attention is given, after norm, scale and shift; "embedding": the time
            embedding that the first block is given.
        first_full: so many steps are computed at the start.
        last_full: the last step is computed.
        batch: "sample", or "batch" for one decision for all.
    """

    threshold: float = 0.1
    coefficients: tuple[float, ...] = (1.0, 0.0)
    signal: str = "modulated"  # type: ignore[misc]
    first_full: int = 1
    last_full: bool = True
    batch: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 0)
        if not isinstance(self.coefficients, tuple) or not self.coefficients:
            raise ValueError(f"coefficients must be a list of numbers; got {show(self.coefficients)}")
        for coefficient in self.coefficients:
            check_number("every entry of coefficients", coefficient)
        check_choice("signal", self.signal, ("modulated", "embedding"))
        check_int("first_full", self.first_full, 1)
        check_bool("last_full", self.last_full)

    def decide(self, look: Look, memory: dict[str, Any]) -> float | Tensor:
        signal = cast(Tensor, look.signal)  # stacks have one, and `fits` takes no other sites
        before, memory["signal"] = memory.get("signal"), signal.detach().clone()  # models may go on with it in place
        error = None
        full = look.step < self.first_full or (self.last_full and look.step == look.num_steps - 1)
        if not (look.forced or full or before is None):
            error = self._rescaled(change(signal, before))
        return _accumulate(look, memory, error, self.threshold, strict=True)

    def _rescaled(self, x: Tensor) -> Tensor:
        """The polynomial of x by Horner's rule, float64 on the CPU: [samples]."""
        x = x.detach().cpu().double()
        value = torch.zeros_like(x)
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return value


@dataclass(frozen=True)
class HeadChange(_ByChange):
    """Change of what the first block adds, against the last computed step (First Block Cache of ParaAttention).

    The first block always runs; with r what it has changed, the rest is skipped where mean|r - r_ref| / mean|r_ref| is
    below the threshold, r_ref being that of the last computed step. Nothing is accumulated.

    Args:
        threshold: strictly below it is skipped.
        warmup_steps: so many steps are computed at the start.
        stride: every stride-th channel of r is looked at.
        batch: "sample", or "batch" for one decision for all.
    """

    threshold: float = 0.05
    warmup_steps: int = 0
    stride: int = 1
    batch: str = "sample"

    signal = "state"
    head = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 0)
        check_int("warmup_steps", self.warmup_steps, 0)
        check_int("downsample_factor", self.stride, 1)

    def decide(self, look: Look, memory: dict[str, Any]) -> float | Tensor:
        added = (cast(Tensor, look.signal) - look.state)[..., :: self.stride].detach().contiguous()
        reference = memory.get("added")
        if look.forced or reference is None or look.step < self.warmup_steps:
            memory["added"] = added
            return COMPUTE
        computed = ~(change(added, reference) < self.threshold)
        memory["added"] = torch.where(computed[:, None, None], added, reference)
        return computed


@dataclass(frozen=True)
class ProbeChange(_ByChange):
    """Accumulated change of a shallow probe since the step before (DiCache, arXiv 2508.17356).

    The first `head` blocks always run, and a computed step goes on from them. With dy the relative L1 change of what
    leaves them since the step before, and dx that of what enters, the sum of dy or |dy - dx| over the steps since the
    last computed one decides.

    Args:
        threshold: of the sum; below it is skipped.
        head: blocks of the probe.
        error: "probe" for dy, "difference" for |dy - dx|.
        retention: share of the run that is computed at its start: steps k <= int(retention T), or < if not inclusive.
        inclusive: see there; the authors' FLUX, unlike their HunyuanVideo.
        strict: a sum equal to the threshold is computed, as on FLUX; on HunyuanVideo it is skipped.
        last_full: the last step is computed, as on FLUX only.
        batch: "sample", or "batch" for one decision for all.
    """

    threshold: float = 0.4
    head: int = 1
    error: str = "probe"
    retention: float = 0.2
    inclusive: bool = True
    strict: bool = True
    last_full: bool = True
    batch: str = "sample"

    signal = "state"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 0)
        check_int("probe_depth", self.head, 1)
        check_choice("error", self.error, ("probe", "difference"))
        check_number("retention", self.retention, 0, 1)
        for name in ("inclusive", "strict", "last_full"):
            check_bool(name, getattr(self, name))

    def decide(self, look: Look, memory: dict[str, Any]) -> float | Tensor:
        entered, left = look.state, cast(Tensor, look.signal)
        before = memory.get("streams")
        memory["streams"] = torch.stack([entered, left]).detach()
        error = None
        if not (look.forced or self._full(look.step, look.num_steps) or before is None):
            error = change(left, before[1])
            if self.error == "difference":
                error = (error - change(entered, before[0])).abs()
        return _accumulate(look, memory, error, self.threshold, self.strict)

    def _full(self, step: int, num_steps: int) -> bool:
        kept = int(self.retention * num_steps)
        early = step <= kept if self.inclusive else step < kept
        return early or (self.last_full and step == num_steps - 1)
