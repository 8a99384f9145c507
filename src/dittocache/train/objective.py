"""L2C's differentiable objective (arXiv 2406.01733), through the library's own hooks: no model's forward is copied.

A recording forward keeps what every module computes, c. In the student's, each module hands on
beta * f + (1 - beta) * c, with f computed on the student's own stream: beta = 1 computes, beta = 0 reuses.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..cache import enable
from ..fill import At, Entry, Fill
from ..models.uvit import UViT
from ..recipe import Recipe
from ..when import Every

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [batch, ...], timesteps [batch], conditions [batch])
Record = Callable[[Tensor, Tensor], Tensor]  # the same for a recording forward, whose conditions are set
MOST = 4  # forwards of one micro-batch: one or two recordings, the teacher, the student


class Walk(Protocol):
    """Where a full step leads to a cache step; see `steps`."""

    rows: int  # of the router
    trained: tuple[int, ...]  # the rows that are read, and trained
    sums: bool  # the squared error of a sample is summed over its entries, not averaged
    limit: float | None  # logits are kept within this distance from zero
    per_sample: bool  # the samples of a batch may have different rows

    def to_dict(self) -> dict[str, Any]:
        """JSON values that tell this walk from others."""
        ...

    def start(self, rows: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """Noisy inputs of the full step before the cache step of each row: x0, noise [batch, ...], rows [batch]."""
        ...

    def advance(self, rows: Tensor, x: Tensor, record: Record) -> tuple[Tensor, Tensor]:
        """Inputs and timesteps [batch] of the cache step, by recording forwards from x."""
        ...


class Terms(NamedTuple):
    """What the objective is made of.

    Attributes:
        noisy: input of the full step [batch, ...].
        recorded: input and output of every recording forward.
        x: input of the cache step.
        teacher, student: outputs there.
        data: squared error of each sample [batch], mean or sum over its entries.
        penalty: sum of sigmoid(logits) of each sample's row [batch].
        loss: mean over the batch of weight * data + penalty factor * penalty.
    """

    noisy: Tensor
    recorded: list[tuple[Tensor, Tensor]]
    x: Tensor
    teacher: Tensor
    student: Tensor
    data: Tensor
    penalty: Tensor
    loss: Tensor


class _Mix(Fill):
    """Keeps what recording forwards compute, and mixes it in where there is a beta. No dataclass: not to be saved."""

    mixes: ClassVar[bool] = True

    def __init__(self) -> None:
        self.records = False
        self.beta: Tensor | None = None  # [sites] or [batch, sites]
        self.columns: dict[str, int] = {}

    def keep(self, entry: Entry, value: tuple[Tensor, ...], at: At) -> None:
        if self.records:
            entry.values, entry.steps = [value], [at.step]

    def mix(self, entry: Entry, value: tuple[Tensor, ...], at: At) -> tuple[Tensor, ...]:
        if self.beta is None:
            return value
        beta = self.beta[..., self.columns[at.site.name]]
        mixed = []
        for new, kept in zip(value, entry.values[0], strict=True):
            if beta.ndim and len(new) != len(beta):
                raise ValueError(
                    f"{at.site.name} has {len(new)} rows for {len(beta)} samples: train with per_sample=False"
                )
            b = beta.view(-1, *[1] * (new.ndim - 1)) if beta.ndim else beta
            mixed.append((b * new + (1 - b) * kept).to(new.dtype))
        return tuple(mixed)


class Objective:
    """The objective on one network. Inside of `with`, the network is frozen, in eval mode, and hooked.

    Args:
        network: the module with the blocks; it holds all sites.
        predict: its prediction, `predict(x, timesteps, conditions)`; one call of the network each.

    Raises:
        ValueError: nothing in the network can be cached.
    """

    def __init__(self, network: nn.Module, predict: Predict) -> None:
        self.network, self.predict = network, predict
        self.fill = _Mix()

    def __enter__(self) -> Objective:
        self.stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.cache = stack.enter_context(enable(self.network, Recipe(Every(1), fill=self.fill, method="none")))
            sites = [self.cache.description.columns[j] for j in self.cache.used]
            self.fill.columns = {site.name: n for n, site in enumerate(sites)}
            stack.enter_context(frozen(self.network))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    @property
    def columns(self) -> int:
        """Number of sites, in order of execution."""
        return len(self.fill.columns)

    def __call__(
        self,
        walk: Walk,
        logits: Sequence[Tensor],
        rows: Tensor,
        x0: Tensor,
        noise: Tensor,
        conditions: Tensor,
        penalty: float,
        threshold: float | None = None,
        weights: Tensor | None = None,
    ) -> Terms:
        """The objective of one micro-batch; gradients reach the drawn rows of the router only.

        Args:
            walk: where the full step leads.
            logits: the router's rows, each [sites].
            rows: the row of each sample [batch], int64, on the CPU; all the same unless `walk.per_sample`.
            x0, noise: clean samples and normal noise [batch, ...].
            conditions: labels, or what `predict` takes [batch]; the same in all forwards. No guidance.
            penalty: lambda.
            threshold: for the hard indicator sigmoid(logit) > threshold with identity gradient; None for soft scores.
            weights: of the squared errors of each row [rows]; None for ones, as in the paper.
        """
        drawn, which = rows.unique(return_inverse=True)
        scores = torch.stack([logits[r] for r in drawn.tolist()]).sigmoid()
        beta = scores if threshold is None else (scores > threshold).float() + (scores - scores.detach())
        which = which.to(scores.device)
        recorded: list[tuple[Tensor, Tensor]] = []

        with self.cache.run(MOST) as run, contextlib.closing(run):

            def forward(x: Tensor, t: Tensor) -> Tensor:
                run.step(0 if run.step_index is None else run.step_index + 1)
                return self.predict(x, t, conditions)

            def record(x: Tensor, t: Tensor) -> Tensor:
                recorded.append((x, forward(x, t)))
                return recorded[-1][1]

            try:
                with torch.no_grad():
                    self.fill.records = True
                    noisy = walk.start(rows, x0, noise)
                    x, t = walk.advance(rows, noisy, record)
                    self.fill.records = False
                    teacher = forward(x, t)
                self.fill.beta = beta[0] if len(drawn) == 1 else beta[which]
                student = forward(x, t)
            finally:
                self.fill.records, self.fill.beta = False, None
        error = (teacher - student).float().square().flatten(1)
        data = error.sum(1) if walk.sums else error.mean(1)
        kept = scores.sum(1)[which]
        weight = 1.0 if weights is None else weights[rows].to(data)
        loss = (weight * data + penalty * kept).mean()
        return Terms(noisy, recorded, x, teacher, student, data, kept, loss)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for weights; both as they were afterwards."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module in training:
            module.training = True


def class_conditional(network: nn.Module) -> tuple[Predict, int]:
    """How to call a class-conditional network, and its null label: diffusers' DiT and its kin, and U-ViT.

    Raises:
        ValueError: another network.
    """
    if isinstance(network, UViT) and network.num_classes:
        return network, network.num_classes - 1
    classes = getattr(getattr(network, "config", None), "num_embeds_ada_norm", None)
    if not classes or not {"timestep", "class_labels"} <= set(inspect.signature(network.forward).parameters):
        raise ValueError(
            f"{type(network).__name__} is not known to be class-conditional: call train_router with a function "
            "predict(x, timesteps, conditions) of your own"
        )

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return network(x, timestep=t, class_labels=labels, return_dict=False)[0]

    return predict, int(classes)
