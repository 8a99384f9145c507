"""The only file that touches module forwards.

Every block and every site of a transformer gets a hook of diffusers' registry; a forward of the transformer looks up
the run it belongs to, and each hook asks that run's row: compute and keep, fill, or gather, compute and scatter. The
model's own code is never copied, and without a run the hooks hand everything through.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from . import clock, streams
from .describe import Block, Description, SiteModule, is_attention
from .forward import Forward
from .run import active_runs
from .streams import Key

HOOK = "dittocache"
_forward: ContextVar[Forward | None] = ContextVar("dittocache_forward", default=None)
_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
# FLOPs of all columns by input shape; they outlive a cache, so that the next one need not count again
_costs: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[float]]] = weakref.WeakKeyDictionary()
_context: ContextVar[str | None] = ContextVar("dittocache_context", default=None)  # what a pipeline calls a branch
_lock = threading.RLock()


class Span(NamedTuple):
    """A run of blocks that is passed by as a whole."""

    blocks: list[Block]


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
            j: Span([description.blocks[n] for n in span.blocks])
            for j, span in enumerate(description.spans, len(description.entries))
        }
        trunk = [n for stack in description.stacks if stack.main for n in stack.blocks]
        self.position = {block.name: len(trunk) for block in description.blocks}
        self.position |= {description.blocks[n].name: position for position, n in enumerate(trunk)}
        self.passages: dict[
            str, tuple[streams.Passage | streams.Blank, Any]
        ] = {}  # block -> how streams pass it, form of its output
        self.split = False  # whether the single linear layers are hooked as well
        self.caches: list[Any] = []
        self.aliased: set[int] = set()
        self.costs = _costs.setdefault(transformer, {})
        self.measuring = threading.Lock()
        self.handles: list[Any] = []
        self.hooked: list[tuple[nn.Module, bool]] = []
        self.observed = False  # whether the raw tokens are listened to
        self.compiled = any(module._compiled_call_impl is not None for module in transformer.modules())
        self.patch = getattr(getattr(transformer, "config", None), "patch_size", 1)
        self.block_of = {j: block for block in description.blocks for j in block.sites}
        self.scorers = {kind: self._scorers(kind) for kind in ("attention", "cross-attention")}
        self.mates = {
            j: group for b in self.description.blocks for group in (b.sites, b.inner, b.linears) for j in group
        }

    def entry(self, j: int) -> SiteModule:
        return self.modules[j]

    def _scorers(self, kind: str) -> dict[int, int]:
        """Site -> the attention that scores its tokens: the first of its block; a fused site has its own."""
        found: dict[int, int] = {}
        for block in self.description.blocks:
            kinds = {j: self.entry(j).site.kind for j in block.sites}
            first = next((j for j in block.sites if kinds[j] == kind), None)
            if first is not None:
                found |= dict.fromkeys((j for j in block.sites if kinds[j] != "attention"), first)
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

    # ---- installing -------------------------------------------------------------------------------------------------
    def install(self, transformer: nn.Module) -> None:
        clock.watch_network(transformer, self)
        self.handles.append(transformer.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles.append(transformer.register_forward_hook(self._end, always_call=True))
        inner = {id(self.entry(j).module): j for block in self.description.blocks for j in block.inner}
        for block in self.description.blocks:
            for j in block.sites:
                self._hook(self.entry(j).module, _SiteHook(self, j))
                for module in self.entry(j).mutes:
                    self._hook(module, _MuteHook(self, (j, module, inner.get(id(module)))))
        for block in self.description.blocks:
            self._hook(block.module, _BlockHook(self, block))
        self._forget_registries()

    def split_up(self) -> None:
        """Hooks the single linear layers as well, and counts FLOPs anew: theirs were not told apart before."""
        if not self.split:
            self.split = True
            self.costs.clear()
            for j, entry in enumerate(self.description.linears, self.first_linear):
                self._hook(entry.module, _SiteHook(self, j))
            self._forget_registries()

    def observe(self, which: Any) -> None:
        """Listens to the raw tokens, if a selector scores by them."""
        if which.uses_input and not self.observed:
            self.observed = True
            for block in self.description.blocks:
                path = block.family.ff_input(block.module) if block.family.ff_input else None
                if path is not None:
                    self.handles.append(block.module.get_submodule(path).register_forward_pre_hook(self._see_input))

    def remove(self) -> None:
        transformer = self.transformer()
        if transformer is not None:
            clock.unwatch(transformer, self)
        for handle in self.handles:
            handle.remove()
        for module, fresh in self.hooked:
            registry: Any = module._diffusers_hook
            registry.remove_hook(HOOK, recurse=False)
            if fresh and not registry.hooks:
                del module._diffusers_hook
            own = module.__dict__.get("forward")
            if getattr(own, "__func__", None) is type(module).forward:
                del module.__dict__["forward"]
        self.handles, self.hooked = [], []
        self._forget_registries()

    def _hook(self, module: nn.Module, hook: _Hook) -> None:
        self.hooked.append((module, not hasattr(module, "_diffusers_hook")))
        if self.compiled:
            # compile under the hook: the module's own forward is compiled, the decision stays outside of any graph
            hook.compiled = torch.compile(module.forward)
            hook.new_forward = torch.compiler.disable(hook.new_forward)  # type: ignore[method-assign]
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)

    def _forget_registries(self) -> None:
        """diffusers remembers which children carry hooks; that list has just changed."""
        transformer = self.transformer()
        for module in transformer.modules() if transformer is not None else ():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and hasattr(registry, "_child_registries_cache"):
                registry._child_registries_cache = None

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

    def on_call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Surrounds a call of the transformer where a recipe may reuse what the whole of it returns."""
        self._begin(None, args, kwargs)
        forward = _forward.get()
        if forward is None or forward.row[self.output] is None:
            return original(*args, **kwargs)
        failed = True
        try:
            output = forward.network(original, args, kwargs)
            failed = False
            return output
        finally:
            _forward.set(None)
            forward.close(failed)

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present = _forward.get()
        if module is not None and present is not None and present.attachment is self:
            return  # begun by `on_call`
        runs = [run for run in active_runs() if run.owner in self.caches and not run.ended]
        if runs and runs[-1].reached():
            _forward.set(Forward(self, runs[-1], args, kwargs, _context.get()))
            return
        _forward.set(None)
        self.caches[-1].without_run()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = _forward.get()
        if forward is not None and forward.attachment is self and forward.row[self.output] is None:
            _forward.set(None)
            forward.close(failed=output is None)

    def _see_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        forward = _forward.get()
        if forward is not None and forward.attachment is self and forward.selection is not None:
            forward.selection.raw = args[0] if forward.recipe.which.uses_input else None


class _Hook(ModelHook):
    def __init__(self, attachment: Attachment, target: Any) -> None:
        super().__init__()
        self.attachment, self.target = attachment, target
        self.compiled: Callable[..., Any] | None = None

    def handle(self, forward: Forward) -> Callable[..., Any]:
        raise NotImplementedError

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = _forward.get()
        if forward is None or forward.attachment is not self.attachment:
            return self.fn_ref.original_forward(*args, **kwargs)
        # what is called while FLOPs are counted would never be compiled again
        counted = self.compiled is None or forward.counter is not None
        forward.plain = self.fn_ref.original_forward
        original = forward.plain if counted else self.compiled
        return self.handle(forward)(self.target, original, args, kwargs)


class _BlockHook(_Hook):
    def handle(self, forward: Forward) -> Callable[..., Any]:
        return forward.block


class _SiteHook(_Hook):
    def handle(self, forward: Forward) -> Callable[..., Any]:
        return forward.site


class _MuteHook(_Hook):
    def handle(self, forward: Forward) -> Callable[..., Any]:
        return forward.mute


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
