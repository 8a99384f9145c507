"""What a forward does at every block and site: compute and keep, fill, or gather, compute and scatter.

Here are the decisions and the tensors; the hooks that lead here, and the modules, are in `hooks.py`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import streams
from .describe import Block
from .fill import At, Entry
from .flops import FlopCounter
from .plan import COMPUTE, OPEN, PARTIAL, REUSE
from .run import Run
from .samples import Samples, guidance_halves
from .selection import Selection
from .streams import Key, pack
from .when import Look

if TYPE_CHECKING:
    from .hooks import Attachment

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# names under which blocks are given the embedding of the timestep, or modulations made of it
_EMBEDDINGS = (
    "temb", "emb", "time_emb", "time_embed", "timestep_embed", "timestep_proj", "timestep", "adaln_input",
    "adaln_noisy", "conditioning", "conditioning_emb", "temb_mod", "temb_mod_img", "modulation", "global_modulation",
    "t",
)  # fmt: skip


class Settled(Exception):
    """Leaves a block in the middle: it was decided there that it is not computed."""


@dataclass
class Passing:
    """A span of blocks that the forward is in.

    Attributes:
        arguments: inputs of its first block; the change is reckoned from their streams.
        versions: change counters of these tensors.
        signature: of these inputs.
        rows: True computed, False passed by, or a bool tensor [samples]; None: not decided yet.
        passed: a block has been passed by.
        first: the block that is given these inputs.
    """

    first: Block
    arguments: dict[Key, Any]
    versions: tuple[int, ...]
    signature: tuple[Any, ...]
    rows: bool | Tensor | None = None
    passed: bool = False


class Forward:
    """One forward of one transformer within a run: the row it follows, and what it does at blocks and sites."""

    def __init__(self, attachment: Attachment, run: Run, args: Args, kwargs: Kwargs, branch: str | None = None) -> None:
        self.attachment = attachment
        self.run = run
        self.recipe = run.recipe
        self.step = run.step_index or 0
        prompt = kwargs.get("encoder_hidden_states")
        self.branch = run.next_branch(branch, prompt if isinstance(prompt, Tensor) else None)
        self.network_number = run.owner.number(attachment)
        self.row = list(run.row())
        self.signature: tuple[Any, ...] = ()
        self.passing: dict[int, Passing] = {}
        self.looked = False  # past the head of all main stacks
        self.decision: bool | Tensor | None = None  # of all main stacks; None if a plan knows
        self.awaiting: int | None = None  # the stack that the next attention's input decides about
        self.start: Tensor | None = None  # the main stream before the first of all main stacks
        self.origin: Block | None = None  # the block that is given it
        self.began: tuple[int, ...] = ()  # its change counter then
        self.spoilt = False  # the head has changed it in place, so nothing of this forward is worth keeping
        self.probe: Tensor | None = None  # what the head has changed in it
        self.previous: tuple[Block, tuple[Tensor, ...]] | None = None
        self.turns: dict[int, int] = {}  # calls of a site in this forward; some blocks call a feed-forward twice
        self.kept = False
        self.plain: Callable[..., Any]  # the module that is being called, uncompiled; the hook says it
        self.scoring = 0.0  # FLOPs of scoring tokens, which belong to no part of the model
        self.counter: FlopCounter | None = None
        sample = noisy_sample(args, kwargs)
        self.grid = attachment.grid(sample)
        self.tokens = attachment.tokens(sample)
        self.lengths: tuple[int, int] = (0, 0)  # tokens of image and text that the present block is given apart
        self.samples = self._samples(sample)
        self.selection = None if run.recipe.which is None else Selection(self)
        key = None if sample is None else (tuple(sample.shape), sample.dtype)
        run.cost_key = key
        if key is not None and key not in attachment.costs and attachment.measuring.acquire(blocking=False):
            self.costs = [0.0] * len(attachment.columns)
            self.counter = FlopCounter()
            self.counter.__enter__()

    def _samples(self, sample: Tensor | None) -> Samples:
        """How the batch divides into samples; looked at once a run for every batch size."""
        rows = 1 if sample is None else len(sample)
        if rows not in self.run.halves:
            self.run.halves[rows] = guidance_halves(sample)
        halves = self.run.halves[rows]
        together = self.recipe.when.batch == "batch" or self.attachment.description.together
        return Samples(rows // halves, halves, together)

    def close(self, failed: bool) -> None:
        """Ends the forward: stores what was measured, and weighs what is kept."""
        if self.counter is not None:
            total = self.flops()
            self.counter.__exit__(None, None, None)
            if not failed and all(code is None or code == COMPUTE for code in self.row):
                self.costs[self.attachment.output] = total
                self.attachment.costs[self.run.cost_key] = self.costs
            self.attachment.measuring.release()
        if self.kept:
            self.run.weigh()

    def flops(self) -> float:
        return 0.0 if self.counter is None else self.counter.total - self.scoring

    # ---- the whole network ------------------------------------------------------------------------------------------
    def network(self, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """A forward of the transformer itself, for recipes that reuse what it returns."""
        j = self.attachment.output
        self.signature = signature = _signature(pack((args, kwargs)), {})
        inputs = noisy_sample(args, kwargs) if self.recipe.fill.keeps_inputs else None
        if self.row[j] not in (None, COMPUTE) and self._ready(j):
            self.run.record(j, REUSE)
            return streams.unpack(self.filled(j, inputs), self.entry(j).form)
        output, planned = original(*args, **kwargs), self.row[j]
        if planned is not None:
            self.row[j] = COMPUTE
            self._keep(j, output, inputs, signature)
            self.run.record(j, COMPUTE)
            if planned != REUSE:  # one that could not be filled has no factors of its own
                output = self._mixed(j, output, inputs)
        return output

    # ---- blocks -----------------------------------------------------------------------------------------------------
    def block(self, block: Block, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """A block: passed by with the span that it belongs to, or run."""
        before = self.flops()
        self.signature = _signature(args, kwargs)
        if self.selection is not None and block.family.text is not None:
            self.lengths = _lengths(block.module, args, kwargs)
        spans = tuple(j for j in block.spans if self.row[j] is not None)
        if not spans:
            output = self._run(block, original, args, kwargs)
        else:
            arguments = streams.given(args, kwargs)
            if self.previous is not None:
                self.attachment.follow(*self.previous, block, arguments)
            output = self._within(spans, block, original, args, kwargs)
            self.previous = (block, pack(output))
            self.attachment.passed(block, output, arguments)
        if self.counter and block.spans:
            self.costs[block.spans[-1]] += self.flops() - before
        return output

    def _run(self, block: Block, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """A block on its own: gated and added when all its sites are reused, else the model's own code."""
        row = self.row
        for j in block.sites + block.inner + (block.linears if self.attachment.split else ()):
            if row[j] == OPEN and self.attachment.entry(j).mutes:
                # the modules that feed a fused site come before it, so it is decided here
                decided = self._decide(j, self._main(streams.given(args, kwargs)))
                row[j] = COMPUTE if isinstance(decided, Tensor) else decided
            # what cannot be filled is computed, whatever the row says
            if row[j] not in (None, COMPUTE, OPEN) and not self._ready(j):
                row[j] = COMPUTE
            elif row[j] == PARTIAL:
                row[j] = self._tokens.share(j)
        # the shortcut has no inputs of modules to hand to a fill; who wraps a forward may fetch weights for it
        wrapped = "forward" in block.module.__dict__
        shortcut = None if self.recipe.fill.keeps_inputs or wrapped else block.family.reuse_block
        if shortcut is not None and all(row[j] == REUSE for j in block.sites):
            features = {self.attachment.entry(j).path: self.filled(j, together=True) for j in block.sites}
            output = shortcut(block.module, features, *args, **kwargs)
            if output is not NotImplemented:
                self.run.record(list(block.sites), REUSE)
                return output
        return original(*args, **kwargs)

    # ---- spans of blocks --------------------------------------------------------------------------------------------
    def _within(
        self, spans: tuple[int, ...], block: Block, original: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """A block within spans of the row, the widest first."""
        if not spans:
            return self._run(block, original, args, kwargs)
        j, span = spans[0], self.attachment.spans[spans[0]]

        def inner(*args: Any, **kwargs: Any) -> Any:
            return self._within(spans[1:], block, original, args, kwargs)

        arguments = streams.given(args, kwargs)
        if block is span.blocks[0]:
            self.passing[j] = self._enter(j, block, arguments)
        state, output = self.passing[j], None
        if state.rows is None:
            output = self._undecided(j, state, block, inner, args, kwargs)
        if output is None:
            if state.rows is None or state.rows is True:
                output = inner(*args, **kwargs)
            elif isinstance(state.rows, Tensor):
                output = self._some(state.rows, block, inner, arguments)
            elif any(self.row[i] not in (None, REUSE) for i in block.sites):
                inner(*args, **kwargs)  # its sites ask to be computed, to refresh what they keep
            else:
                self.run.record([i for i in block.sites if self.row[i] is not None], REUSE)
        if block is span.blocks[-1]:
            if output is not None:
                self.attachment.passed(block, output, arguments)
            return self._leave(j, state, block, output)
        if output is not None:
            return output
        if not state.passed:  # the model may change what it is handed, and the span's start is wanted at its end
            arguments = {key: v.clone() if isinstance(v, Tensor) else v for key, v in arguments.items()}
            state.passed = True
        passage, form = self.attachment.passages[block.name]
        return streams.unpack(passage.through(arguments), form)

    def _enter(self, j: int, block: Block, arguments: dict[Key, Any]) -> Passing:
        """A span begins. If it should be passed by but cannot, all of it is computed."""
        arguments = self._own(j, arguments)
        state = Passing(block, arguments, _counters(arguments), self.signature)
        code, stack = self.row[j], self.attachment.columns[j].kind == "stack"
        if code == OPEN and not stack:
            decided = self._decide(j, self._main(arguments))
            self._settle(j, state, decided if isinstance(decided, Tensor) else decided != REUSE)
        elif stack and (code == OPEN or self.recipe.when.head):
            if self.start is None:
                self.start, self.origin = self._main(arguments), block
                self.began = _counters({0: self.start})
            if self.looked:
                self._settle(j, state, code == COMPUTE if self.decision is None else self.decision)
        else:
            self._settle(j, state, code == COMPUTE)
        return state

    def _own(self, j: int, arguments: dict[Key, Any]) -> dict[Key, Any]:
        """Arguments that a change is reckoned from: copies if the model is known to change its streams in place, and of
        inference tensors, which do not tell."""
        if self.recipe.keeps != "change":
            return arguments
        if j not in self.attachment.aliased and not self._main(arguments).is_inference():
            return arguments
        return {key: v.clone() if isinstance(v, Tensor) else v for key, v in arguments.items()}

    def _settle(self, j: int, state: Passing, rows: bool | Tensor) -> None:
        """Whether a span is computed is known now."""
        span = self.attachment.spans[j]
        if rows is not True and not self._ready(j, state.signature):
            rows = True
            for i in {i for block in span.blocks for i in (*block.sites, *block.spans)}:
                self.row[i] = None if self.row[i] is None else COMPUTE
        elif rows is not True and not all(self.attachment.passable(block) for block in span.blocks):
            self.run.note(f"{self.attachment.columns[j].name} cannot be passed by: its streams are not understood")
            rows = True
        self.row[j] = COMPUTE if rows is True else REUSE
        state.rows = rows

    def _undecided(
        self, j: int, state: Passing, block: Block, inner: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """A block of a stack that is decided here, or further on: all stacks are decided as one."""
        when, arguments = self.recipe.when, streams.given(args, kwargs)
        if self.attachment.position[block.name] < when.head:
            return inner(*args, **kwargs)
        self.looked, output, rows = True, None, self.row[j] == COMPUTE
        if self.row[j] != OPEN:  # a plan that is replayed knows
            self._seen(j, block, args, kwargs)
        elif when.signal == "modulated":
            self.awaiting = j
            try:
                output = inner(*args, **kwargs)
            except Settled:
                output = None
            self.awaiting = None
            if self.decision is None:
                self.run.note(f"{block.name} has no attention whose input could be looked at: all is computed")
                self.decision = True
        else:
            self._look(j, self._seen(j, block, args, kwargs))
        if self.recipe.where == "tail":  # the change is that of the blocks after the head
            arguments = self._own(j, arguments)
            state.first, state.arguments, state.versions = block, arguments, _counters(arguments)
        self._settle(j, state, rows if self.decision is None else self.decision)
        return output

    def _seen(self, j: int, block: Block, args: Args, kwargs: Kwargs) -> Tensor:
        """What all stacks are decided by, as this block is given it; and what the head has changed.

        Raises:
            RuntimeError: the block is given no embedding, or the head's output cannot be compared with its input.
        """
        when, stream = self.recipe.when, self._main(streams.given(args, kwargs))
        if when.signal == "embedding":
            embedding = _embedding(block.module, args, kwargs)
            if embedding is None:
                raise RuntimeError(
                    f"{self.recipe.describe()} goes by the time embedding, but {block.name} "
                    f"({type(block.module).__name__}) is given none: use indicator='modulated'"
                )
            return embedding
        if when.head and self.start is not None and self.origin is not None:
            start = self._carried(j, self.origin, block, self.start, stream.shape)
            if stream.shape != start.shape:
                raise RuntimeError(
                    f"the first {when.head} blocks make {list(stream.shape)} of {list(start.shape)}: their change "
                    f"cannot be told; {self.recipe.describe()} needs fewer"
                )
            if self.began != _counters({0: self.start}):
                self.attachment.aliased.update(i for i, column in enumerate(self.row) if column is not None)
                self.spoilt = True
            self.start = start
            self.probe = stream - start if self.recipe.fill.keeps_inputs else None
        return stream

    def _look(self, j: int, signal: Tensor | None) -> None:
        """Decides about all main stacks."""
        start = self.start if self.start is not None else signal
        decided = self._decide(j, start, signal)
        self.decision = decided if isinstance(decided, Tensor) else decided != REUSE

    def _some(self, rows: Tensor, block: Block, inner: Callable[..., Any], arguments: dict[Key, Any]) -> Any:
        """A block for some samples; the streams of the others pass. rows is a bool tensor [samples]."""
        computed, output = self._picked(rows, inner, arguments)
        passage, _ = self.attachment.passages[block.name]
        whole = tuple(
            streams.put(self.samples.spread(rows, len(rest)), some, rest)
            for some, rest in zip(computed, passage.through(arguments), strict=True)
        )
        return streams.unpack(whole, streams.form_of(output))

    def _picked(
        self, rows: Tensor, original: Callable[..., Any], arguments: dict[Key, Any]
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Calls something for some samples: the tensors of its output, and that output."""
        full = {self.samples.size * self.samples.halves, len(self._main(arguments))}

        def mask(length: int) -> Tensor | None:
            return self.samples.spread(rows, length) if length in full else None

        picked = streams.pick(arguments, mask)
        args = tuple(value for key, value in picked.items() if isinstance(key, int))
        output = original(*args, **{key: value for key, value in picked.items() if isinstance(key, str)})
        return pack(output), output

    def _leave(self, j: int, state: Passing, block: Block, output: Any) -> Any:
        """A span ends: what it did is kept, or made up."""
        if state.rows is None:  # the head of all stacks reaches past this one
            self.row[j] = COMPUTE
            self.run.record(j, COMPUTE)
            return output
        start: tuple[Tensor, ...] | None = None
        if self.recipe.keeps == "change":
            start = self._started(j, state, block, self.entry(j).values[0] if output is None else pack(output))
        if state.rows is True:
            self.run.record(j, COMPUTE)
            if state.versions != _counters(state.arguments):
                self.attachment.aliased.add(j)  # the model changes its streams in place: copies from now on
            elif not self.spoilt:
                self._keep(j, output, self.probe, state.signature, start)
            return output
        entry = self.entry(j)
        filled = self.filled(j, self.probe)
        if start is not None:
            filled = tuple((before + change).to(before.dtype) for before, change in zip(start, filled, strict=True))
        if state.rows is False:
            self.run.record(j, REUSE)
            return streams.unpack(filled, entry.form)
        rows = state.rows
        whole = streams.unpack(
            tuple(
                streams.choose(self.samples.spread(rows, len(made)), done, made)
                for done, made in zip(pack(output), filled, strict=True)
            ),
            entry.form,
        )
        with self._only(entry, rows):
            self._keep(j, whole, self.probe, state.signature, start)
        self.run.record(j, float(rows.float().mean()))
        return whole

    def _started(self, j: int, state: Passing, block: Block, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the outputs of a span's last block were where the span began, in the layout of the outputs.

        A stream that was not there, or of another shape, counts from zero: its output is kept rather than its change.
        """
        passage, _ = self.attachment.passages[block.name]
        if not passage.whole:
            self.run.note(f"{self.attachment.columns[j].name} cannot be passed by: its streams are not understood")
        if not passage.keys:
            return tuple(output.new_zeros(()).expand_as(output) for output in outputs)
        begun: list[Tensor] = []
        for n, (key, output) in enumerate(zip(passage.keys, outputs, strict=False)):  # a fill may keep more
            before = state.arguments.get(key) if key is not None else None
            if n == self._place(passage) and (before is None or self.attachment.spans[j].carry is not None):
                before = self._carried(j, state.first, block, self._main(state.arguments), output.shape)
            fits = isinstance(before, Tensor) and before.shape == output.shape
            begun.append(before if fits else output.new_zeros(()).expand_as(output))  # type: ignore[arg-type]
        return tuple(begun)

    def _main(self, arguments: Mapping[Key, Any]) -> Tensor:
        """The tokens of the sample, among what a block or one of its modules is given."""
        return streams.main_stream(arguments, self.attachment.description.stream)

    def _place(self, passage: streams.Passage | streams.Blank) -> int:
        """Which output of a block continues the tokens of the sample."""
        names = ("hidden_states", self.attachment.description.stream)
        return next((n for n, key in enumerate(passage.keys) if key in names), 0)

    def _carried(self, j: int, first: Block, last: Block, stream: Tensor, shape: torch.Size) -> Tensor:
        """The main stream as it enters the one block, in the layout of the other; the same unless they alternate."""
        carry = self.attachment.spans[j].carry
        if carry is None or first.name.rpartition(".")[0] == last.name.rpartition(".")[0]:
            return stream
        return carry(stream, shape)

    # ---- sites ------------------------------------------------------------------------------------------------------
    def site(self, j: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module whose output can be kept."""
        if self.awaiting is not None and "attention" in self.attachment.columns[j].kind:
            self._signal(args, kwargs)
        code = self.row[j]
        if code is None:
            return self._measured(j, original, args, kwargs)
        self.turns[j] = self.turns.get(j, -1) + 1
        entry = self.entry(j)
        if code == OPEN:
            decided = self._decide(j, self._main(streams.given(args, kwargs)))
            if isinstance(decided, Tensor):
                return self._rows(j, decided, original, args, kwargs)
            code = self.row[j] = self._tokens.share(j) if decided == PARTIAL else decided
        if self.turns[j] and code != COMPUTE and not self._ready(j):
            code = COMPUTE
        elif self.turns[j] and code not in (COMPUTE, REUSE) and not self._tokens.thins(j):
            code = REUSE
        inputs = _hidden(args, kwargs) if self.recipe.fill.keeps_inputs else None
        if code == COMPUTE:
            if (
                self.selection is not None
                and j in self.selection.scorers.values()
                and not self.attachment.entry(j).mutes
            ):
                plain, observed = original, self.selection.observed
                original = lambda *a, **k: observed(j, plain, a, k)  # noqa: E731
            output = self._measured(j, original, args, kwargs)
            self._keep(j, output, inputs)
            if self.selection is not None and not self.turns[j]:
                self.selection.image(j, entry)  # if that is not known, it is said before anything is skipped
            self.run.record(j, COMPUTE)
            entry.ages = None
            return self._mixed(j, output, inputs)
        if code == REUSE:
            self.run.record(j, REUSE)
            together = all(self.row[i] in (REUSE, None) for i in self.attachment.mates[j])
            return streams.unpack(self.filled(j, inputs, together), entry.form)
        return self._tokens.partial(j, code, original, args, kwargs)

    def _mixed(self, j: int, output: Any, inputs: Any = None) -> Any:
        """What a computed site hands on."""
        if not self.recipe.fill.mixes:
            return output
        entry = self.entry(j)
        return streams.unpack(self.recipe.fill.mix(entry, pack(output), self._at(j, inputs)), entry.form)

    def mute(
        self, fed: tuple[int, nn.Module, int | None], original: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """A module that only feeds another site: hands zeros on while that site is reused.

        An attention there is a site of its own as well, for recipes about attention alone.
        """
        j, module, inner = fed
        if inner is not None and self.row[inner] is not None:
            return self._measured(j, lambda *a, **k: self.site(inner, original, a, k), args, kwargs)
        if self.awaiting is not None:
            self._signal(args, kwargs)
        key, silences = (id(module), _signature(args, kwargs)), self.attachment.silences
        if self.row[j] == REUSE and key in silences:
            made, form = silences[key]
            return streams.unpack(tuple(zero.expand(shape) for zero, shape in made), form)
        feed = original
        if self.selection is not None:
            feed = lambda *a, **k: self._tokens.feed(j, module, original, a, k)  # noqa: E731
        own = feed if inner is None else lambda *a, **k: self._measured(inner, feed, a, k)
        output = self._measured(j, own, args, kwargs)
        silences[key] = [(t.detach().new_zeros(()), t.shape) for t in pack(output)], streams.form_of(output)
        return output

    @property
    def _tokens(self) -> Selection:
        if self.selection is None:
            raise RuntimeError("a partial step needs a recipe with `which`")
        return self.selection

    def _signal(self, args: Args, kwargs: Kwargs) -> None:
        """The first attention of the first stack is reached: what it is given decides."""
        j, self.awaiting = self.awaiting, None
        if j is not None:
            self._look(j, self._main(streams.given(args, kwargs)))
        if self.decision is not True:
            raise Settled

    def _decide(self, j: int, state: Tensor | None, signal: Tensor | None = None) -> float | Tensor:
        """Asks the recipe's `when`; a tensor [samples] comes back only if they differ, and may be told apart."""
        site, span = self.attachment.columns[j], self.passing.get(j)
        ready = self._ready(j, None if span is None else span.signature)
        if state is None:
            return COMPUTE
        gather = self.samples.gather
        seen = None if signal is None else gather(signal if signal.is_floating_point() else signal.float())
        look = Look(self.step, self.run.num_steps, site, gather(state), seen, forced=not ready)
        code = self.recipe.when.decide(look, self.entry(j).memory)
        if not ready:
            return COMPUTE  # the first step, or other inputs than what is kept belongs to
        if isinstance(code, Tensor):
            if code.any() and not code.all():
                return code
            return COMPUTE if code.any() else REUSE
        which = self.recipe.which
        return REUSE if code == PARTIAL and (which is None or not which.selects(site)) else code

    def _rows(self, j: int, rows: Tensor, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Computes some samples of the batch and fills the others. rows is a bool tensor [samples]."""
        computed, _ = self._picked(rows, original, streams.given(args, kwargs))
        entry = self.entry(j)
        inputs = _hidden(args, kwargs) if self.recipe.fill.keeps_inputs else None
        filled = self.filled(j, inputs)
        output = streams.unpack(
            tuple(
                streams.put(self.samples.spread(rows, len(rest)), some, rest)
                for some, rest in zip(computed, filled, strict=True)
            ),
            entry.form,
        )
        with self._only(entry, rows):
            self._keep(j, output, inputs)
        self.run.record(j, float(rows.float().mean()))
        return output

    @contextlib.contextmanager
    def _only(self, entry: Entry, rows: Tensor) -> Iterator[None]:
        """What is kept within is kept for these samples; the others go on from what they had, as they would alone."""
        values, steps, inputs = entry.values, entry.steps, entry.inputs
        yield
        last = len(values) - 1
        entry.values = [
            tuple(
                streams.choose(self.samples.spread(rows, len(new)), new, old)
                for new, old in zip(value, values[min(n, last)], strict=True)
            )
            for n, value in enumerate(entry.values)
        ]
        if self.recipe.fill.rowwise:
            chosen = rows.tolist()
            old_steps = [steps[n] if n <= last else None for n in range(len(entry.steps))]
            entry.steps = [
                tuple(_of(new, i) if yes else _of(old, i) for i, yes in enumerate(chosen))
                for new, old in zip(entry.steps, old_steps, strict=True)
            ]
        if entry.inputs is not None and inputs is not None:
            entry.inputs = streams.choose(self.samples.spread(rows, len(inputs)), entry.inputs, inputs)
        entry.versions = _versions(entry)

    # ---- entries ----------------------------------------------------------------------------------------------------
    def entry(self, j: int) -> Entry:
        return self.run.entry(j, self.branch, self.turns.get(j, 0), self.network_number)

    def _ready(self, j: int, signature: tuple[Any, ...] | None = None) -> bool:
        """Whether a site can be filled: enough is kept, for inputs like these, and nobody has changed it since."""
        entry = self.entry(j)
        if entry.signature != (self.signature if signature is None else signature) or not self.recipe.fill.ready(entry):
            return False
        if entry.versions == _versions(entry):
            return True
        self.attachment.aliased.add(j)  # the model changes this output in place: copies are kept from now on
        return False

    def _at(self, j: int, inputs: Tensor | None = None, together: bool = False) -> At:
        site, main = self.attachment.columns[j], 0
        if j in self.attachment.spans:
            known = self.attachment.passages.get(self.attachment.spans[j].blocks[-1].name)
            main = 0 if known is None else self._place(known[0])
        return At(self.step, self.run.num_steps, site, inputs, together, self.samples, main)

    def filled(self, j: int, inputs: Tensor | None = None, together: bool = False) -> tuple[Tensor, ...]:
        entry = self.entry(j)
        filled = self.recipe.fill.fill(entry, self._at(j, inputs, together))
        if entry.steps[0] == self.step:  # the fill goes on from its own output
            entry.versions = _versions(entry)
            self.kept = True
        return tuple(t.clone() for t in filled) if self._copies(j, filled) else filled

    def stamp(self, entry: Entry) -> None:
        """What is kept was changed on purpose."""
        entry.versions = _versions(entry)

    def _copies(self, j: int, values: tuple[Tensor, ...]) -> bool:
        """Whether copies are kept and handed out. Inference tensors do not tell if somebody changed them."""
        return j in self.attachment.aliased or values[0].is_inference()

    def _keep(
        self,
        j: int,
        output: Any,
        inputs: Tensor | None = None,
        signature: tuple[Any, ...] | None = None,
        start: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Keeps an output, or its change since `start`, for inputs of this signature."""
        entry, values = self.entry(j), pack(output)
        signature = self.signature if signature is None else signature
        changed = entry.versions != _versions(entry)
        if changed:
            self.attachment.aliased.add(j)
        if changed or entry.signature != signature:  # what is older goes with nothing that comes now
            entry.values, entry.steps, entry.inputs = [], [], None
        if start is not None:
            values = tuple((after - before).detach() for after, before in zip(values, start, strict=True))
        else:
            values = tuple(v.detach().clone() if self._copies(j, values) else v.detach() for v in values)
        entry.form, entry.signature = streams.form_of(output), signature
        if inputs is not None:
            inputs = inputs.detach().clone() if self._copies(j, (inputs,)) else inputs.detach()
        self.recipe.fill.keep(entry, values, self._at(j, inputs))
        entry.versions = _versions(entry)
        self.kept = True

    def _measured(self, j: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module itself, measured where that is due."""
        before = self.flops()
        output = original(*args, **kwargs)
        if self.counter is not None:
            self.costs[j] += self.flops() - before
        return output


def _of(step: Any, sample: int) -> Any:
    """The step at which a value of a sample was computed; None if there is none."""
    return step[sample] if isinstance(step, tuple) else step


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among the inputs, hidden states as a rule."""
    for value in (*args, kwargs.get("hidden_states"), kwargs.get("sample"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def noisy_sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The noisy sample that a transformer is given; of a list of pictures, as much as they have in common."""
    named = (kwargs[name] for name in ("hidden_states", "sample") if name in kwargs)
    first = next((value for value in (*args, *named, *kwargs.values()) if value is not None), None)
    if isinstance(first, (list, tuple)) and first and all(isinstance(one, Tensor) for one in first):
        shape = [min(sizes) for sizes in zip(*(one.shape for one in first), strict=False)]
        return torch.stack([one[tuple(map(slice, shape))] for one in first])
    return first if isinstance(first, Tensor) else _hidden(args, kwargs)


def _versions(entry: Entry) -> tuple[int, ...]:
    """Change counters of everything that is kept; torch raises them with every change in place."""
    return tuple(0 if t.is_inference() else t._version for t in entry.kept)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of the token streams that enter a block."""
    values = [*args, kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")]
    return tuple((v.shape, v.dtype, v.device) for v in values if isinstance(v, Tensor))


def _counters(arguments: Mapping[Key, Any]) -> tuple[int, ...]:
    """Change counters of the tensors among arguments."""
    return tuple(v._version for v in arguments.values() if isinstance(v, Tensor) and not v.is_inference())


def _lengths(block: Any, args: Args, kwargs: Kwargs) -> tuple[int, int]:
    """Tokens of the image and of the text among the inputs of a block [batch, tokens, channels]; 0 for none."""
    named = inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments
    given = (named.get(name) for name in ("hidden_states", "encoder_hidden_states"))
    image, text = (value.shape[1] if isinstance(value, Tensor) else 0 for value in given)
    return image, text


def _embedding(block: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    """The embedding of the timestep among the inputs of a block, by its name; of several tensors, the first."""
    named = inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments
    given = (named.get(name) for name in _EMBEDDINGS)
    firsts = (value[0] if isinstance(value, (tuple, list)) and value else value for value in given)
    return next((value for value in firsts if isinstance(value, Tensor)), None)
