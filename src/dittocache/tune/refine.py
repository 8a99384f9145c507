"""All factors of a plan at once, towards the end of the run: Gauss-Newton.

Factors that are fitted one step after another (`predictor`) take the next latents back to where they should be, and
nobody asks what the network makes of what is left. Here every factor is moved a little, the run goes on from there,
and the last latents tell what it does: least squares on these changes gives the step of all factors together.
(Gauss-Newton with Marquardt's damping; Numerical Optimization, Nocedal and Wright, 10.3.) No gradients are needed, so
that it works on networks that are compiled, quantised or offloaded. A step's factors cost the computed steps after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import clock
from ..cache import enable
from ..calibrate.setup import Setup, draw
from ..fill import Hold
from ..recipe import Recipe
from ..when import ReuseSteps
from .trajectory import Trajectories, scaled, stepped

PUSH = 0.3  # of what the latents are off at the next computed step
Progress = Callable[[int, int], object]


def go_on(done: int, total: int) -> bool:
    """Ends nothing."""
    return False


# ---- factors --------------------------------------------------------------------------------------------------------
def predicted(row: Tensor, outputs: Sequence[Tensor], latents: Tensor | None) -> Tensor:
    """A prediction from [H + 1] factors: of at most H outputs, newest first, and of the network's input, if used."""
    made = torch.zeros_like(outputs[0], dtype=torch.float32) if latents is None else float(row[-1]) * latents
    for factor, output in zip(row[:-1].tolist(), outputs, strict=False):
        made = made + factor * output.float()
    return made.to(outputs[0].dtype)


# ---- runs -----------------------------------------------------------------------------------------------------------
@dataclass
class Replay(clock.Silent):
    """Draws a plan with these factors; outputs that are known are taken, not computed.

    Args:
        computed: steps.
        table: [T, H + 1] factors.
        inputs: whether the network's input is used.
        known: outputs of computed steps.
        brief: only the last latents are wanted, and no pictures.
    """

    computed: frozenset[int]
    table: Tensor
    inputs: bool = False
    known: dict[int, Tensor] = field(default_factory=dict)
    brief: bool = False
    step: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)
    fed: list[Tensor | None] = field(default_factory=list)  # the network's input at every step, if it is used
    latents: list[Tensor] = field(default_factory=list)  # that the scheduler was handed, and the last ones

    def on_begin(self, scheduler: Any) -> None:
        self.step, self.outputs, self.fed, self.latents = 0, {}, [], []

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        if self.step in self.computed:
            self.outputs[self.step] = self.known.get(self.step, prediction)
        newest_first = list(self.outputs.values())[::-1]
        inputs = scaled(scheduler, sample, timestep) if self.inputs else None
        if not self.brief:
            self.fed.append(inputs)
            self.latents.append(sample.detach().float())
        made = predicted(self.table[self.step], newest_first, inputs)
        self.step += 1
        if self.step == len(self.table):
            self.latents.append(stepped(scheduler, made, timestep, sample))
            if self.brief:
                raise clock.Enough  # no pictures are made
        return made

    def run(self, pipe: Any, setup: Setup, samples: Sequence[int]) -> Tensor | None:
        """Draws the samples, and returns their pictures."""
        filled = (k for k in range(1, setup.num_steps) if k not in self.computed or k in self.known)
        recipe = Recipe(where="model", when=ReuseSteps(tuple(filled)), fill=Hold())
        with enable(pipe, recipe), clock.observed(pipe.scheduler, self), contextlib.suppress(clock.Enough):
            return torch.as_tensor(draw(pipe, setup, samples))
        return None


