"""Partial steps: some tokens of a module are computed, and written into the output that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import streams
from .fill import Entry
from .plan import COMPUTE, PARTIAL, REUSE
from .which import Attended

if TYPE_CHECKING:
    from .forward import Forward

FED = -1  # "call" of the entry that keeps the attention in front of a fused site


class Watch(TorchFunctionMode):
    """Sees what the attention inside of it hands to torch's kernel, whatever the model did to it before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Attended | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen = self._attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _attended(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Attended:
        if key.shape[1] != query.shape[1]:  # several heads of queries share one of keys
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, device=query.device).masked_fill(~attn_mask, -torch.inf)
        return Attended(query, key, value, kwargs.get("scale") or query.shape[-1] ** -0.5, attn_mask)


class Selection:
    """What a forward knows of the tokens that its partial steps compute."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.run = forward.run
        self.which = forward.recipe.which
        self.attachment = forward.attachment
        self.scorers = self.attachment.scorers[self.which.scored_by]
        self.raw: Tensor | None = None  # tokens before the norm of the feed-forward
        self.choices: dict[int, Tensor] = {}  # of fused sites, made before the site itself is reached

    # ---- how many ---------------------------------------------------------------------------------------------------
    def share(self, j: int) -> float:
        """The share of tokens that the selector wants at a partial step; with none of them, all grow older."""
        entry = self.forward.entry(j)
        tokens = entry.values[0][0].shape[1]
        share = self.which.count(self._site(j), self.forward.step, self.run.num_steps, tokens) / tokens
        if share == REUSE:
            self._grow_older(entry)
        elif 0 < share < COMPUTE and self.attachment.entry(j).mutes and not self._fed(j).values:
            return COMPUTE  # the attention in front of it is not kept
        return float(share)

    def _due(self, j: int, tokens: int) -> bool:
        """Whether a partial step scores tokens by this attention before it is computed again."""
        scored = [i for i, scorer in self.scorers.items() if scorer == j and self.which.selects(self._site(i))]
        for step in range(self.forward.step, self.run.num_steps):
            row = self.forward.row if step == self.forward.step else self.run.codes[step]
            if step > self.forward.step and row[j] == COMPUTE:
                return False
            counts = (self.which.count(self._site(i), step, self.run.num_steps, tokens) / tokens for i in scored)
            codes = [count if row[i] == PARTIAL else row[i] for i, count in zip(scored, counts, strict=True)]
            if any(code not in (None, REUSE, COMPUTE) for code in codes):
                return True
        return False

    # ---- scores -----------------------------------------------------------------------------------------------------
    def observed(self, j: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A full attention, whose scores are kept if they are wanted.

        Raises:
            RuntimeError: it does not hand its queries and keys to torch's attention kernel.
        """
        x = streams.main_stream(streams.given(args, kwargs))
        rows = self.forward.samples.size * self.forward.samples.halves
        if not self.which.observes or not self._due(j, x.shape[:-1].numel() // rows):
            return original(*args, **kwargs)
        with Watch() as watch:  # a compiled attention would not be seen inside of
            output = self.forward.plain(*args, **kwargs)
        before = self.forward.flops()
        self.forward.entry(j).observed = self._score(j, watch.seen, rows)
        self.forward.scoring += self.forward.flops() - before
        return output

    def _score(self, j: int, seen: Attended | None, rows: int) -> Tensor:
        """Raw scores [batch, tokens] of an attention; those within or along frames are laid out as the tokens are."""
        if seen is None:
            raise RuntimeError(
                f"selector {self.which.name!r} sees no attention in {self._site(j).name!r}, which does not use torch's "
                "scaled_dot_product_attention; use random, similarity, norm or straight"
            )
        score = self.which.observe(seen, self.forward.samples.halves)
        if len(score) == rows:
            return score
        groups = score.unflatten(0, (rows, -1))
        return (groups.transpose(1, 2) if "temporal" in self._site(j).name else groups).flatten(1)

    def _own(self, j: int, observed: Tensor | None, tokens: int) -> Tensor | None:
        """The part of a joint attention's scores that belongs to the tokens of a site.

        Raises:
            RuntimeError: it is not known whether text or image comes first.
        """
        if observed is None or observed.shape[1] == tokens:
            return observed
        text = self.attachment.block_of[j].family.text
        if text is None:
            raise RuntimeError(
                f"selector {self.which.name!r}: it is not known whether text or image comes first in "
                f"{self._site(self.scorers[j]).name!r}; use random, similarity, norm or straight"
            )
        first = (text == "first") == (self._site(j).kind == "context-feed-forward")
        return observed[:, :tokens] if first else observed[:, -tokens:]

    def _site(self, j: int) -> Any:
        return self.attachment.columns[j]

    def _grow_older(self, entry: Entry) -> Tensor:
        """Adds a call to the ages of all tokens, and returns the ages before."""
        held = entry.values[0][0]
        before = entry.ages
        if before is None:
            before = torch.zeros(held.shape[:2], dtype=torch.float32, device=held.device)
        # out of place: an inference tensor could not be changed outside of inference mode
        entry.ages = before + 1
        self.forward.kept = True
        return before

    def _choose(self, j: int, x: Tensor, held: Tensor, count: int) -> Tensor:
        """Numbers [batch, count] of the tokens of a site that are computed."""
        which, entry, halves = self.which, self.forward.entry(j), self.forward.samples.halves
        ages = self._grow_older(entry)
        observed = self.forward.entry(self.scorers[j]).observed if which.observes and j in self.scorers else None
        inputs = x if self.raw is None or self._site(j).kind != "feed-forward" else self.raw
        base = which.base(self._own(j, observed, x.shape[1]), inputs, held, halves, self.run.generator)
        return which.choose(which.score(base, ages, self._cells(x.shape[1]), halves), count)

    def _cells(self, tokens: int) -> tuple[int, int] | None:
        """The token grid, if it is that of these tokens and cells fit into it."""
        which, grid = self.which, self.forward.grid
        if not which.spatial_bonus:
            return None
        known = grid is not None and grid[0] * grid[1] == tokens
        if grid is None or not known or any(side % which.spatial_grid for side in grid):
            self.run.note(
                f"spatial_bonus is left out: {grid or 'an unknown grid'} does not divide into cells of "
                f"{which.spatial_grid} x {which.spatial_grid} tokens"
            )
            return None
        return grid

    # ---- the partial step -------------------------------------------------------------------------------------------
    def partial(self, j: int, share: float, original: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        """Computes some tokens of a token-wise module and writes them into the kept output."""
        forward, entry = self.forward, self.forward.entry(j)
        arguments = streams.given(args, kwargs)
        x = streams.main_stream(arguments)
        count = round(share * x.shape[1])
        (held,) = forward.filled(j, x if forward.recipe.fill.keeps_inputs else None)
        if count:
            stored = held is entry.values[0][0]
            chosen = self.choices.pop(j, None)
            chosen = self._choose(j, x, held, count) if chosen is None else chosen
            computed = self._gathered(j, chosen, original, arguments)
            index = chosen.unsqueeze(-1).expand(-1, -1, held.shape[-1])
            written = forward.recipe.fill.write(entry, index, computed)
            # a stand-in that is not itself what is kept stays what it is where nothing was computed
            held = written if stored else held.scatter(1, index, computed)
            forward.stamp(entry)
            entry.ages.scatter_(1, chosen, 0.0)  # type: ignore[union-attr]
        else:
            self._grow_older(entry)
        self.run.record(j, count / x.shape[1])
        return held.clone() if j in self.attachment.aliased else held

    def _gathered(self, j: int, chosen: Tensor, original: Callable[..., Any], arguments: dict[Any, Any]) -> Tensor:
        """The module for the chosen tokens [batch, count]; a cross-attention's scores of them are renewed."""
        x = streams.main_stream(arguments)
        some = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        arguments = {key: some if value is x else value for key, value in arguments.items()}
        args = tuple(value for key, value in arguments.items() if isinstance(key, int))
        kwargs = {key: value for key, value in arguments.items() if isinstance(key, str)}
        if not self.which.observes or self.scorers.get(j) != j or self._site(j).kind == "fused":
            return original(*args, **kwargs)
        with Watch() as watch:
            output = self.forward.plain(*args, **kwargs)
        entry = self.forward.entry(j)
        if entry.observed is not None:
            entry.observed = entry.observed.scatter(1, chosen, self._score(j, watch.seen, len(x)))
        return output

    # ---- fused sites ------------------------------------------------------------------------------------------------
    def _fed(self, j: int) -> Entry:
        return self.run.entry(j, self.forward.branch, FED, self.forward.network_number)

    def feed(self, j: int, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module that only feeds a fused site, in a step that computes some of the site's tokens, or all of them.

        The attention is held; what a linear layer feeds is computed for the chosen tokens and left zero elsewhere.
        """
        share, x = self.forward.row[j], streams.main_stream(streams.given(args, kwargs))
        attention = self.attachment.is_attention(module)
        if share == COMPUTE or share is None:
            if not attention or share is None or not self._due(j, x.shape[1]):
                return original(*args, **kwargs)
            output = self.observed(j, original, args, kwargs)
            fed = self._fed(j)
            fed.values = [tuple(t.detach() for t in streams.pack(output))]
            return output
        if attention:
            (held,) = self._fed(j).values[0]
            return held
        if not isinstance(module, nn.Linear):
            return original(*args, **kwargs)
        if j not in self.choices:
            (held,) = self.forward.entry(j).values[0]
            self.choices[j] = self._choose(j, x, held, round(float(share) * x.shape[1]))
        chosen = self.choices[j].unsqueeze(-1)
        computed = original(x.gather(1, chosen.expand(-1, -1, x.shape[-1])))
        whole = computed.new_zeros(*x.shape[:-1], computed.shape[-1])
        return whole.scatter(1, chosen.expand(-1, -1, computed.shape[-1]), computed)
