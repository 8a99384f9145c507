"""Everything that one sampling run remembers.

A run is bound to the context (thread or task) that drives it, not to the model: two threads, or two pipelines over one
transformer, never see each other's features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from .fill import Entry, Hold
from .plan import COMPUTE, PARTIAL, REUSE, Plan, Site

_active: ContextVar[tuple[Run, ...]] = ContextVar("dittocache_runs", default=())


class Run:
    """One sampling run: the table it follows, the features it keeps, and the trace of what it did.

    A context manager: inside, forwards of the cached model belong to this run. It may be left and entered again, so
    that a server can interleave requests; it ends with its last step, or with `close`.

    Args:
        recipe: the recipe that is followed.
        sites: the columns of the table; those the recipe does not want are None in `columns`.
        owner: the cache that the run belongs to.
        begin: called at the first forward; calls `settle`, and the first step has begun. Without it, `settle` has to be
            called before, and steps are announced by `step`.
    """

    def __init__(self, owner: Any, begin: Callable[[Run], None] | None = None) -> None:
        self.owner = owner
        self.recipe = owner.recipe
        self.begin = begin
        self.first: Any = None  # the timestep that it begins with, where a scheduler was asked for that
        self.num_steps = 0
        self.timesteps: list[float] | None = None
        self.sites: list[Site] = owner.description.columns
        self.used: list[int] = owner.used
        self.codes: list[list[float | None]] = []
        self.step_index: int | None = None
        self.over = False  # the scheduler has made its step: the next forward is the next step's
        self.branch = -1
        self.branches = 0  # most forwards of a step
        self.numbered = False  # whether branches were given numbers, by `step(i, branch)`
        self.prompts: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}  # each with its last step
        self.named: dict[Any, int] = {}  # how often each branch was called in this step
        self.halves: dict[int, int] = {}  # by number of rows: how often batched guidance repeats the samples
        self.ended = False
        self.fixed = False  # whether a prediction was handed to the recipe's fix
        self.levels: tuple[torch.Tensor, torch.Tensor] | None = None  # of noise, for a fix that must know them
        self.entries: dict[tuple[Any, ...], Entry] = {}
        self.shares = np.zeros((0, len(self.sites)))
        self.calls = np.zeros((0, len(self.sites)), dtype=np.int64)
        self.generator = torch.Generator().manual_seed(getattr(self.recipe.which, "seed", 0))
        self.bytes_peak = 0
        self.cost_key: Any = None  # input shape under which the FLOPs were measured
        self.notes: list[str] = []

    def settle(self, num_steps: int, timesteps: Sequence[float] | None = None) -> None:
        """How long the run is.

        Args:
            num_steps: T, number of steps (network evaluations per branch).
            timesteps: those of the scheduler, for the trace; optional.

        Raises:
            ValueError: the recipe does not fit them.
        """
        self.num_steps, self.timesteps = num_steps, None if timesteps is None else [float(t) for t in timesteps]
        self.codes = self._codes()
        self.shares = np.zeros((num_steps, len(self.sites)))
        self.calls = np.zeros((num_steps, len(self.sites)), dtype=np.int64)

    def _codes(self) -> list[list[float | None]]:
        """The schedule with PARTIAL kept only where tokens can be computed on their own, as rows over all sites."""
        used = [self.sites[j] for j in self.used]
        when = self.recipe.when.timed(self.timesteps)
        table = np.asarray(when.table(self.num_steps, used), dtype=np.float64)
        which = self.recipe.which
        selectable = np.array([which is not None and which.selects(site) for site in used])
        table = np.where((table == PARTIAL) & ~selectable, REUSE, table)
        some = ((table > REUSE) & (table < COMPUTE) & ~selectable).any(0)
        if some.any():
            name = used[int(np.flatnonzero(some)[0])].name
            reason = "a recipe needs `which` for that" if which is None else "it is not token-wise, or text"
            raise ValueError(f"the schedule computes some tokens of {name!r}, but {reason}")
        codes: list[list[float | None]] = []
        for row in table.tolist():
            full: list[float | None] = [None] * len(self.sites)
            for j, share in zip(self.used, row, strict=True):
                full[j] = share
            codes.append(full)
        return codes

    # ---- clock ------------------------------------------------------------------------------------------------------
    def __enter__(self) -> Run:
        _active.set((*(run for run in _active.get() if run is not self), self))
        return self

    def __exit__(self, *exc: object) -> None:
        self.suspend()
        if exc[0] is None and self.step_index is not None and self.step_index >= self.num_steps - 1:
            self.close()

    def suspend(self) -> None:
        """Takes the run out of the context; `with run:` puts it back."""
        _active.set(tuple(run for run in _active.get() if run is not self))

    def step(self, index: int, branch: int = 0) -> None:
        """Step `index` begins; the next forward is that of guidance branch `branch`, the one after that the next.

        Raises:
            ValueError: the index is out of range or lies before the current step.
        """
        whole = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not whole or not 0 <= index < self.num_steps:
            raise ValueError(f"step must be a whole number from 0 to {self.num_steps - 1}; got {index!r}")
        if self.step_index is not None and index < self.step_index:
            raise ValueError(f"step {index} comes before step {self.step_index}; begin a new run instead")
        if not isinstance(branch, int) or isinstance(branch, bool) or branch < 0:
            raise ValueError(f"branch must be a whole number, 0 or more; got {branch!r}")
        self.step_index, self.branch, self.numbered, self.over = int(index), branch - 1, True, False
        self.named.clear()
        if self in _active.get():
            self.__enter__()  # the next forward is this run's, whichever was at work before

    def advance(self) -> None:
        """The next step begins."""
        self.step_index = 0 if self.step_index is None else self.step_index + 1
        self.branch, self.over = -1, False
        self.named.clear()

    def reached(self) -> bool:
        """A forward begins: whether it is known at which step."""
        if self.begin is not None:
            begin, self.begin = self.begin, None
            begin(self)
            self.advance()
        elif self.over:
            self.advance()
        return self.step_index is not None

    def next_branch(self, name: str | None = None, prompt: Any = None) -> Any:
        """The guidance branch of a forward that begins now: the n-th of a step, unless it can be told by more.

        Pipelines may leave branches out for some steps, so the order alone can lie.

        Args:
            name: what the pipeline calls the branch.
            prompt: what the forward is conditioned on; other prompts are other branches.
        """
        self.branch += 1
        self.branches = max(self.branches, self.branch + 1)
        if self.numbered:
            return self.branch
        text = None if prompt is None else self._text(prompt)
        branch = self.branch if name is None and text is None else name, text
        self.named[branch] = self.named.get(branch, 0) + 1
        return *branch, self.named[branch]

    def _text(self, prompt: torch.Tensor) -> tuple[int, int]:
        """What stands for a prompt: pipelines hand on the very same tensor, or one like it, in every step."""
        now = self.step_index or 0
        known = {text: tensor for text, (tensor, _) in self.prompts.items()}
        text = next((text for text, tensor in known.items() if tensor is prompt), None)
        text = text or next((text for text, tensor in known.items() if _equal(tensor, prompt)), None)
        if text is None:
            text = now, self.branch
            # prompts that change with every step would pile up
            for old in [text for text, (_, last) in self.prompts.items() if last < now - 1]:
                del self.prompts[old]
                self.entries = {key: entry for key, entry in self.entries.items() if key[1][1] != old}
        self.prompts[text] = prompt, now
        return text

    def row(self) -> list[float | None]:
        """Codes of the current step; past the announced end everything is computed."""
        k = self.step_index or 0
        if k >= self.num_steps:
            self.note(f"the run went on after its {self.num_steps} steps; later steps were computed in full")
            return [None if share is None else COMPUTE for share in self.codes[-1]]
        return self.codes[k]

    # ---- records ----------------------------------------------------------------------------------------------------
    def entry(self, site: int, branch: Any, call: int = 0, network: int = 0) -> Entry:
        """What is remembered of a site, apart for every network, guidance branch and call within one forward."""
        key = (site, branch, call, network)
        if key not in self.entries:
            self.entries[key] = Entry()
        return self.entries[key]

    def record(self, sites: Any, share: float) -> None:
        """Notes that this share of the sites' tokens was computed in the current step."""
        k = self.step_index or 0
        if k < self.num_steps:
            self.shares[k, sites] += share
            self.calls[k, sites] += 1

    def weigh(self) -> None:
        """Updates the peak of the memory that is kept."""
        tensors = (t for entry in self.entries.values() for t in entry.tensors)
        # one tensor may be kept for several sites, such as the input of three projections
        sizes = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors}
        self.bytes_peak = max(self.bytes_peak, sum(sizes.values()))

    def note(self, text: str) -> None:
        """Warns, once a run for each text."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(f"dittocache: {text}", stacklevel=3)

    def trace(self) -> Plan:
        """What the run really did so far."""
        done = np.flatnonzero(self.calls.any(1))
        k = list(done) if len(done) else []
        calls = self.calls[k][:, self.used]
        table = np.where(calls > 0, self.shares[k][:, self.used] / np.maximum(calls, 1), REUSE)
        flops, rest = self.owner.flops(self.cost_key, self.used, max(self.branches, 1))
        shares = [self.recipe.fill.cost(self.sites[j]) for j in self.used]
        filling = tuple(f * share for f, share in zip(flops, shares)) if flops is not None and any(shares) else None
        meta: dict[str, Any] = {"num_steps": self.num_steps, "branches": self.branches}
        if self.recipe.keeps != "output":
            meta |= {"where": self.recipe.where, "keeps": self.recipe.keeps, "head": self.recipe.when.head}
        if self.timesteps is not None:
            meta["timesteps"] = [self.timesteps[i] for i in k if i < len(self.timesteps)]
        return Plan(
            table=np.clip(table, 0, 1),
            sites=tuple(self.sites[j].name for j in self.used),
            steps=tuple(int(i) for i in k),
            kinds=tuple(self.sites[j].kind for j in self.used),
            flops=flops,
            flops_rest=rest,
            flops_fill=filling,
            # a replay with another fill is refused, not silently something else
            fills=None if isinstance(self.recipe.fill, Hold) else (self.recipe.fill.name,) * len(k),
            meta=meta,
        )

    def close(self) -> None:
        """Ends the run: the features are let go, the trace stays, and a run that skipped nothing says so."""
        if self.ended:
            return
        self.ended = True
        self.suspend()
        self.entries.clear()
        self.prompts.clear()
        complete = self.calls[-1:].any() and self.recipe.method != "none"
        if complete and self.recipe.fix is not None and not self.fixed:
            self.note(f"{self.recipe.describe()} corrects predictions, but this run handed it none: call cache.fix")
        if complete and (self.shares == self.calls).all():
            self.note(f"{self.recipe.describe()} is on, but this run of {self.num_steps} steps skipped nothing")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def active_runs() -> tuple[Run, ...]:
    """The runs of the present context, the latest last."""
    return _active.get()