# ---- normal equations -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Equations:
    """Normal equations of a plan's factors. From a computed step to the next they are moved together: what the latents
    get is one combination of outputs, whichever of these steps adds it.

    Attributes:
        table: [T, H + 1] where they were made.
        directions: [unknowns][T, H + 1] what is moved.
        matrix: [unknowns, unknowns] inner products of the changes of the last latents, J'J.
        gained: [unknowns] inner products with what is missed, J'r.
    """

    table: Tensor
    directions: list[Tensor]
    matrix: Tensor
    gained: Tensor

    def solved(self, damping: float) -> Tensor:
        """[T, H + 1] better factors, a step of Levenberg-Marquardt: the more damping, the nearer to those there are."""
        diagonal = self.matrix.diagonal()
        damped = self.matrix + torch.diag(damping * diagonal + 1e-12 * diagonal.mean())
        shares = torch.linalg.solve(damped, self.gained)
        return self.table + torch.tensordot(shares, torch.stack(self.directions), dims=1)


def equations(
    pipe: Any,
    setup: Setup,
    samples: Sequence[int],
    runs: Trajectories,
    computed: Sequence[int],
    table: Tensor,
    inputs: bool,
    progress: Progress = go_on,
) -> Equations:
    """Moves every factor of a plan, and sees what becomes of the last latents.

    Samples count by the inverse of the root of their squared error: no single one decides.

    Args:
        pipe: without a cache, with the scheduler that the plan is for.
        setup: how the samples are drawn.
        samples: their numbers, the first of those in `runs`.
        runs: where the latents are wanted.
        computed: steps of the plan.
        table: [T, H + 1] factors.
        inputs: whether those of the network's input are moved, too.
        progress: called as progress(steps computed, in all); what it returns as true ends it with the factors so far.
    """
    count = len(samples)  # some pipelines step both halves of guidance; the first is the pictures'
    wanted = [latents[:count] for latents in runs.latents]
    plan = Replay(frozenset(computed), table, inputs)
    plan.run(pipe, setup, samples)
    ended = plan.latents[-1][:count].cpu()
    missed = (wanted[-1] - ended).flatten(1).double()
    weights = missed.square().mean(1, keepdim=True).clamp(min=1e-12) ** -0.25  # of both factors of a product
    directions, changes, calls = list[Tensor](), list[Tensor](), 0
    for n, step in enumerate(computed):
        if progress(calls, cost(len(computed), table.shape[1] - 1, inputs)) and changes:
            break
        history = computed[max(n + 2 - table.shape[1], 0) : n + 1][::-1]
        bases = [base for base in (*(plan.outputs[k] for k in history), plan.fed[step]) if base is not None]
        following = [*computed, setup.num_steps][n + 1]
        off = (plan.latents[following][:count].cpu() - wanted[following]).square().mean().sqrt()
        size = PUSH * float(off.clamp(min=1e-6)) / float(runs.gains[step:following].abs().sum())
        known = {k: output for k, output in plan.outputs.items() if k <= step}
        for combined in orthonormal(bases):
            direction = torch.zeros_like(table)
            direction[step:following, : len(history)] = combined[: len(history)]
            if inputs:
                direction[step:following, -1] = combined[-1]
            moved = Replay(plan.computed, table + size * direction, inputs, known, brief=True)
            moved.run(pipe, setup, samples)
            change = (moved.latents[-1][:count].cpu() - ended).flatten(1).double() / size
            directions.append(direction)
            changes.append((change * weights).flatten().float())
            calls += len(computed) - n
    rows, missing = torch.stack(changes), (missed * weights).flatten().float()
    return Equations(table, directions, (rows @ rows.T).double(), (rows @ missing).double())


def cost(computed: int, outputs: int, inputs: bool) -> int:
    """Computed steps that the equations of so many take; step 0 is computed by every run."""
    return sum((min(n + 1, outputs) + inputs) * (computed - n) for n in range(computed))


def orthonormal(bases: Sequence[Tensor]) -> Tensor:
    """[n, n] rows of factors that make tensors orthogonal and of mean square 1; the first is of the first one alone."""
    flat = torch.stack([one.flatten().double().cpu() for one in bases])
    inner = flat @ flat.T / flat.shape[1]
    ridge = 1e-10 * inner.diagonal().mean() * torch.eye(len(flat), dtype=torch.float64)
    return torch.linalg.inv(torch.linalg.cholesky(inner + ridge))
