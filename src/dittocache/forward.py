"""What a forward does at every block and site: compute and keep, fill, or gather, compute and scatter.

Here are the decisions and the tensors; the hooks that lead here, and the modules, are in `hooks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .describe import Block
from .fill import At, Entry
from .plan import COMPUTE, OPEN, PARTIAL, REUSE
from .run import Run

if TYPE_CHECKING:
    from .hooks import Attachment


def _sdpa_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch's own table of FLOP formulas lacks the attention kernel of the CPU
_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}


class Forward:
    """One forward of one transformer within a run: the row it follows, and what it does at blocks and sites."""

    def __init__(self, attachment: Attachment, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attachment = attachment
        self.run = run
        self.recipe = run.recipe
        self.step = run.step_index or 0
        self.branch = run.next_branch()
        self.row = list(run.row())
        self.signature: tuple[Any, ...] = ()
        self.skipped: dict[int, bool] = {}
        self.turns: dict[int, int] = {}  # calls of a site in this forward; some blocks call a feed-forward twice
        self.seen: dict[str, Tensor] = {}
        self.raw: Tensor | None = None
        self.kept = False
        self.scoring = 0.0  # FLOPs of scoring tokens, which belong to no part of the model
        self.counter: FlopCounterMode | None = None
        sample = _hidden(args, kwargs)
        self.grid = attachment.grid(sample)
        if run.recipe.which is not None and not run.calls.any():
            run.halves = _guidance_halves(sample)
        key = None if sample is None else (tuple(sample.shape), sample.dtype)
        run.cost_key = key
        if key is not None and key not in attachment.costs and attachment.measuring.acquire(blocking=False):
            self.costs = [0.0] * len(attachment.columns)
            self.counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
            self.counter.__enter__()

    def close(self, failed: bool) -> None:
        """Ends the forward: stores what was measured, and weighs what is kept."""
        if self.counter is not None:
            total = self.flops()
            self.counter.__exit__(None, None, None)
            if not failed and all(code is None or code == COMPUTE for code in self.row):
                outside = total - sum(self.costs[: len(self.attachment.description.sites)])
                self.attachment.costs[self.run.cost_key] = (self.costs, max(outside, 0.0))
            self.attachment.measuring.release()
        if self.kept:
            self.run.weigh()

    def flops(self) -> float:
        return 0.0 if self.counter is None else float(self.counter.get_total_flops()) - self.scoring

    # ---- blocks -----------------------------------------------------------------------------------------------------
    def block(self, block: Block, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block: passed by when its stack is skipped, gated and added when all its sites are reused, else run."""
        self.signature = _signature(args, kwargs)
        if block.first:
            self.skipped[block.stack] = self._skips(block, args, kwargs)
        if self.skipped.get(block.stack):
            return self._pass_by(block, original, args, kwargs)
        row = self.row
        for j in block.sites + block.linears if self.attachment.split else block.sites:
            if row[j] == OPEN and self.attachment.entry(j).mutes:
                # the modules that feed a fused site come before it, so it is decided here
                self._decide(j, self._entry(j), args, kwargs)
            # what cannot be filled is computed, whatever the row says
            if row[j] not in (None, COMPUTE, OPEN) and not self._ready(j):
                row[j] = COMPUTE
            elif row[j] == PARTIAL:
                row[j] = self._share(j)
        before = self.flops() - sum(self.costs[j] for j in block.sites) if self.counter else 0.0
        output: Any = NotImplemented
        # the shortcut has no inputs of modules to hand to a fill
        shortcut = None if self.recipe.fill.keeps_inputs else block.family.reuse_block
        if shortcut is not None and all(row[j] == REUSE for j in block.sites):
            features = {self.attachment.entry(j).path: self._filled(j, together=True) for j in block.sites}
            output = shortcut(block.module, features, *args, **kwargs)
            if output is not NotImplemented:
                self.run.record(list(block.sites), REUSE)
        if output is NotImplemented:
            output = original(*args, **kwargs)
        if self.counter:
            self.costs[block.stack] += self.flops() - before - sum(self.costs[j] for j in block.sites)
        if block.last and row[block.stack] is not None:
            self._keep(block.stack, output)
            self.run.record(block.stack, COMPUTE)
        return output

    def _skips(self, block: Block, args: Any, kwargs: Any) -> bool:
        """Whether the stack that begins with this block is skipped; if it should be but cannot, all is computed."""
        if self.row[block.stack] == OPEN:
            self._decide(block.stack, self._entry(block.stack), args, kwargs)
        if self.row[block.stack] in (None, COMPUTE):
            return False
        if self._ready(block.stack):
            return True
        for member in self.attachment.description.blocks:
            if member.stack == block.stack:
                for j in (*member.sites, member.stack):
                    self.row[j] = None if self.row[j] is None else COMPUTE
        return False

    def _pass_by(self, block: Block, original: Any, args: Any, kwargs: Any) -> Any:
        """A block of a skipped stack. Its own sites may still ask to be computed, to refresh what they keep."""
        if any(self.row[j] not in (None, REUSE) for j in block.sites):
            original(*args, **kwargs)
        else:
            self.run.record(list(block.sites), REUSE)
        if block.last:
            self.run.record(block.stack, REUSE)
        # the blocks before the last hand this on as well: it has the right form, and the last one replaces it
        return _unpack(self._filled(block.stack), self._entry(block.stack))

    # ---- sites ------------------------------------------------------------------------------------------------------
    def site(self, j: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module whose output can be kept."""
        code = self.row[j]
        if code is None:
            return self._measured(j, original, args, kwargs)
        self.turns[j] = self.turns.get(j, -1) + 1
        entry = self._entry(j)
        if code == OPEN:
            decided = self._decide(j, entry, args, kwargs)
            if isinstance(decided, Tensor):
                return self._rows(j, decided, original, args, kwargs)
            code = decided
        if self.turns[j] and code != COMPUTE and not self._ready(j):
            code = COMPUTE
        inputs = _hidden(args, kwargs) if self.recipe.fill.keeps_inputs else None
        if code == COMPUTE:
            output = self._measured(j, original, args, kwargs)
            self._keep(j, output, inputs)
            self.run.record(j, COMPUTE)
            entry.ages = None
            if self.recipe.fill.mixes:
                output = _unpack(self.recipe.fill.mix(entry, _pack(output), self._at(j, inputs)), entry)
            return output
        if code == REUSE:
            self.run.record(j, REUSE)
            together = all(self.row[i] in (REUSE, None) for i in self.attachment.mates[j])
            return _unpack(self._filled(j, inputs, together), entry)
        return self._partial(j, entry, code, original, args[0] if args else kwargs["hidden_states"])

    def mute(self, j: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module that only feeds a fused site: hands its input on while that site is reused."""
        return _hidden(args, kwargs) if self.row[j] == REUSE else self._measured(j, original, args, kwargs)

    def _decide(self, j: int, entry: Entry, args: Any, kwargs: Any) -> float | Tensor:
        """Asks the recipe's `when`; a tensor [batch] comes back only if its rows differ."""
        site = self.attachment.columns[j]
        code = self.recipe.when.decide(self.step, site, args or (kwargs["hidden_states"],), entry.memory)
        if isinstance(code, Tensor):
            if site.kind not in ("stack", "fused") and self._ready(j) and code.any() and not code.all():
                return code
            code = COMPUTE if code.any() else REUSE
        if code != COMPUTE and not self._ready(j):
            code = COMPUTE  # the first step, or other inputs than what is kept belongs to
        if code == PARTIAL and (self.recipe.which is None or not site.selectable):
            code = REUSE
        elif code == PARTIAL:
            code = self._share(j)
        self.row[j] = code
        return code

    def _rows(self, j: int, rows: Tensor, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Computes some samples of the batch and fills the others. rows is a bool tensor [batch]."""

        def pick(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == len(rows) else value

        computed = _pack(original(*map(pick, args), **{name: pick(value) for name, value in kwargs.items()}))
        entry = self._entry(j)
        inputs = _hidden(args, kwargs) if self.recipe.fill.keeps_inputs else None
        values = tuple(filled.clone() for filled in self._filled(j, inputs))
        for value, some in zip(values, computed, strict=True):
            value[rows] = some
        output = _unpack(values, entry)
        before, old = entry.values, entry.inputs
        self._keep(j, output, inputs)
        # the rows that were filled go on from what they had, as they would alone
        entry.values = [
            tuple(_choose(rows, new, former) for new, former in zip(value, before[min(n, len(before) - 1)]))
            for n, value in enumerate(entry.values)
        ]
        if entry.inputs is not None and old is not None:
            entry.inputs = _choose(rows, entry.inputs, old)
        entry.versions = _versions(entry)
        self.run.record(j, float(rows.float().mean()))
        return output

    def _share(self, j: int) -> float:
        """The share of tokens that the selector wants at a partial step; with none of them, all grow older."""
        site, entry = self.attachment.columns[j], self._entry(j)
        tokens = entry.values[0][0].shape[1]
        share = self.recipe.which.count(site, self.step, self.run.num_steps, tokens) / tokens
        if share == REUSE:
            self._grow_older(entry)
        return float(share)

    def _scores_due(self, j: int, tokens: int) -> bool:
        """Whether a partial step scores tokens by this attention before it is computed again."""
        which, run, sites = self.recipe.which, self.run, self.attachment.description.sites
        for step in range(self.step, run.num_steps):
            row = self.row if step == self.step else run.codes[step]
            if step > self.step and row[j] == COMPUTE:
                return False
            codes = [row[j]]
            for i in self.attachment.scored[j]:
                counted = row[i] == PARTIAL
                codes.append(which.count(sites[i], step, run.num_steps, tokens) / tokens if counted else row[i])
            if any(code not in (None, REUSE, COMPUTE) for code in codes):
                return True
        return False

    def _grow_older(self, entry: Entry) -> Tensor:
        """Adds a call to the ages of all tokens, and returns the ages before."""
        held = entry.values[0][0]
        before = entry.ages
        if before is None:
            before = torch.zeros(held.shape[:2], dtype=torch.float32, device=held.device)
        # out of place: an inference tensor could not be changed outside of inference mode
        entry.ages = before + 1
        self.kept = True
        return before

    def _partial(self, j: int, entry: Entry, share: float, original: Callable[..., Any], x: Tensor) -> Any:
        """Computes some tokens of a token-wise module and writes them into the kept output."""
        which, run = self.recipe.which, self.run
        count = round(share * x.shape[1])
        (held,) = self._filled(j, x if self.recipe.fill.keeps_inputs else None)
        stored = held is entry.values[0][0]
        ages = self._grow_older(entry)
        if count:
            observed = self._entry(self.attachment.scorer[j]).observed if j in self.attachment.scorer else None
            inputs = x if self.raw is None else self.raw
            base = which.base(observed, inputs, held, run.halves, run.generator)
            chosen = which.choose(which.score(base, ages, self._cells(which, x.shape[1]), run.halves), count)
            index = chosen.unsqueeze(-1)
            computed = original(x.gather(1, index.expand(-1, -1, x.shape[-1])))
            index = index.expand(-1, -1, held.shape[-1])
            written = self.recipe.fill.write(entry, index, computed)
            # a stand-in that is not itself what is kept stays what it is where nothing was computed
            held = written if stored else held.scatter(1, index, computed)
            entry.versions = _versions(entry)
            entry.ages.scatter_(1, chosen, 0.0)  # type: ignore[union-attr]
        run.record(j, count / x.shape[1])
        return held.clone() if j in self.attachment.aliased else held

    def _cells(self, which: Any, tokens: int) -> tuple[int, int] | None:
        """The token grid, if it is that of these tokens and cells fit into it."""
        if not which.spatial_bonus:
            return None
        known = self.grid is not None and self.grid[0] * self.grid[1] == tokens
        if self.grid is None or not known or any(side % which.spatial_grid for side in self.grid):
            self.run.note(
                f"spatial_bonus is left out: {self.grid or 'an unknown grid'} does not divide into cells of "
                f"{which.spatial_grid} x {which.spatial_grid} tokens"
            )
            return None
        return self.grid

    # ---- entries ----------------------------------------------------------------------------------------------------
    def _entry(self, j: int) -> Entry:
        return self.run.entry(j, self.branch, self.turns.get(j, 0))

    def _ready(self, j: int) -> bool:
        """Whether a site can be filled: enough is kept, for inputs like these, and nobody has changed it since."""
        entry = self._entry(j)
        if entry.signature != self.signature or not self.recipe.fill.ready(entry):
            return False
        if entry.versions == _versions(entry):
            return True
        self.attachment.aliased.add(j)  # the model changes this output in place: copies are kept from now on
        return False

    def _at(self, j: int, inputs: Tensor | None = None, together: bool = False) -> At:
        return At(self.step, self.run.num_steps, self.attachment.columns[j], inputs, together)

    def _filled(self, j: int, inputs: Tensor | None = None, together: bool = False) -> tuple[Tensor, ...]:
        entry = self._entry(j)
        filled = self.recipe.fill.fill(entry, self._at(j, inputs, together))
        if entry.steps[0] == self.step:  # the fill goes on from its own output
            entry.versions = _versions(entry)
            self.kept = True
        return tuple(t.clone() for t in filled) if self._copies(j, filled) else filled

    def _copies(self, j: int, values: tuple[Tensor, ...]) -> bool:
        """Whether copies are kept and handed out. Inference tensors do not tell if somebody changed them."""
        return j in self.attachment.aliased or values[0].is_inference()

    def _keep(self, j: int, output: Any, inputs: Tensor | None = None) -> None:
        entry, values = self._entry(j), _pack(output)
        changed = entry.versions != _versions(entry)
        if changed:
            self.attachment.aliased.add(j)
        if changed or entry.signature != self.signature:  # what is older goes with nothing that comes now
            entry.values, entry.steps, entry.inputs = [], [], None
        values = tuple(v.detach().clone() if self._copies(j, values) else v.detach() for v in values)
        entry.single, entry.signature = isinstance(output, Tensor), self.signature
        if inputs is not None:
            inputs = inputs.detach().clone() if self._copies(j, (inputs,)) else inputs.detach()
        self.recipe.fill.keep(entry, values, self._at(j, inputs))
        entry.versions = _versions(entry)
        self.kept = True

    def _measured(self, j: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module itself; measured where that is due, and observed where the recipe scores tokens by it."""
        before = self.flops()
        scored = j in self.attachment.scored
        if scored:  # other modules run inside of it: its linear layers, where a cache keeps them
            self.seen.clear()
        output = original(*args, **kwargs)
        if self.counter is not None:
            self.costs[j] += self.flops() - before
        if not scored:
            return output
        if self.seen and self._scores_due(j, next(iter(self.seen.values())).shape[1]):
            before = self.flops()
            module: Any = self.attachment.entry(j).module
            heads = {name: _split_heads(value, module.heads) for name, value in self.seen.items()}
            scale = float(getattr(module, "scale", heads[next(iter(heads))].shape[-1] ** -0.5))
            self._entry(j).observed = self.recipe.which.observe(heads, scale)
            self.scoring += self.flops() - before
        self.seen.clear()
        return output


def _choose(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Samples of `yes` where rows [batch] is True, of `no` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * channels] to [batch, heads, tokens, channels]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among the inputs, hidden states as a rule."""
    for value in (*args, kwargs.get("hidden_states"), kwargs.get("sample"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def _guidance_halves(sample: Tensor | None) -> int:
    """2 if the batch holds the same latents twice, as batched guidance does, else 1."""
    if sample is None or sample.shape[0] % 2:
        return 1
    first, second = sample.chunk(2)
    return 2 if torch.equal(first, second) else 1


def _versions(entry: Entry) -> tuple[int, ...]:
    """Change counters of everything that is kept; torch raises them with every change in place."""
    return tuple(0 if t.is_inference() else t._version for t in entry.kept)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of the token streams that enter a block."""
    values = [*args, kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")]
    return tuple((v.shape, v.dtype, v.device) for v in values if isinstance(v, Tensor))


def _pack(output: Any) -> tuple[Tensor, ...]:
    """Outputs as a tuple of tensors."""
    values = (output,) if isinstance(output, Tensor) else tuple(output) if isinstance(output, (tuple, list)) else ()
    if not values or not all(isinstance(v, Tensor) for v in values):
        raise TypeError(f"cannot keep an output of type {type(output).__name__}: expected tensors")
    return values


def _unpack(values: tuple[Tensor, ...], entry: Entry) -> Any:
    """Inverse of `_pack`: the form in which the module returned them."""
    return values[0] if entry.single else values
