"""What it costs to fill whole steps: measured on uncached runs, and weighted by what the sampler makes of it.

Caching does not add up module by module, so all modules of a step are filled together. For every step k, computed
steps a and p before it and every fill, the error of the prediction is measured on the uncached trajectory; an error of
the prediction at step k is carried into the picture by a factor that is measured as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import clock
from ..cache import enable
from ..calibrate.setup import Setup, check_uncached, denoiser, draw
from ..fill import At, Chosen, Entry, Features, Fill, Taylor
from ..fill.base import push
from ..fill.chosen import checked
from ..hooks import Call, captured
from ..parts import check_int
from ..recipe import Recipe
from ..when import ReuseSteps

LAGS, GAPS = 12, (1, 2, 3, 4, 6, 8, 12)
FORECASTS: tuple[Fill, ...] = (Taylor(0), Taylor(1), Taylor(2))  # held, and TaylorSeer's series
Progress = Callable[[int, int, str], None]


class Filling(NamedTuple):
    """A step of a replay: k filled from the computed steps a and p (None: a alone); a = k: computed.

    Attributes:
        fill: its number among those that are measured.
    """

    k: int
    a: int
    p: int | None = None
    fill: int = 0

    def history(self, depth: int) -> list[int]:
        """The computed steps that it goes on from, newest first.

        Those before p are taken to be as far apart as p from a, but not before the first.
        """
        if self.p is None:
            return [self.a]
        older = range(depth - 1)
        return [self.a, *(max(self.p - n * (self.a - self.p), depth - 2 - n) for n in older)]


@dataclass(frozen=True)
class Replayed(Fill):
    """Fills step after step of a replay: every computed output is kept as long as it may be asked for.

    Args:
        among: the fills that are measured.
        sequence: a `Filling` for every step of the replay.
        kept: how many outputs.
    """

    among: Chosen
    sequence: tuple[tuple[int, int, int | None, int], ...]
    kept: int

    name = "measured fill"

    def names(self) -> set[str]:
        return self.among.names()

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        self.among.keep(Entry(), value, at)  # refused now if it does not go with a fill's data
        push(entry, value, at.step, self.kept)

    def fill(self, entry: Entry, at: At) -> Features:
        filling = Filling(*self.sequence[at.step])
        fill = self.among.fills[filling.fill]
        values = {self.sequence[step][0]: value for step, value in zip(entry.steps, entry.values, strict=True)}
        history = filling.history(fill.depth)
        return fill.fill(Entry([values[step] for step in history], list(history)), at._replace(step=filling.k))


@dataclass
class Step:
    """One step of an uncached run: the network's calls, and what the scheduler was handed."""

    calls: list[Call]
    prediction: Tensor


@dataclass
class _Observer(clock.Silent):
    """Notes every step."""

    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    seen: int = 0

    def on_begin(self, scheduler: Any) -> None:
        self.steps, self.seen = [], len(self.calls)

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        self.steps.append(Step(self.calls[self.seen :], prediction.detach().clone()))
        self.seen = len(self.calls)
        return prediction


