"""The training loop of a router. Every random number is a function of the seed and the place it is drawn for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..parts import check_bool, check_int, check_number
from . import checkpoint
from .objective import Objective, Predict, Walk
from .workers import Workers

if TYPE_CHECKING:
    from ..evaluate.compare import Progress

FORM = "dittocache-router-training-1"
SMOOTH = 0.98  # share of the past in the loss that is shown


@dataclass(frozen=True)
class Settings:
    """How a router is trained. The defaults are the paper's for DiT-XL/2 at 20 steps (one epoch of ImageNet).

    Args:
        iterations: at most; patience may end it earlier.
        batch_size: samples of one process and iteration.
        learning_rate: of AdamW, constant; the paper's also for 10 and 50 steps (1e-2 for DiT-L/2 at 20 steps).
        penalty: lambda, the price of a computed module: 5e-6 (1e-6 for 10 and 50 steps, 0.1 for U-ViT, whose errors
            are sums). It decides the share removed, and wants tuning for every model.
        threshold: theta, at which decisions are counted; the hard indicator's, if `hard`.
        hard: straight-through: modules are computed or reused in training already, with identity gradient.
        per_sample: a step for every sample, evenly spread, so that an iteration trains many rows and fewer iterations
            are needed by as many times. The paper draws one step for a whole batch.
        label_dropout: probability of the null label, the same in all forwards of a sample.
        seed: of start, draws and noise.
        patience: iterations without a change in any decision that end the training; None: never.
        checkpoint_every: iterations between checkpoints.

    Raises:
        ValueError: a value out of range.
    """

    iterations: int = 20_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    penalty: float = 5e-6
    threshold: float = 0.1
    hard: bool = False
    per_sample: bool = False
    label_dropout: float = 0.1
    seed: int = 0
    patience: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, low in (("iterations", 1), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1)):
            check_int(name, getattr(self, name), low)
        if self.patience is not None:
            check_int("patience", self.patience, 1)
        check_number("learning_rate", self.learning_rate, 0)
        check_number("penalty", self.penalty, 0)
        check_number("threshold", self.threshold, 0, 1)
        check_number("label_dropout", self.label_dropout, 0, 1)
        check_bool("hard", self.hard)
        check_bool("per_sample", self.per_sample)

    def fixed(self) -> dict[str, Any]:
        """What a training that goes on must share with the one that stopped."""
        free = {"iterations", "patience", "checkpoint_every"} | (set() if self.hard else {"threshold"})
        return {name: value for name, value in asdict(self).items() if name not in free}


class Data(NamedTuple):
    """What is trained on.

    Attributes:
        x0: clean samples in the network's space [n, ...].
        conditions: labels, or whatever `predict` takes [n, ...].
        null: the condition that stands for none; None: conditions are never dropped.
        weights: of the squared errors of each row [rows]; None for ones, as in the paper.
    """

    x0: Tensor
    conditions: Tensor
    null: Any = None
    weights: Tensor | None = None


class Draw(NamedTuple):
    """The random choices of one micro-batch: rows [batch] int64, samples [batch] int64, dropped [batch] bool, noise."""

    rows: Tensor
    samples: Tensor
    dropped: Tensor
    noise: Tensor


def generator(*place: int) -> torch.Generator:
    """A generator for a place, such as (seed, iteration, rank); other places have other numbers."""
    state = np.random.SeedSequence(place).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw(settings: Settings, trained: Sequence[int], data: Data, iteration: int, rank: int) -> Draw:
    """The choices of a process in an iteration; they depend on nothing else."""
    random, batch = generator(settings.seed, 1, iteration, rank), settings.batch_size
    if settings.per_sample:  # every row as often as the others, up to one
        order = torch.randperm(len(trained), generator=random)
        rows = torch.tensor(trained)[order.repeat(-(-batch // len(trained)))[:batch]]
    else:
        rows = torch.tensor(trained)[torch.randint(len(trained), (1,), generator=random)].expand(batch)
    samples = torch.randint(len(data.x0), (batch,), generator=random)
    dropped = torch.rand(batch, generator=random) < settings.label_dropout
    noise = torch.randn(batch, *data.x0.shape[1:], generator=random)
    return Draw(rows, samples, dropped & (data.null is not None), noise)


def optimizer_of(logits: Sequence[Tensor], learning_rate: float) -> torch.optim.AdamW:
    """AdamW as the paper sets it: no decay. Rows without a gradient keep their values and moments."""
    return torch.optim.AdamW(logits, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


@torch.no_grad()
def clamp(logits: Iterable[Tensor], limit: float | None) -> None:
    """Keeps logits within [-limit, limit], in place."""
    for row in logits if limit is not None else ():
        row.clamp_(-limit, limit)  # type: ignore[operator]


class Training:
    """A router in training: rows of logits, each a parameter of its own, with what the optimiser knows of them.

    Args:
        sites: number of columns.
        config: what must be the same when a checkpoint is taken up again; JSON values.
    """

    def __init__(self, walk: Walk, sites: int, settings: Settings, config: dict[str, Any], device: Any) -> None:
        self.walk, self.settings, self.config = walk, settings, config
        start = torch.randn(walk.rows, sites, generator=generator(settings.seed, 0)).to(device)
        self.logits = [nn.Parameter(row.clone()) for row in start]
        self.optimizer = optimizer_of(self.logits, settings.learning_rate)
        self.iteration, self.unchanged = 0, 0
        self.loss: float | None = None
        self.seconds = 0.0

    @property
    def table(self) -> Tensor:
        """Logits [rows, sites], on the CPU."""
        return torch.stack(list(self.logits)).detach().cpu()

    def decisions(self) -> Tensor:
        """Whether a site is computed [trained rows, sites], bool."""
        return self.table[list(self.walk.trained)].sigmoid() > self.settings.threshold

    @property
    def removed(self) -> float:
        """Share of the sites of cache steps that are reused."""
        return 1 - float(self.decisions().float().mean())

    @property
    def finished(self) -> bool:
        patience = self.settings.patience
        return self.iteration >= self.settings.iterations or (patience is not None and self.unchanged >= patience)

    def step(self, objective: Objective, data: Data, workers: Workers) -> None:
        """One iteration. Gradients of several processes are averaged, those of rows that one did not draw being 0."""
        began, settings, device = time.perf_counter(), self.settings, self.logits[0].device
        chosen = draw(settings, self.walk.trained, data, self.iteration, workers.rank)
        conditions = data.conditions[chosen.samples].clone()
        if chosen.dropped.any():
            conditions[chosen.dropped] = data.null
        terms = objective(
            self.walk,
            self.logits,
            chosen.rows,
            data.x0[chosen.samples].to(device),
            chosen.noise.to(device, data.x0.dtype),
            conditions.to(device),
            settings.penalty,
            settings.threshold if settings.hard else None,
            data.weights,
        )
        drawn = chosen.rows.unique().tolist()
        found = torch.zeros(len(self.logits), self.logits[0].numel() + 1, device=device)  # and whether it was drawn
        for row, gradient in zip(drawn, torch.autograd.grad(terms.loss, [self.logits[row] for row in drawn])):
            found[row, :-1], found[row, -1] = gradient, 1
        found = workers.total(torch.cat([found.flatten(), terms.loss.detach()[None]])) / workers.count
        loss, found = float(found[-1]), found[:-1].view(len(self.logits), -1)
        if not found.isfinite().all() or not math.isfinite(loss):
            raise ValueError(f"the loss of iteration {self.iteration} is {loss:g}: its gradient is not finite")
        before = self.decisions()
        for parameter, row in zip(self.logits, found):
            parameter.grad = row[:-1].clone() if row[-1] > 0 else None
        self.optimizer.step()
        clamp(self.logits, self.walk.limit)
        self.iteration += 1
        self.unchanged = self.unchanged + 1 if torch.equal(before, self.decisions()) else 0
        self.loss = loss if self.loss is None else SMOOTH * self.loss + (1 - SMOOTH) * loss
        self.seconds += time.perf_counter() - began

    # ---- files ------------------------------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        """Writes everything that going on bit for bit takes."""
        tensors = {"logits": self.table}
        for row, parameter in enumerate(self.logits):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{row}/{name}"] = value
        state = {name: getattr(self, name) for name in ("iteration", "unchanged", "loss", "seconds")}
        checkpoint.write(path, FORM, tensors, {"config": self.config, **state})

    def load(self, path: Path) -> None:
        """Takes up a checkpoint.

        Raises:
            ValueError: it is damaged or foreign, or of another training.
        """
        tensors, state = checkpoint.read(path, FORM)
        try:
            checkpoint.same(path, state["config"], self.config)
            logits = tensors.pop("logits")
            if logits.shape != self.table.shape:
                raise KeyError("logits")
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                row, _, kind = name.partition("/")
                moments.setdefault(int(row), {})[kind] = value
            groups = self.optimizer.state_dict()["param_groups"]
            with torch.no_grad():
                for parameter, values in zip(self.logits, logits):
                    parameter.copy_(values)
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            for name in ("iteration", "unchanged", "loss", "seconds"):
                setattr(self, name, state[name])
        except KeyError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error} is missing; begin anew with fresh (--fresh)") from None


def train(
    network: nn.Module,
    predict: Predict,
    walk: Walk,
    data: Data,
    settings: Settings,
    *,
    path: Path | None = None,
    config: dict[str, Any] | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Training:
    """Trains a router for a network of one's own.

    Args:
        network, predict: see `Objective`; weights are frozen meanwhile, and everything is as it was afterwards.
        walk: `steps.Pairs` of a scheduler, or U-ViT's `steps.OuterSteps`.
        path: of the checkpoint, which is taken up if there is one; None: nothing is written.
        config: what else must be the same in the checkpoint, such as the model and the data; JSON values.
        workers: the processes; by default those that were started.
        progress: called as progress(done, total, what is running), in the first process only.

    Raises:
        ValueError: settings that the walk cannot follow, a checkpoint that is damaged or of another training, or a loss
            that is not finite.
        ImportError: several processes, but no accelerate.
    """
    if settings.per_sample and not walk.per_sample:
        raise ValueError(f"per_sample does not go with {type(walk).__name__}: a batch has one step there")
    workers = workers or Workers()
    device = next(network.parameters()).device
    with Objective(network, predict) as objective:
        fixed = {**settings.fixed(), **walk.to_dict(), **(config or {}), "processes": workers.count}
        training = Training(walk, objective.columns, settings, fixed, device)
        if path is not None and path.exists():
            training.load(path)
        while not training.finished:
            training.step(objective, data, workers)
            due = training.iteration % settings.checkpoint_every == 0 or training.finished
            if due and path is not None and workers.rank == 0:
                training.save(path)
            if progress is not None and workers.rank == 0:
                what = f"loss {training.loss:.3g}, {training.removed:.0%} removed"
                progress(training.iteration, settings.iterations, what)
        workers.wait()
    return training
