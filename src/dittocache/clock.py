"""Where a sampling run stands: which step, of how many.

Pipelines do not tell a cache where they are, but every one of them calls `scheduler.set_timesteps` once before a run
and `scheduler.step` once after every step. Observing these two on the scheduler works with any pipeline and any loop.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch

_lock = threading.RLock()
# what is told of the copies that a pipeline makes of its scheduler during a call: some step those instead
copies: ContextVar[Callable[[Any], None] | None] = ContextVar("dittocache_copies", default=None)
# the watched module that is being called, until it asks for its forward
_calling: ContextVar[Any] = ContextVar("dittocache_calling", default=None)
_observed: dict[tuple[type, tuple[Any, ...]], type] = {}
_listeners: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


class Listener(Protocol):
    """What a clock calls."""

    def on_begin(self, scheduler: Any) -> None:
        """A new run begins: the scheduler has its timesteps."""

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        """A step's prediction is about to be handed to the scheduler; returns it, corrected or not."""

    def on_scale(self, scheduler: Any, timestep: Any) -> None:
        """The input of this timestep's forward is being made."""

    def on_step(self, scheduler: Any, latents: Any) -> None:
        """A step is over; the pipeline goes on with these latents."""


class Enough(Exception):
    """Raised by a listener, ends the run: it has seen what it wanted. Whoever began the run suppresses it."""


class Silent:
    """A listener that changes nothing, to be sub-classed."""

    def on_begin(self, scheduler: Any) -> None: ...

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        return prediction

    def on_scale(self, scheduler: Any, timestep: Any) -> None: ...

    def on_step(self, scheduler: Any, latents: Any) -> None: ...


ListenerType = TypeVar("ListenerType", bound=Listener)


@contextlib.contextmanager
def observed(scheduler: Any, listener: ListenerType) -> Iterator[ListenerType]:
    """The listener hears of this scheduler within."""
    watch_scheduler(scheduler, listener)
    try:
        yield listener
    finally:
        unwatch(scheduler, listener)


def watch_scheduler(scheduler: Any, listener: Listener) -> None:
    """Lets `listener` hear of `set_timesteps`, `scale_model_input` and `step` of this scheduler, until `unwatch`."""
    _watch(
        scheduler, listener, {"set_timesteps": _set_timesteps, "scale_model_input": _scale_model_input, "step": _step}
    )


def watch_call(pipeline: Any, listener: Any) -> None:
    """Lets `listener.calling(pipeline)`, a context manager, surround every call of this pipeline object."""
    _watch(pipeline, listener, {"__call__": _call})


def watch_network(module: Any, listener: Any, opaque: bool = False) -> None:
    """Like `watch_module`; `listener.on_context(name)` surrounds the module's `cache_context`, with which diffusers'
    pipelines name guidance branches."""
    _watch(module, listener, {**_calls(opaque), "cache_context": _cache_context})


def watch_module(module: Any, listener: Any, opaque: bool = False) -> None:
    """Lets `listener.on_call(module, original, *args, **kwargs)` stand for every forward of this module, until
    `unwatch`.

    Inside of the module's own hooks, and outside of its forward, whoever has wrapped that or will. If `opaque`,
    compilers do not look inside, and if the module was compiled, the original is not.
    """
    _watch(module, listener, _calls(opaque))


def _calls(opaque: bool) -> dict[str, Callable[[Any], Any]]:
    return {"__call__": _opaque_call if opaque else _module_call, "forward": _Forward}


def unwatch(target: Any, listener: Any) -> None:
    """Undoes a watch; the last one gives the object its own class back."""
    with _lock:
        left = [one for one in _listeners.get(target, []) if one is not listener]
        if left:
            _listeners[target] = left
        elif target in _listeners:
            del _listeners[target]
            if is_watched(target):
                object.__setattr__(target, "__class__", _plain(type(target)))


def listeners(target: Any) -> list[Any]:
    return list(_listeners.get(target, ()))


def is_watched(target: Any) -> bool:
    return _plain(type(target)) is not type(target)


def _plain(cls: Any) -> Any:
    """What a class of watched objects is made of; other classes are that themselves."""
    return vars(cls).get("_dittocache_plain", cls)