class _Pusher(clock.Silent):
    """Row n of the batch goes on at step `at[n]` with the prediction of the step before."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at, self.step = at, 0
        self.before: Any = None
        self.pushed = torch.zeros(len(at), dtype=torch.float64)  # squared change of every row's prediction

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        rows = [n for n, k in enumerate(self.at) if k == self.step]
        changed = prediction.clone()
        if rows:
            changed[rows] = self.before[rows]
            self.pushed[rows] = (changed - prediction)[rows].flatten(1).double().square().sum(1).cpu()
        self.before, self.step = prediction.detach(), self.step + 1
        return changed


@dataclass(frozen=True)
class StepErrors:
    """Squared errors that filling whole steps makes in the final picture: sums over its values, means over samples.

    Attributes:
        costs: [T, T, T + 1] as `cheapest` takes them, of the best fill; inf where nothing was measured.
        chosen: [T, T, T + 1] its number.
        weights: [T] squared error of the picture by squared error of a step's prediction.
        fills: that were measured.
    """

    costs: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    fills: tuple[Fill, ...] = FORECASTS


def fillings_of(
    steps: int, lags: int = LAGS, gaps: Sequence[int] = GAPS, fills: Sequence[Fill] = FORECASTS
) -> list[Filling]:
    """Everything that is measured of a run, in the order of the steps."""
    found = []
    for k in range(1, steps):
        for a in range(max(0, k - lags), k):
            for n, fill in enumerate(fills):
                before = [None] if fill.depth == 1 else _offered(a, fill.depth, gaps)
                found += [Filling(k, a, p, n) for p in before]
    return found


def _offered(a: int, depth: int, gaps: Sequence[int]) -> list[int]:
    """The steps before a that a fill of two outputs or more is measured with: enough others lie before them."""
    return [a - gap for gap in gaps if a - gap >= depth - 2]


def measure(
    pipe: Any,
    setup: Setup,
    samples: Sequence[int],
    *,
    batch: int = 4,
    lags: int = LAGS,
    gaps: Sequence[int] = GAPS,
    fills: Sequence[Fill] = FORECASTS,
    progress: Progress | None = None,
) -> StepErrors:
    """Measures the errors of filling whole steps.

    EOC beside forecasts: `calibrate(pipe, "eoc", others, setup, reuse_steps=range(1, 50)).fill` has a trend for every
    step, of other samples than those here.

    Args:
        pipe: a pipeline without a cache.
        setup: how the samples are drawn.
        samples: their numbers.
        batch: how many at once.
        lags: the longest stretch of filled steps.
        gaps: between the last two computed steps; others count as the nearest of these.
        fills: of computed outputs alone: `Hold`, `Taylor`, `Trend`, ...
        progress: called as progress(samples done, samples in all, what).

    Raises:
        ValueError: a cache is on, no samples, fills that need more than computed outputs or have data for other sites,
            or the prediction is no sum of what the network returns.
    """
    check_uncached(pipe)
    check_int("lags", lags, 1)
    if not samples:
        raise ValueError("samples are one or more numbers; got none")
    fills = checked(fills)
    fillings = fillings_of(setup.num_steps, lags, gaps, fills)
    errors = np.zeros(len(fillings))
    for n in range(0, len(samples), batch):
        part = samples[n : n + batch]
        errors += np.array(_replay(pipe, setup, part, fillings, fills))
        if progress:
            progress(min(n + batch, len(samples)), len(samples), "filling steps")
    carried = weights(pipe, setup, samples, batch=4 * batch)
    return _table(setup.num_steps, fillings, errors / len(samples), carried, gaps, fills)


def _replay(
    pipe: Any,
    setup: Setup,
    samples: Sequence[int],
    fillings: Sequence[Filling],
    fills: tuple[Fill, ...] = FORECASTS,
) -> list[float]:
    """Squared errors of the prediction, summed over values and samples, for every filling."""
    network = denoiser(pipe)
    with captured(network) as calls, clock.observed(pipe.scheduler, _Observer(calls)) as observer:
        draw(pipe, setup, samples)
        steps = observer.steps
    mixed = [mixing([call.output for call in step.calls], step.prediction) for step in steps]
    sequence = sorted([*fillings, *(Filling(k, k) for k in range(len(steps)))], key=lambda one: one.k)
    filled = tuple(n for n, one in enumerate(sequence) if one.a < one.k)
    kept = max((one.k - one.history(fills[one.fill].depth)[-1] for one in fillings), default=1)
    recipe = Recipe(ReuseSteps(filled), fill=Replayed(Chosen(fills), tuple(sequence), kept), method="none")
    errors = []
    with torch.no_grad(), enable(network, recipe) as cache, cache.run(len(sequence)):
        for n, (k, a, _, _) in enumerate(sequence):
            cache.step(n)
            outputs = [_first(network(*call.args, **call.kwargs)) for call in steps[k].calls]
            if a < k:
                wanted = steps[k].prediction
                errors.append(float((guided(outputs, mixed[k], wanted) - wanted).double().square().sum()))
    return errors


def mixing(outputs: Sequence[Tensor], prediction: Tensor) -> Tensor:
    """How a pipeline mixes what its network returned into a prediction: one factor for every branch of guidance.

    Args:
        outputs: of every call of a step, [rows, channels, ...]; rows of batched branches one after another.
        prediction: [samples, channels, ...], of the first of these channels or all.

    Raises:
        ValueError: it is no such sum.
    """
    branches = _branches(outputs, prediction).flatten(1).double()
    wanted = prediction.flatten().double()
    factors = torch.linalg.lstsq(branches.T, wanted.unsqueeze(1)).solution.squeeze(1)
    rest = (branches.T @ factors - wanted).norm() / wanted.norm()
    # guidance in half precision rounds
    rounding = max(torch.finfo(one.dtype).eps for one in (*outputs, prediction))
    if not rest < max(1e-3, 8 * rounding):
        raise ValueError(
            f"the prediction is no sum of the network's outputs ({100 * float(rest):.1f} % are left): guidance that "
            "rescales cannot be tuned"
        )
    return factors


def guided(outputs: Sequence[Tensor], factors: Tensor, like: Tensor) -> Tensor:
    """The prediction, from outputs and `mixing`."""
    branches = _branches(outputs, like)
    return torch.tensordot(factors.to(branches), branches, dims=1)


def _branches(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """[branches, samples, ...]: the channels that the prediction has."""
    rows = torch.cat(list(outputs))
    if rows.ndim != like.ndim or len(rows) % len(like):
        raise ValueError(f"the network returns {list(rows.shape)}, but the scheduler is handed {list(like.shape)}")
    return rows[:, : like.shape[1]].unflatten(0, (-1, len(like)))


def weights(
    pipe: Any, setup: Setup, samples: Sequence[int], batch: int = 16, rows: int = 2, plain: Tensor | None = None
) -> np.ndarray:
    """[T] squared error of the picture by squared error of the prediction at a step, all later steps computed.

    Networks mend some errors and magnify others, so the error is one that filling makes: the prediction is that of the
    step before. Every row of a batch is pushed at another step. Step 0 is never filled.

    Args:
        rows: samples for each step; their ratios scatter, and means are taken of logarithms.
        plain: uncached pictures of the samples [n, ...], if there are some already.
    """
    steps = setup.num_steps
    jobs = [(k, (n + rows * k) % len(samples)) for n in range(rows) for k in range(1, steps)]
    logs = np.zeros(steps)
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        numbers = [samples[j] for _, j in part]
        pusher = _Pusher([k for k, _ in part])
        uncached = _pictures(pipe, setup, numbers) if plain is None else plain[[j for _, j in part]].cpu().double()
        with clock.observed(pipe.scheduler, pusher):
            moved = _pictures(pipe, setup, numbers)
        ratios = (moved - uncached).flatten(1).square().sum(1) / pusher.pushed
        for (k, _), ratio in zip(part, ratios.clamp(min=1e-30).log().tolist(), strict=True):
            logs[k] += ratio / rows
    return np.concatenate([[0.0], np.exp(logs[1:])])


def _pictures(pipe: Any, setup: Setup, samples: Sequence[int]) -> Tensor:
    return torch.as_tensor(draw(pipe, setup, samples)).cpu().double()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _table(
    steps: int,
    fillings: Sequence[Filling],
    errors: np.ndarray,
    carried: np.ndarray,
    gaps: Sequence[int],
    fills: tuple[Fill, ...] = FORECASTS,
) -> StepErrors:
    """The errors as `cheapest` takes them: the best fill; gaps that were not measured count as the nearest."""
    measured = np.full((steps, steps, steps + 1, len(fills)), np.inf)
    for (k, a, p, n), error in zip(fillings, errors, strict=True):
        before = slice(None) if p is None else p
        measured[k, a, before, n] = carried[k] * error
    for a, (n, fill) in itertools.product(range(steps), enumerate(fills)):
        there = [] if fill.depth == 1 else _offered(a, fill.depth, gaps)
        for p in range(fill.depth - 2, a) if there else ():
            far = [abs(np.log((a - one) / (a - p))) for one in there]
            measured[:, a, p, n] = measured[:, a, there[int(np.argmin(far))], n]
    return StepErrors(measured.min(3), measured.argmin(3), carried, fills)
