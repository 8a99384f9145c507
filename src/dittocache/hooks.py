"""The only file that touches module forwards.

Every call of a block or site of a transformer is watched; a forward of the transformer looks up the run it belongs to,
and each hook asks that run's row: compute and keep, fill, or gather, compute and scatter. The model's own code is never
copied, and without a run the hooks hand everything through.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import clock, streams
from .describe import Block, Carry, Description, SiteModule, is_attention
from .forward import Forward
from .run import active_runs
from .streams import Key

_forward: ContextVar[Forward | None] = ContextVar("dittocache_forward", default=None)
_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
# FLOPs of all columns by input shape; they outlive a cache, so that the next one need not count again
_costs: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[float]]] = weakref.WeakKeyDictionary()
_context: ContextVar[str | None] = ContextVar("dittocache_context", default=None)  # what a pipeline calls a branch
_lock = threading.RLock()


class Span(NamedTuple):
    """A run of blocks that is passed by as a whole; `carry` is that of the model's `Layout`."""

    blocks: list[Block]
    carry: Carry | None = None


class Attachment:
    """The hooks on one transformer, shared by all caches that use it."""

    def __init__(self, transformer: nn.Module, description: Description) -> None:
        self.transformer = weakref.ref(transformer)
        self.description = description
        # asked at every site of every forward, so they are put together once
        self.columns = description.columns
        self.first_linear = len(self.columns) - len(description.linears)
        self.output = self.first_linear - 1
        self.modules = dict(enumerate(description.entries))
        self.modules |= dict(enumerate(description.linears, self.first_linear))
        self.spans = {
            j: Span([description.blocks[n] for n in span.blocks], span.carry)
            for j, span in enumerate(description.spans, len(description.entries))
        }
        main = [stack for stack in description.stacks if stack.main]
        self.position: dict[str, int] = {}  # of the blocks that carry the sample; what serves one stands where it does
        carriers = 0
        for stack in main:
            for l, block in enumerate(description.blocks[n] for n in stack.blocks):
                carries = l >= stack.lead and bool(block.sites)
                self.position[block.name] = carriers if carries or l < stack.lead else carriers - 1
                carriers += carries
        self.position |= {b.name: carriers for b in description.blocks if b.name not in self.position}
        self.silences: dict[Any, tuple[list[Any], Any]] = {}  # what modules that feed a reused site hand on
        self.passages: dict[
            str, tuple[streams.Passage | streams.Blank, Any]
        ] = {}  # block -> how streams pass it, form of its output
        self.split = False  # whether the single linear layers are hooked as well
        self.caches: list[Any] = []
        self.aliased: set[int] = set()
        self.costs = _costs.setdefault(transformer, {})
        self.measuring = threading.Lock()
        self.watched: list[tuple[weakref.ref[nn.Module], _Hook]] = []
        self.observed = False  # whether the raw tokens are listened to
        self.compiled = any(module._compiled_call_impl is not None for module in transformer.modules())
        self.whole: Callable[..., Any] | None = None  # the transformer's forward, where that was compiled
        config = getattr(transformer, "config", None)
        either = getattr(config, "all_patch_size", (1,))
        self.patch = getattr(config, "patch_size", either[0] if len(either) == 1 else None)
        self.block_of = {j: block for block in description.blocks for j in block.sites}
        ours = [entry.site for entry in description.entries if entry.site.kind == "feed-forward"]
        self.mixing = [site.name for site in ours if not site.tokenwise]
        self.scorers = {kind: self._scorers(kind) for kind in ("attention", "cross-attention")}
        self.mates = {
            j: group for b in self.description.blocks for group in (b.sites, b.inner, b.linears) for j in group
        }

    def entry(self, j: int) -> SiteModule:
        return self.modules[j]

    def _scorers(self, kind: str) -> dict[int, int]:
        """Site -> the attention that scores its tokens: the first of its block, or of its part of the block (`audio_`)
        by the longest common beginning of their paths; a fused site has its own."""
        found: dict[int, int] = {}
        for block in self.description.blocks:
            kinds = {j: self.entry(j).site.kind for j in block.sites}
            paths = {j: self.entry(j).path for j in block.sites}
            scoring = [j for j in block.sites if kinds[j] == kind]
            if scoring:
                for j in (j for j in block.sites if kinds[j] != "attention"):
                    shared = {i: _shared(paths[i], paths[j]) for i in scoring}
                    found[j] = j if kinds[j] == kind else max(shared, key=lambda i: shared[i])
            elif kind == "attention":
                found |= {j: j for j in block.sites if kinds[j] == "fused"}
        return found

    @staticmethod
    def is_attention(module: nn.Module) -> bool:
        return is_attention(module)

    def grid(self, sample: Tensor | None) -> tuple[int, int] | None:
        """(height, width) in tokens of an image-like input [batch, channels, height, width]; None if not known."""
        if sample is None or not isinstance(self.patch, int):
            return None
        if sample.ndim == 4:
            return sample.shape[-2] // self.patch, sample.shape[-1] // self.patch
        side = int(sample.shape[1] ** 0.5) if sample.ndim == 3 else 0
        return (side, side) if side and side * side == sample.shape[1] else None

    def tokens(self, sample: Tensor | None) -> int | None:
        """How many tokens an image or video [batch, channels, (frames,) height, width] makes, or a sequence of them
        [batch, tokens, channels]; None if not known."""
        config = getattr(self.transformer(), "config", None)
        if sample is None or sample.ndim < 3:
            return None
        if sample.ndim == 3:
            return sample.shape[1]
        if getattr(config, "in_channels", sample.shape[1]) != sample.shape[1]:
            return None  # its dimensions come in another order
        sides, patch = sample.shape[2:], self.patch
        if isinstance(patch, int):
            patch = [getattr(config, "patch_size_t", None) or 1, patch, patch]
        if not isinstance(patch, (list, tuple)) or len(patch) < len(sides):
            return None
        return math.prod(side // cut for side, cut in zip(sides, patch[-len(sides) :], strict=True))

    # ---- installing -------------------------------------------------------------------------------------------------
    def install(self, transformer: nn.Module) -> None:
        if transformer._compiled_call_impl is not None:
            self.whole = torch.compile(transformer.forward)
        clock.watch_network(transformer, self, opaque=self.compiled)
        inner = {id(self.entry(j).module): j for block in self.description.blocks for j in block.inner}
        for block in self.description.blocks:
            for j in block.sites:
                self._hook(self.entry(j).module, _SiteHook, j)
                for module in self.entry(j).mutes:
                    self._hook(module, _MuteHook, (j, inner.get(id(module))))
        for n, block in enumerate(self.description.blocks):
            self._hook(block.module, _BlockHook, n)

    def split_up(self) -> None:
        """Hooks the single linear layers as well, and counts FLOPs anew: theirs were not told apart before."""
        if not self.split:
            self.split = True
            self.costs.clear()
            for j, entry in enumerate(self.description.linears, self.first_linear):
                self._hook(entry.module, _SiteHook, j)

    def observe(self, which: Any) -> None:
        """Listens to the raw tokens, if a selector scores by them."""
        if which.uses_input and not self.observed:
            self.observed = True
            for block in self.description.blocks:
                path = block.family.ff_input(block.module) if block.family.ff_input else None
                if path is not None:
                    self._hook(block.module.get_submodule(path), _InputHook, None)

    def remove(self) -> None:
        transformer = self.transformer()
        if transformer is not None:
            clock.unwatch(transformer, self)
        for reference, hook in self.watched:
            module = reference()
            if module is not None:
                clock.unwatch(module, hook)
        self.watched = []

    def _hook(self, module: nn.Module, kind: type[_Hook], target: Any) -> None:
        hook = kind(self, target)
        if self.compiled:
            # compile under the hook: the module's own forward is compiled, the decision stays outside of any graph
            hook.compiled = torch.compile(module.forward)
        self.watched.append((weakref.ref(module), hook))
        clock.watch_module(module, hook, opaque=self.compiled)

    # ---- streams ----------------------------------------------------------------------------------------------------
    def passed(self, block: Block, output: Any, arguments: dict[Key, Any]) -> None:
        """Learns the form of a block's output, and guesses how its streams pass unless that is known."""
        outputs = streams.pack(output)
        if block.reshapes:
            blank, _ = self.passages.setdefault(block.name, (streams.Blank(), streams.form_of(output)))
            blank.learn(outputs, arguments)  # type: ignore[union-attr]
            return
        if block.name in self.passages and self.passages[block.name][0].known:
            return
        alike = (
            passage
            for other in self.description.blocks
            if type(other.module) is type(block.module) and other.name in self.passages
            for passage, _ in [self.passages[other.name]]
            if passage.known and len(passage.keys) == len(outputs)
        )
        self.passages[block.name] = next(alike, None) or streams.guess(outputs, arguments), streams.form_of(output)

    def follow(self, block: Block, outputs: tuple[Tensor, ...], after: Block, arguments: dict[Key, Any]) -> None:
        """Learns from the arguments of the next block which of them the outputs of a block are."""
        passage, form = self.passages[block.name]
        seen = None if passage.known else streams.continued(outputs, arguments)
        if seen is not None:
            # other classes may take the same streams at other positions, but not under other names
            named = all(isinstance(key, str) for key in seen.keys)
            if named or type(after.module) is type(block.module):
                self.passages[block.name] = seen, form

    def passable(self, block: Block) -> bool:
        """Whether it is known how all of the block's outputs continue its inputs."""
        return block.name in self.passages and self.passages[block.name][0].whole

    # ---- the transformer's own forward ------------------------------------------------------------------------------
    @contextlib.contextmanager
    def on_context(self, name: str) -> Iterator[None]:
        """Surrounds what a pipeline calls a branch of its own."""
        token = _context.set(name)
        try:
            yield
        finally:
            _context.reset(token)

    def on_call(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for a call of the transformer: a forward of the run that is at work here, if there is one."""
        runs = [run for run in active_runs() if run.owner in self.caches and not run.ended]
        if not runs or not runs[-1].reached():
            for cache in self.caches[-1:]:
                cache.without_run()
            return original(*args, **kwargs)
        forward = Forward(self, runs[-1], args, kwargs, _context.get())
        if self.whole is not None and forward.counter is None:
            original = self.whole
        token, failed = _forward.set(forward), True
        try:
            if forward.row[self.output] is None:
                output = original(*args, **kwargs)
            else:
                output = forward.network(original, args, kwargs)
            failed = False
            return output
        finally:
            _forward.reset(token)
            forward.close(failed)


class _Hook:
    """What stands for the calls of a module within a forward; `target` says which it is of the attachment's."""

    def __init__(self, attachment: Attachment, target: Any) -> None:
        # weak, as it is reached from the module, which the attachment holds
        self.attachment, self.target = weakref.ref(attachment), target
        self.compiled: Callable[..., Any] | None = None

    def on_call(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forward = _forward.get()
        if forward is None or forward.attachment is not self.attachment():
            return original(*args, **kwargs)
        forward.plain = original
        # what is called while FLOPs are counted would never be compiled again
        counted = self.compiled is None or forward.counter is not None
        return self.handle(forward, module, original if counted else self.compiled, args, kwargs)

    def handle(self, forward: Forward, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _BlockHook(_Hook):
    def handle(self, forward: Forward, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        return forward.block(forward.attachment.description.blocks[self.target], original, args, kwargs)


class _SiteHook(_Hook):
    def handle(self, forward: Forward, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        return forward.site(self.target, original, args, kwargs)


class _MuteHook(_Hook):
    def handle(self, forward: Forward, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        site, inner = self.target
        return forward.mute((site, module, inner), original, args, kwargs)


class _InputHook(_Hook):
    def handle(self, forward: Forward, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if forward.selection is not None:
            forward.selection.raw = args[0] if forward.recipe.which.uses_input else None
        return original(*args, **kwargs)


def attach(transformer: nn.Module, cache: Any, description: Description) -> Attachment:
    """Puts a cache on a transformer, with hooks if it is the first."""
    with _lock:
        attachment = _attachments.get(transformer)
        if attachment is None:
            attachment = Attachment(transformer, description)
            try:
                attachment.install(transformer)
            except BaseException:
                attachment.remove()
                raise
            _attachments[transformer] = attachment
        attachment.caches.append(cache)
        try:
            if cache.recipe.which is not None:
                attachment.observe(cache.recipe.which)
            if any(j >= attachment.first_linear for j in cache.used):
                attachment.split_up()
        except BaseException:
            detach(transformer, cache)
            raise
        return attachment


def _shared(a: str, b: str) -> int:
    """How many letters two paths have in common from their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Call(NamedTuple):
    """One forward of a transformer: what went in, and the first tensor that came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def sample(self) -> Tensor:
        """The noisy sample that went in."""
        value = self.args[0] if self.args else self.kwargs.get("hidden_states", self.kwargs.get("sample"))
        return value  # type: ignore[return-value]


@contextlib.contextmanager
def captured(transformer: nn.Module) -> Iterator[list[Call]]:
    """Inputs and outputs of the forwards within, in order; inputs by reference, which samplers do not change."""
    calls: list[Call] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        calls.append(Call(args, dict(kwargs), first))

    handle = transformer.register_forward_hook(see, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def detach(transformer: nn.Module, cache: Any) -> None:
    """Takes a cache off a transformer; the last one takes the hooks with it."""
    with _lock:
        attachment = _attachments.get(transformer)
        if attachment is not None and cache in attachment.caches:
            attachment.caches.remove(cache)
            if not attachment.caches:
                attachment.remove()
                del _attachments[transformer]


def caches_on(transformer: nn.Module) -> list[Any]:
    """The caches that use this transformer."""
    attachment = _attachments.get(transformer)
    return list(attachment.caches) if attachment is not None else []


def foreign_cache(transformer: nn.Module) -> str | None:
    """Name of a diffusers cache that is on, or None."""
    foreign = ("pyramid_attention", "faster_cache", "fbc_", "mag_cache", "taylorseer", "text_kv", "sea_cache")
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in registry.hooks if registry is not None else ():
            if any(word in name.lower() for word in foreign):
                return str(name)
    return None
