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
# share of a fused site of which all tokens are computed at a partial step: its attention is held, unlike at a full
# one. It survives the six digits of a file, and times up to 250000 tokens it rounds to all of them.
ALL = 1 - 2e-6
# norms of keys: of text that an attention is given apart, and of its own tokens
KEY_NORMS = ("norm_added_k",), ("norm_k", "k_norm")


class Watch(TorchFunctionMode):
    """Sees what the attention inside of it hands to torch's kernel, whatever the model did to it before.

    Args:
        norms: weights of the norms that its keys go through, in the order in which the keys are joined.
    """

    def __init__(self, norms: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.seen: list[Attended] = []
        self.norms = norms
        self.raw: dict[int, Tensor] = {}  # what entered the norms, by their number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.norms and func in (F.rms_norm, F.layer_norm):
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            self.raw |= {n: args[0] for n, norm in enumerate(self.norms) if norm is not None and norm is weight}
        if func is F.scaled_dot_product_attention:
            attended = self._attended(*args, **kwargs)
            self.seen.append(attended._replace(raw_key=self._raw_key(attended.key)))
        return func(*args, **kwargs)

    def _raw_key(self, key: Tensor) -> Tensor | None:
        """Keys [batch, heads, tokens, channels] before their norms; None if these were not seen."""
        if not self.norms:
            return key
        parts, self.raw = [self.raw[n] for n in sorted(self.raw)], {}
        if len(parts) < len(self.norms) or any(part.ndim != 4 for part in parts):
            return None
        raw = torch.cat(parts, 1).transpose(1, 2)
        return raw if raw.shape == key.shape else None

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
        if self.attachment.mixing:
            self.run.note(
                f"{self.attachment.mixing[0]} and others like it mix their tokens, or those of several things: none of "
                "them is computed on its own at partial steps"
            )
        self.raw: Tensor | None = None  # tokens before the norm of the feed-forward
        self.choices: dict[int, Tensor] = {}  # of fused sites, made before the site itself is reached

    # ---- how many ---------------------------------------------------------------------------------------------------
    def share(self, j: int) -> float:
        """The share of tokens that the selector wants at a partial step; with none of them, all grow older."""
        entry = self.forward.entry(j)
        image, tokens = self.image(j, entry), entry.values[0][0].shape[1]
        own = len(range(tokens)[image])
        count = self.which.count(self._site(j), self.forward.step, self.run.num_steps, own)
        if not count:
            self._grow_older(entry)
        elif not all(self._fed(j, one).values for one in self._attentions(j)):
            return COMPUTE  # the attention in front of it is not kept
        if count < own:
            return count / tokens
        return ALL if self._attentions(j) else COMPUTE

    def image(self, j: int, entry: Entry) -> slice:
        """Which tokens of a site may be chosen: all, or those that are not text.

        Raises:
            RuntimeError: the tokens of the image cannot be told from text.
        """
        block, site = self.attachment.block_of[j], self._site(j)
        text, own = block.family.text, self.forward.tokens
        apart = bool(block.family.twice) or any("context" in self._site(i).kind for i in block.sites)
        if site.kind not in ("feed-forward", "cross-attention") or text is None or apart:
            return slice(None)
        tokens, (apart_image, apart_text) = entry.values[0][0].shape[1], self.forward.lengths
        if apart_text and apart_image + apart_text == tokens:  # the block has joined them
            own = apart_image
        if self.which.select_text or own == tokens or not self.which.selects(site):
            return slice(None)
        if own is None or own > tokens:
            raise RuntimeError(
                f"the {tokens} tokens of {site.name!r} hold text, but it is not known how many: "
                "select_text=True chooses among all of them"
            )
        return slice(tokens - own, None) if text == "first" else slice(own)

    def thins(self, j: int) -> bool:
        """Whether the second call of a site in a forward is thinned out: it is for the text, if there are two."""
        family = self.attachment.block_of[j].family
        return self.which.select_text or self.attachment.entry(j).path not in family.twice

    def _of_text(self, j: int) -> bool:
        """Whether a site's present call is about the text."""
        second = (
            self.forward.turns.get(j, 0) and self.attachment.entry(j).path in self.attachment.block_of[j].family.twice
        )
        return bool(second) or self._site(j).kind == "context-feed-forward"

    def _due(self, j: int, tokens: int) -> bool:
        """Whether a partial step scores tokens by this attention before it is computed again."""
        scored = [i for i, scorer in self.scorers.items() if scorer == j and self.which.selects(self._site(i))]
        for step in range(self.forward.step, self.run.num_steps):
            row = self.forward.row if step == self.forward.step else self.run.codes[step]
            if step > self.forward.step and row[j] == COMPUTE:
                return False
            for i in scored:
                if row[i] != PARTIAL:
                    due = row[i] not in (None, REUSE, COMPUTE)
                else:  # all tokens need no score, but at a fused site the attention that is held
                    count = self.which.count(self._site(i), step, self.run.num_steps, tokens)
                    due = 0 < count < tokens or bool(count and self._attentions(i))
                if due:
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
        with Watch(self._key_norms(j)) as watch:  # a compiled attention would not be seen inside of
            output = self.forward.plain(*args, **kwargs)
        before = self.forward.flops()
        self.forward.entry(j).observed = self._score(j, watch.seen, rows)
        self.forward.scoring += self.forward.flops() - before
        return output

    def _key_norms(self, j: int) -> tuple[Any, ...]:
        """Weights of the norms of an attention's keys, in the order of text and image, for selectors that ask."""
        if not self.which.raw_keys:
            return ()
        attention = (self._attentions(j) or [self.attachment.entry(j).module])[0]
        both = [next((n for name in names if (n := getattr(attention, name, None))), None) for names in KEY_NORMS]
        both = both if self.attachment.block_of[j].family.text == "first" else both[::-1]
        return tuple(getattr(norm, "weight", None) for norm in both if norm is not None)

    def _score(self, j: int, seen: list[Attended], rows: int) -> Tensor:
        """Raw scores [batch, tokens] of an attention: its last, of which some models make one for every row."""
        if not seen:
            raise RuntimeError(
                f"selector {self.which.name!r} sees no attention in {self._site(j).name!r}, which does not use torch's "
                "scaled_dot_product_attention; use random, similarity, norm or straight"
            )
        each = rows if len(seen) == rows and len(seen[-1].query) == 1 else 1
        score = torch.cat([self.which.observe(one, self.forward.samples.halves) for one in seen[-each:]])
        return score

    def _own(self, j: int, x: Tensor) -> Tensor | None:
        """The scores of the tokens x of a site: a part of a joint attention's, or of attentions within or along frames.

        Raises:
            RuntimeError: its block has no attention, or it is not known whether text or image comes first.
        """
        if not self.which.observes:
            return None
        rows, tokens = x.shape[:2]
        observed = self.forward.entry(self.scorers[j]).observed if j in self.scorers else None
        if observed is None:
            raise RuntimeError(
                f"selector {self.which.name!r} has no {self.which.scored_by} to score the tokens of "
                f"{self._site(j).name!r} by; use random, similarity, norm or straight"
            )
        if observed.shape == (rows, tokens):
            return observed
        if observed.numel() == rows * tokens:
            groups = observed.unflatten(0, (rows, -1))
            return (groups.transpose(1, 2) if "temporal" in self._site(j).name else groups).flatten(1)
        text = self.attachment.block_of[j].family.text
        if text is None:
            raise RuntimeError(
                f"selector {self.which.name!r}: it is not known whether text or image comes first in "
                f"{self._site(self.scorers[j]).name!r}; use random, similarity, norm or straight"
            )
        first = (text == "first") == self._of_text(j)
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
        inputs = x if self.raw is None or self._site(j).kind != "feed-forward" else self.raw
        base = which.base(self._own(j, x), inputs, held, halves, self.run.generator)
        image = self.image(j, entry)
        score = which.score(base[:, image], ages[:, image], self._cells(len(range(x.shape[1])[image])), halves)
        return which.choose(score, count) + (image.start or 0)

    def _cells(self, tokens: int) -> tuple[int, int] | None:
        """The token grid, if it is that of these tokens and cells fit into it."""
        which, grid = self.which, self.forward.grid
        if not which.spatial_bonus:
            return None
        if grid is None or grid[0] * grid[1] != tokens:
            self.run.note(f"spatial_bonus is left out: {tokens} tokens to choose from are no grid of an image")
            return None
        if any(side % which.spatial_grid for side in grid):
            self.run.note(
                f"spatial_bonus is left out: {grid} does not divide into cells of "
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
        self.run.record(j, share if count == x.shape[1] else count / x.shape[1])
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
    def _fed(self, j: int, module: nn.Module) -> Entry:
        """What is kept of an attention in front of a fused site."""
        call = FED - self.attachment.entry(j).mutes.index(module)
        return self.run.entry(j, self.forward.branch, call, self.forward.network_number)

    def _attentions(self, j: int) -> list[nn.Module]:
        return [module for module in self.attachment.entry(j).mutes if self.attachment.is_attention(module)]

    def feed(self, j: int, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module that only feeds a fused site, in a step that computes some of the site's tokens, or all of them.

        The attention is held; what a linear layer feeds is computed for the chosen tokens and left zero elsewhere.
        """
        share, x = self.forward.row[j], streams.main_stream(streams.given(args, kwargs))
        attention = self.attachment.is_attention(module)
        if share == COMPUTE or share is None:
            if not attention or share is None or not self._due(j, x.shape[1]):
                return original(*args, **kwargs)
            scores = module is self._attentions(j)[0]
            output = self.observed(j, original, args, kwargs) if scores else original(*args, **kwargs)
            fed = self._fed(j, module)
            fed.values, fed.form = [tuple(t.detach() for t in streams.pack(output))], streams.form_of(output)
            return output
        if attention:
            fed = self._fed(j, module)
            return streams.unpack(fed.values[0], fed.form)
        if not isinstance(module, nn.Linear):
            return original(*args, **kwargs)
        if j not in self.choices:
            (held,) = self.forward.entry(j).values[0]
            self.choices[j] = self._choose(j, x, held, round(float(share) * x.shape[1]))
        chosen = self.choices[j].unsqueeze(-1)
        computed = original(x.gather(1, chosen.expand(-1, -1, x.shape[-1])))
        whole = computed.new_zeros(*x.shape[:-1], computed.shape[-1])
        return whole.scatter(1, chosen.expand(-1, -1, computed.shape[-1]), computed)
