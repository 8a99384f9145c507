"""Where a sampling run stands: which step, of how many.

Pipelines do not tell a cache where they are, but every one of them calls `scheduler.set_timesteps` once before a run
and `scheduler.step` once after every step. Observing these two on the scheduler works with any pipeline and any loop.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

_lock = threading.RLock()
# what is told of the copies that a pipeline makes of its scheduler during a call: some step those instead
copies: ContextVar[Callable[[Any], None] | None] = ContextVar("dittocache_copies", default=None)
_observed: dict[tuple[type, tuple[str, ...]], type] = {}
_listeners: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


class Listener(Protocol):
    """What a clock calls."""

    def on_begin(self, scheduler: Any) -> None:
        """A new run begins: the scheduler has its timesteps."""

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        """A step's prediction is about to be handed to the scheduler; returns it, corrected or not."""

    def on_scale(self, scheduler: Any, timestep: Any) -> None:
        """The input of this timestep's forward is being made."""

    def on_step(self, scheduler: Any) -> None:
        """A step is over."""


def watch_scheduler(scheduler: Any, listener: Listener) -> None:
    """Lets `listener` hear of `set_timesteps`, `scale_model_input` and `step` of this scheduler, until `unwatch`."""
    _watch(
        scheduler, listener, {"set_timesteps": _set_timesteps, "scale_model_input": _scale_model_input, "step": _step}
    )


def watch_call(pipeline: Any, listener: Any) -> None:
    """Lets `listener.calling(pipeline)`, a context manager, surround every call of this pipeline object."""
    _watch(pipeline, listener, {"__call__": _call})


def watch_network(module: Any, listener: Any) -> None:
    """Lets `listener.on_call(original, args, kwargs)` stand for every call of this module, and `on_context(name)`
    surround its `cache_context`, with which diffusers' pipelines name guidance branches, until `unwatch`."""
    _watch(module, listener, {"__call__": _forward, "cache_context": _cache_context})


def unwatch(target: Any, listener: Any) -> None:
    """Undoes a watch; the last one gives the object its own class back."""
    with _lock:
        left = [one for one in _listeners.get(target, []) if one is not listener]
        if left:
            _listeners[target] = left
        elif target in _listeners:
            del _listeners[target]
            if type(target) in _observed.values():
                object.__setattr__(target, "__class__", type(target).__mro__[1])


def listeners(target: Any) -> list[Any]:
    return list(_listeners.get(target, ()))


def _watch(target: Any, listener: Any, methods: dict[str, Callable[[Any], Any]]) -> None:
    with _lock:
        _listeners.setdefault(target, []).append(listener)
        if type(target) in _observed.values():
            return
        cls = type(target)
        key = (cls, tuple(name for name in methods if hasattr(cls, name)))
        if key not in _observed:
            # bears the class's own name, so that saving a pipeline while a cache is on writes the right names
            namespace: dict[str, Any] = {name: methods[name](getattr(cls, name)) for name in key[1]}
            namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
            namespace["__reduce_ex__"] = _reduce
            metaclass: Any = type(cls)
            _observed[key] = metaclass(cls.__name__, (cls,), namespace)
        object.__setattr__(target, "__class__", _observed[key])


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class: they are not watched, but for those a pipeline makes in a call."""
    plain: Any = type(self).__mro__[1]
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
            listener.on_step(self)
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


def _forward(method: Any) -> Any:
    @functools.wraps(method)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        heard = listeners(self)
        original = functools.partial(method, self)
        return heard[0].on_call(original, args, kwargs) if heard else original(*args, **kwargs)

    return __call__


def _cache_context(method: Any) -> Any:
    @functools.wraps(method)
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for listener in listeners(self):
                stack.enter_context(listener.on_context(name))
            yield stack.enter_context(method(self, name, **kwargs))

    return cache_context
