"""ICC's factors: channel statistics of every linear layer's inputs and outputs, and a weighted SVD of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..describe import SiteModule, describe
from ..fill import At
from ..parameters import Int, PerKind
from ..recipe import Recipe, recipe
from .base import Calibrator, See, Seen, add
from .channels import channel_statistic, channel_weights, low_rank_factors
from .setup import Setup, timesteps
from .statistics import Statistics


@dataclass(frozen=True)
class CalibrateICC(Calibrator):
    """Channel weights from uncached runs, then low-rank factors (arXiv 2505.05829).

    The authors noise 256 training images to random steps; here the statistics are taken along the pipeline's own
    uncached runs, at every step, so that no data set is needed. "svd" needs no samples at all.
    """

    method = "icc"
    where = "linear"
    keeps_inputs = True
    once = False

    period: Annotated[int, Int(1, help="step k is full iff k mod period = 0")] = 2
    factors: Annotated[
        Literal["svd", "activation-svd", "change-svd"],
        "weights of the channels: none, the size of activations, or of their change between steps",
    ] = "activation-svd"
    rank: Annotated[
        int | dict[str, int] | None,
        PerKind(
            Int(1),
            help="rank of the factors: one for all, or by kind of layer (q, k, v, proj, fc1, fc2); None for a ninth of "
            "the layer's, as the authors' 128 of 1152",
        ),
    ] = None

    @property
    def needs_samples(self) -> bool:
        return self.factors != "svd"

    def settings(self) -> dict[str, Any]:
        return {"factors": self.factors}

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        self._check_ranks(pipe)
        if self.factors == "change-svd" and len(timesteps(pipe, setup)) < 2:
            raise ValueError("a run of 1 step has no change between steps: use 2 or more, or factors='activation-svd'")
        # whatever the ranks are, so that the same statistics serve all of them
        groups: dict[str, list[str]] = {}
        for entry in describe(pipe.transformer).linears:
            if entry.site.kind in ("q", "k", "v"):
                groups.setdefault(entry.site.name.rpartition(".")[0], []).append(entry.site.name)
        siblings = {name: group for group in groups.values() for name in group}
        outputs: dict[str, Tensor] = {}

        def see(at: At, new: Seen, old: Seen | None) -> None:
            name, output, inputs = at.site.name, new.output, new.input
            if self.factors == "change-svd":
                if old is None:
                    return
                output, inputs = output - old.output, inputs - old.input
            add(sums, f"{name}/in", channel_statistic(inputs))
            add(sums, f"{name}/count", torch.tensor(float(len(output))))
            if name not in siblings:
                add(sums, f"{name}/out", channel_statistic(output))
                return
            # q, k and v are normalised together: where the authors work they are one layer
            outputs[name] = output
            if all(one in outputs for one in siblings[name]):
                group = {one: outputs.pop(one) for one in siblings[name]}
                joint = channel_statistic(*group.values())
                for part, one in zip(joint.split([o.shape[-1] for o in group.values()]), group):
                    add(sums, f"{one}/out", part)

        return see

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        tensors: dict[str, Tensor] = {}
        for entry in self._check_ranks(pipe):
            name, weight, left, right = entry.site.name, _weight(entry), None, None
            parts = _parts(entry)
            if self.needs_samples:
                count = statistics.sum(f"{name}/count")
                left = channel_weights((statistics.sum(f"{name}/out") / count).float(), parts=parts)
                right = channel_weights((statistics.sum(f"{name}/in") / count).float())
            a, b = low_rank_factors(weight, left, right, self._rank(entry), parts=parts)
            tensors |= {f"{name}/A": a, f"{name}/B": b}
        rank = self.rank if isinstance(self.rank, int) else None
        return recipe("icc", period=self.period, factors=self.factors, rank=rank, factor_tensors=tensors)

    def _rank(self, entry: SiteModule) -> int:
        if self.rank is None:
            return max(1, round(min(_weight(entry).shape) / 9))
        return self.rank if isinstance(self.rank, int) else self.rank.get(entry.site.kind, 0)

    def _check_ranks(self, pipe: Any) -> list[SiteModule]:
        """The layers that get factors; a kind without a rank gets none, and is held.

        Raises:
            ValueError: there are no linear layers, a kind is unknown, or a rank is above a layer's.
        """
        description = describe(pipe.transformer)
        kinds = list(dict.fromkeys(entry.site.kind for entry in description.linears))
        if not kinds:
            raise ValueError(f"{description.model} has no plain linear layers in attention and feed-forward modules")
        unknown = sorted(set(self.rank) - set(kinds)) if isinstance(self.rank, dict) else []
        if unknown:
            raise ValueError(f"rank names {unknown[0]!r}; the layers of {description.model} are: {', '.join(kinds)}")
        chosen = [entry for entry in description.linears if self._rank(entry)]
        for entry in chosen:
            out, width = _weight(entry).shape
            full = min(out // _parts(entry), width)
            if self._rank(entry) > full:
                raise ValueError(
                    f"rank is {self._rank(entry)}, but {entry.site.name!r} ({entry.site.kind}) has rank {full} at most"
                )
        return chosen


def _weight(entry: SiteModule) -> Tensor:
    return entry.module.weight.detach().float()  # type: ignore[operator]


def _parts(entry: SiteModule) -> int:
    """Layers that are fused in one."""
    return 3 if entry.site.kind == "qkv" else 1