@functools.cache
def _alike(metaclass: type) -> Any:
    """A metaclass of classes that equal what they are made of: diffusers compares types, and keeps tables of them."""
    methods = {
        "__eq__": lambda one, other: isinstance(other, type) and _plain(one) is _plain(other),
        "__hash__": lambda one: hash(_plain(one)),
    }
    return type(metaclass.__name__, (metaclass,), methods)


def _watch(target: Any, listener: Any, methods: dict[str, Callable[[Any], Any]]) -> None:
    with _lock:
        _listeners.setdefault(target, []).append(listener)
        if is_watched(target):
            return
        cls: Any = type(target)
        there = {name: make for name, make in methods.items() if hasattr(cls, name)}
        key = cls, tuple(there.values())
        if key not in _observed:
            # bears the class's own name, so that saving a pipeline while a cache is on writes the right names
            namespace: dict[str, Any] = {name: make(getattr(cls, name)) for name, make in there.items()}
            namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
            namespace |= {"__reduce_ex__": _reduce, "_dittocache_plain": cls}
            metaclass: type = type(cls)
            _observed[key] = _alike(metaclass)(cls.__name__, (cls,), namespace)
        object.__setattr__(target, "__class__", _observed[key])


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class: they are not watched, but for those a pipeline makes in a call."""
    plain = _plain(type(self))
    function, args, *rest = plain.__reduce_ex__(self, protocol)
    if function is getattr(copyreg, "__newobj__"):  # noqa: B009  pickle insists on the object's own class there
        function = _new
    return function, tuple(plain if a is type(self) else a for a in args), *rest


def _new(cls: Any, *args: Any) -> Any:
    new = cls.__new__(cls, *args)
    watch = copies.get()
    if watch is not None and hasattr(cls, "set_timesteps"):
        watch(new)
    return new


def _set_timesteps(method: Any) -> Any:
    @functools.wraps(method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for listener in listeners(self):
            listener.on_begin(self)
        return result

    return set_timesteps


def _scale_model_input(method: Any) -> Any:
    @functools.wraps(method)
    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        timestep = args[0] if args else kwargs.get("timestep")
        for listener in listeners(self):
            listener.on_scale(self, timestep)
        return method(self, sample, *args, **kwargs)

    return scale_model_input


def _step(method: Any) -> Any:
    # pipelines look at the signature of `step` to see what it takes; `wraps` keeps it visible
    @functools.wraps(method)
    def step(self: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        heard = listeners(self)
        timestep = args[0] if args else kwargs.get("timestep")
        sample = args[1] if len(args) > 1 else kwargs.get("sample")
        for listener in heard:
            model_output = listener.on_prediction(self, model_output, timestep, sample)
        result = method(self, model_output, *args, **kwargs)
        for listener in heard:
            listener.on_step(self, result[0])
        return result

    return step


def _call(method: Any) -> Any:
    @functools.wraps(method)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        heard = listeners(self)
        if not heard:
            return method(self, *args, **kwargs)
        with heard[0].calling(self):
            return method(self, *args, **kwargs)

    return __call__


def _module_call(method: Any) -> Any:
    @functools.wraps(method)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _calling.set(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            _calling.reset(token)

    return __call__


class _Forward:
    """The `forward` of watched modules: with its listeners for the call of the module itself, plain for all others.

    It goes before what others store in the module under that name, so wrappers may come and go below it.
    """

    def __init__(self, method: Any) -> None:
        pass  # the plain class is asked every time: its forward may be replaced

    def __set_name__(self, owner: Any, name: str) -> None:
        self.plain = _plain(owner)

    def __get__(self, module: Any, owner: Any) -> Any:
        if module is None:
            return self.plain.forward
        call = module.__dict__.get("forward") or types.MethodType(self.plain.forward, module)
        if _calling.get() is module:
            _calling.set(None)
            for listener in listeners(module):
                call = functools.partial(listener.on_call, module, call)
        return call

    def __set__(self, module: Any, forward: Any) -> None:
        module.__dict__["forward"] = forward

    def __delete__(self, module: Any) -> None:
        del module.__dict__["forward"]


def _opaque_call(method: Any) -> Any:
    def uncompiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    return torch.compiler.disable(_module_call(functools.wraps(method)(uncompiled)))


def _cache_context(method: Any) -> Any:
    @functools.wraps(method)
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for listener in listeners(self):
                stack.enter_context(listener.on_context(name))
            yield stack.enter_context(method(self, name, **kwargs))

    return cache_context
