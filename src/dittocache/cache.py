"""`enable` puts a recipe on a pipeline or a transformer; the `Cache` it returns takes it off, and tells what it did."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import clock, hooks, noise, origin
from .describe import Description, describe
from .fix import Level
from .parts import check_int, show
from .plan import COMPUTE, REUSE, Plan, Site, align
from .recipe import SPANS, Recipe, resolve
from .run import Run, active_runs
from .when import Table

# what `where` names
KINDS = {
    "module": ("attention", "cross-attention", "feed-forward", "context-feed-forward", "fused"),
    "attention": ("attention", "cross-attention"),
    "feed-forward": ("feed-forward", "context-feed-forward"),
    "linear": ("q", "k", "v", "qkv", "proj", "fc1", "fc2", "linear"),
    "block": ("block",),
    "stack": ("stack",),
    "tail": ("stack",),
    "model": ("model",),
}

_call: ContextVar[Any] = ContextVar("dittocache_call", default=None)  # the pipeline that is being called
_caches: weakref.WeakKeyDictionary[Any, list[Cache]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Report:
    """What a run did, in numbers.

    Attributes:
        compute_fraction: FLOPs done / FLOPs of the full run; 1 = nothing skipped.
        ideal_speedup: the inverse: the speed-up if time followed FLOPs.
        flops_full, flops_done: multiplications and additions of the whole run; nan before anything was measured.
        bytes_peak: largest memory of all features kept at a time, in bytes.
        kinds: share of the tokens computed, by kind of site.
        warnings: what the user should know.
    """

    recipe: str
    steps: int
    compute_fraction: float
    ideal_speedup: float
    flops_full: float
    flops_done: float
    bytes_peak: int
    kinds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "warnings": list(self.warnings), "kinds": dict(self.kinds)}

    def __str__(self) -> str:
        rows = [
            ("recipe", self.recipe),
            ("steps", str(self.steps)),
            ("compute share", f"{100 * self.compute_fraction:.1f} %"),
            ("ideal speed-up", f"{self.ideal_speedup:.2f}x"),
            ("FLOPs", f"{self.flops_done / 1e9:.2f} of {self.flops_full / 1e9:.2f} G"),
            ("features kept", f"{self.bytes_peak / 2**20:.2f} MiB"),
            *((f"  {kind}", f"{100 * share:.1f} % computed") for kind, share in self.kinds.items()),
            *(("warning", text) for text in self.warnings),
        ]
        width = max(len(label) for label, _ in rows) + 2
        return "\n".join(f"{label:<{width}}{value}" for label, value in rows)


class Cache:
    """A recipe at work on a pipeline or a transformer. Made by `enable`; as a context manager it disables itself."""

    def __init__(self, target: Any, recipe: Recipe, scheduler: Any) -> None:
        self.recipe = recipe
        self.enabled = False
        self._target = weakref.ref(target)
        self._attachments: list[hooks.Attachment] = []
        # weak, like the others: a cache that was never disabled must not keep a model's weights alive
        self._scheduler = None if scheduler is None else weakref.ref(scheduler)
        self._watched: list[weakref.ref[Any]] = []
        self._last: Run | None = None
        self._told = False
        self.description: Description
        self.used: list[int] = []

    # ---- on and off -------------------------------------------------------------------------------------------------
    def _enable(self, target: Any, transformers: list[nn.Module], found: list[Description], used: list[int]) -> None:
        self.used = used
        try:
            for transformer, description in zip(transformers, found, strict=True):
                self._attachments.append(hooks.attach(transformer, self, description))
        except BaseException:
            self._detach()
            raise
        self.description = self._attachments[0].description
        if target not in transformers:
            clock.watch_call(target, self)
            self._watched.append(weakref.ref(target))
        if self.scheduler is not None:
            self._watch(self.scheduler)
        self.enabled = True
        _caches.setdefault(target, []).append(self)

    def disable(self) -> None:
        """Takes the cache off; the model and its scheduler are as they were before. Doing it twice does no harm."""
        if not self.enabled:
            return
        self.enabled = False
        for run in active_runs():
            if run.owner is self:
                run.close()
        self._unwatch(self._watched)
        self._detach()
        target = self._target()
        if target is not None and self in _caches.get(target, []):
            _caches[target].remove(self)

    def _detach(self) -> None:
        for attachment in self._attachments:
            transformer = attachment.transformer()
            if transformer is not None:
                hooks.detach(transformer, self)

    def number(self, attachment: hooks.Attachment) -> int:
        """Which of the target's networks this is, counted from 0."""
        return self._attachments.index(attachment)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    # ---- the clock's listener ---------------------------------------------------------------------------------------
    @property
    def scheduler(self) -> Any:
        """The scheduler that `enable` was given or found on the pipeline; None without one."""
        return None if self._scheduler is None else self._scheduler()

    def _watch(self, scheduler: Any) -> None:
        clock.watch_scheduler(scheduler, self)
        self._watched.append(weakref.ref(scheduler))

    def _unwatch(self, references: list[weakref.ref[Any]]) -> None:
        for reference in list(references):
            if reference() is not None:
                clock.unwatch(reference(), self)
            self._watched.remove(reference)

    @contextlib.contextmanager
    def calling(self, pipeline: Any) -> Iterator[None]:
        """Surrounds a call of the pipeline: its present scheduler is watched, and the run ends with the call."""
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None and self not in clock.listeners(scheduler):
            self._unwatch([watched for watched in self._watched if watched() is not pipeline])
            self._watch(scheduler)
        before, watched = active_runs(), list(self._watched)
        token, call = clock.copies.set(self._watch), _call.set(pipeline)
        try:
            yield
        finally:
            clock.copies.reset(token)
            _call.reset(call)
            self._unwatch([copied for copied in self._watched if copied not in watched])
            for run in active_runs():
                if run.owner is self and run not in before:
                    run.close()

    def on_begin(self, scheduler: Any) -> None:
        """A run begins; whatever an earlier one left behind is forgotten. Its first forward settles how long it is."""
        for run in active_runs():
            if run.owner is self:
                run.close()
        Run(self, functools.partial(self._settle, scheduler=scheduler)).__enter__()

    def on_scale(self, scheduler: Any, timestep: Any) -> None:
        """Image-to-image runs begin in the middle; with schedulers that have no begin index, only this tells where."""
        run = self._current()
        if run is not None and run.begin is not None:
            run.first = timestep

    def _settle(self, run: Run, scheduler: Any) -> None:
        """How many steps the scheduler will be asked for, of all that it has, and which.

        Its pipeline says so, except where it goes through them several times (in tiles, say).
        """
        timesteps = [float(t) for t in scheduler.timesteps]
        pipeline = _call.get() if _call.get() is self._target() else None
        steps = getattr(pipeline, "num_timesteps", len(timesteps))
        first = getattr(scheduler, "begin_index", None) or 0
        if run.first is not None and not first:
            at = [k for k, t in enumerate(timesteps) if t == float(run.first)]
            first = max([k for k in at if k + steps <= len(timesteps)], default=min(at, default=0))
        # those that are stepped by copies of their scheduler only may go on for longer
        if steps > len(timesteps) - first and getattr(pipeline, "scheduler", scheduler) is scheduler:
            steps = len(timesteps) - first
        self._start(run, steps, timesteps[first : first + steps] if first + steps <= len(timesteps) else None)

    def on_prediction(self, scheduler: Any, prediction: Any, timestep: Any, sample: Any) -> Any:
        """Applies the recipe's fix to the noise in a prediction; predicted variances pass unchanged."""
        run = self._current()
        if run is None or self.recipe.fix is None:
            return prediction
        kind = noise.prediction_type(scheduler)
        rest = prediction.shape[1] != sample.shape[1]
        predicted, variance = prediction.chunk(2, dim=1) if rest else (prediction, None)
        if kind == "epsilon":
            fixed = self.fix(predicted)
        else:
            k = int((scheduler.timesteps - torch.as_tensor(timestep).to(scheduler.timesteps)).abs().argmin())
            run.levels = run.levels or noise.levels(scheduler)
            alpha, sigma = (level[k] for level in run.levels)
            if alpha == 0:  # nothing but noise: no prediction can tell it better
                run.fixed = True
                return prediction
            scales = hasattr(scheduler, "scale_model_input")  # flow matching has none
            x = scheduler.scale_model_input(sample, timestep) if scales else sample
            fixed = self.fix(noise.to_noise(predicted, x, alpha, sigma, kind))
            fixed = noise.from_noise(fixed, x, alpha, sigma, kind)
        return fixed if variance is None else torch.cat([fixed, variance], dim=1)

    def fix(self, predicted_noise: Tensor) -> Tensor:
        """The recipe's correction of the present step's noise prediction, for raw loops; after guidance.

        With a scheduler this happens by itself, in `scheduler.step`.

        Args:
            predicted_noise: any shape, without predicted variances.

        Raises:
            RuntimeError: no run is open in this context.
        """
        run = self._current()
        if run is None:
            raise RuntimeError("no run is open here: call cache.fix(noise) inside `with cache.run(num_steps):`")
        run.fixed = True
        if self.recipe.fix is None:
            return predicted_noise
        k = min(run.step_index or 0, run.num_steps - 1)
        calls = run.calls[k].sum()
        share = float(run.shares[k].sum() / calls) if calls else COMPUTE
        trained = getattr(getattr(self.scheduler, "config", None), "num_train_timesteps", 1000)
        time = 1 - k / run.num_steps if run.timesteps is None else run.timesteps[k] / trained
        return self.recipe.fix.fix(predicted_noise, Level(k, run.num_steps, time, share))

    def on_step(self, scheduler: Any, latents: Any) -> None:
        """A step is over once the next forward begins: some pipelines step their scheduler twice, or copies of it too.

        The last one ends the run.
        """
        run = self._current()
        if run is not None and run.step_index is not None:
            run.over = True
            if run.step_index == run.num_steps - 1:
                run.close()
        elif run is not None and (pipeline := _call.get()) is not None and pipeline is self._target():
            run.note(
                f"a step of {type(pipeline).__name__} did not call its cached {self.description.model}: this run "
                "is not cached; if that was replaced, call dittocache.enable again"
            )

    def _current(self) -> Run | None:
        return next((run for run in reversed(active_runs()) if run.owner is self), None)

    # ---- runs -------------------------------------------------------------------------------------------------------
    def _start(self, run: Run, num_steps: int, timesteps: Sequence[float] | None) -> Run:
        for transformer in (attachment.transformer() for attachment in self._attachments):
            if transformer is not None:
                _check_alone(transformer)
        origin.check_run(self.recipe.made_for, num_steps, timesteps)
        run.settle(num_steps, timesteps)
        self._last = run
        return run

    def run(self, num_steps: int, timesteps: Sequence[float] | None = None) -> Run:
        """An explicit clock for a raw loop: `with cache.run(T) as run: ... run.step(i)` (or `cache.step(i)`).

        Args:
            num_steps: T, number of steps.
            timesteps: the timestep of every step, for the trace; optional.

        Raises:
            ValueError: T is not a whole number of 1 or more, or does not fit the timesteps or the recipe's plan.
            RuntimeError: the cache was disabled.
        """
        check_int("num_steps", num_steps, 1)
        if timesteps is not None and len(timesteps) != num_steps:
            raise ValueError(f"{len(timesteps)} timesteps were given for {num_steps} steps")
        if not self.enabled:
            raise RuntimeError("this cache was disabled; call dittocache.enable again")
        return self._start(Run(self), num_steps, timesteps)

    def step(self, i: int, branch: int = 0) -> None:
        """Step i of the explicit run begins; call it before the forward of that step.

        Raises:
            RuntimeError: no explicit run is open in this context.
            ValueError: i or branch is out of range.
        """
        run = self._current()
        if run is None:
            raise RuntimeError("no run is open here: call cache.step(i) inside `with cache.run(num_steps):`")
        run.step(i, branch)

    def without_run(self) -> None:
        """A forward outside of any run: an error where nothing could ever begin one, else said once."""
        if not self._watched:
            raise RuntimeError(
                "the cache does not know where the sampling run stands: pass scheduler=... to dittocache.enable, or "
                "wrap the loop in `with cache.run(num_steps):` and call `cache.step(i)` before the forward of step i"
            )
        if not self._told:
            self._told = True
            warnings.warn(
                "dittocache: a forward outside of any run was computed without caching; a run begins with the "
                "scheduler's set_timesteps, or with `with cache.run(num_steps):`",
                stacklevel=2,
            )

    # ---- results ----------------------------------------------------------------------------------------------------
    def flops(self, key: Any, used: list[int], branches: int) -> tuple[tuple[float, ...] | None, float]:
        """FLOPs measured for inputs of that shape: of the used sites, and of the rest, for all branches of a step.

        What is inside of another used site is counted there only if it has no column of its own.
        """
        attachment = next((one for one in self._attachments if key in one.costs), None)
        if attachment is None:
            return None, 0.0
        costs, spent = attachment.costs[key], {}
        inside = dict.fromkeys((block.name for block in self.description.blocks), 0.0)  # of a block, in used columns
        for block in self.description.blocks:
            # in a U-Net, blocks lie within blocks
            around = [block.name, *(name for name in inside if not block.spans and block.name.startswith(f"{name}."))]
            for j in block.sites + block.inner + block.linears:
                if j in used:
                    spent[j] = costs[j]
                    for name in around:
                        inside[name] += costs[j]
        head = self.recipe.when.head
        for j in sorted((j for j in attachment.spans if j in used), reverse=True):  # single blocks before their stacks
            spent[j] = 0.0
            for block in attachment.spans[j].blocks:
                if attachment.position[block.name] >= head:
                    spent[j] += costs[block.spans[-1]] - inside[block.name]
                    inside[block.name] = costs[block.spans[-1]]
        if attachment.output in used:
            spent[attachment.output] = costs[attachment.output] - sum(spent.values())
        columns = tuple(max(spent[j], 0.0) * branches for j in used)
        return columns, max(costs[attachment.output] * branches - sum(columns), 0.0)

    @property
    def trace(self) -> Plan:
        """The plan that the last run really followed.

        Raises:
            RuntimeError: nothing has run yet.
        """
        return self._last_run().trace()

    def _last_run(self) -> Run:
        if self._last is None:
            raise RuntimeError("nothing has run yet: the trace is that of the last run")
        return self._last

    def report(self) -> Report:
        """The last run in numbers.

        Raises:
            RuntimeError: nothing has run yet.
        """
        run = self._last_run()
        trace = run.trace()
        return Report(
            recipe=self.recipe.describe(),
            steps=len(trace.steps),
            compute_fraction=trace.compute_fraction,
            ideal_speedup=trace.ideal_speedup,
            flops_full=trace.flops_full,
            flops_done=trace.flops_done,
            bytes_peak=run.bytes_peak,
            kinds=trace.share_by_kind(),
            warnings=tuple(run.notes),
        )


def _meant(where: str, site: Site) -> bool:
    """Whether a site is one of those that `where` names; a lone block is its stack."""
    if where in KINDS:
        return site.kind in KINDS[where] or (where == "block" and site.kind == "stack" and site.depth == 1)
    return fnmatch.fnmatchcase(site.name, where)


def wanted(recipe: Recipe, description: Description) -> list[int]:
    """Indices of the sites that a recipe works on.

    Raises:
        ValueError: none of the model's sites fits, or the recipe asks for what these sites cannot give.
    """
    columns = description.columns
    beside = {span.site.name for span in description.spans if not span.main} if recipe.where in SPANS else set()
    if recipe.where == "module":  # in blocks with a fused site, that is the module
        beside = {columns[j].name for block in description.blocks for j in block.inner}
    used = [j for j, site in enumerate(columns) if _meant(recipe.where, site) and site.name not in beside]
    if not used:
        kinds = ", ".join(dict.fromkeys(site.kind for site in columns))
        alike = [site.name for site in columns if site.name.split(".")[0] == recipe.where.split(".")[0]]
        names = f"{alike[0]!r} to {alike[-1]!r}" if alike else repr(columns[0].name)
        has = f"it has: {kinds}" if recipe.where in KINDS else f"its sites have names like {names}"
        if recipe.where.startswith("deep.") and not any(site.kind == "deep" for site in columns):
            has = "it has no skip branches, as U-Nets have"
        raise ValueError(f"where={recipe.where!r} matches no site of {description.model}; {has}")
    if recipe.when.uses_stack:
        used = [j for j, site in enumerate(columns) if j in used or site.kind == "stack"]
    if isinstance(recipe.when, Table):
        plan = recipe.when.plan
        table = align(plan, columns)
        used = [j for j, site in enumerate(columns) if site.name in plan.sites]
        for name in set(plan.fills or ()) - {recipe.fill.name}:
            raise ValueError(f"the plan names the fill {name!r}, but the recipe's fill is {recipe.fill.name!r}")
        for j, site in enumerate(columns):
            some = ((table[:, j] > REUSE) & (table[:, j] < COMPUTE)).any()
            if some and not (recipe.which is not None and recipe.which.selects(site)):
                raise ValueError(f"the plan computes some tokens of {site.name!r}, but it is not token-wise, or text")
    recipe.when.fits([columns[j] for j in used])
    foreign = sorted(recipe.fill.names() - {columns[j].name for j in used})
    if foreign:
        raise ValueError(
            f"the {recipe.fill.name} of the recipe is for {foreign[0]!r}, which is no site that "
            f"where={recipe.where!r} finds in {description.model}"
        )
    if recipe.which is not None:
        chosen = {site.order for site in columns if recipe.which.selects(site)}
        if not chosen:
            joined = any(site.kind == "fused" and site.tokenwise for site in columns)
            why = "they do not lie as [batch, tokens, channels], or the image's cannot be told from the text's"
            if joined:
                why = "select_text=True lets it choose in blocks that hold image and text as one"
            raise ValueError(f"{description.model} has no token-wise feed-forward to compute some tokens of: {why}")
        scored_by = (recipe.which.scored_by, "fused") if recipe.which.observes else ()
        if scored_by and not chosen & {site.order for site in columns if site.kind in scored_by}:
            raise ValueError(
                f"selector {recipe.which.name!r} needs {scored_by[0]} modules; {description.model} has none beside "
                "feed-forwards that compute some tokens"
            )
    return used


def enable(target: Any, recipe: Any, *, scheduler: Any = None, **params: Any) -> Cache:
    """Puts a caching method on a pipeline or a transformer, in place of what was on.

    Args:
        target: a diffusers pipeline, or a bare transformer.
        recipe: a method's name (see `methods()`), a `Recipe`, a `Plan`, or the folder or Hub id of a saved recipe.
        scheduler: for a bare transformer, the scheduler whose `set_timesteps` and `step` tell where the run stands;
            without one, use `with cache.run(num_steps):`.
        params: parameters of the method.

    Returns:
        The `Cache`: `disable()`, `run`, `step`, `trace`, `report()`.

    Raises:
        ValueError: unknown method or parameter, a bad value, or a recipe that this model cannot follow.
        TypeError: the target is neither a pipeline nor a module.
        RuntimeError: a diffusers cache is already on.

    Nothing is changed unless everything fits.
    """
    chosen = resolve(recipe, **params)
    transformers = transformers_of(target)
    if scheduler is None and target not in transformers:
        scheduler = getattr(target, "scheduler", None)
    has_clock = hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step") and not isinstance(scheduler, type)
    if scheduler is not None and not has_clock:
        raise TypeError(f"a scheduler is an object with set_timesteps and step; got {show(scheduler)}")
    for transformer in transformers:
        _check(transformer)
    origin.check_model(chosen.made_for, transformers[0], scheduler)
    found = [describe(transformer) for transformer in transformers]
    if any(other.columns != found[0].columns for other in found):
        names = " and ".join(description.model for description in found)
        raise ValueError(f"{names} of this pipeline have different sites: enable each of them on its own")
    used = wanted(chosen, found[0])
    replaced = list(_caches.get(target, []))
    if target in transformers and scheduler is not None:
        replaced = [old for old in replaced if old.scheduler in (None, scheduler)]
    for transformer in transformers:
        replaced += [
            old
            for old in hooks.caches_on(transformer)
            if old.scheduler is scheduler is not None and old not in replaced
        ]
    for old in replaced:
        old.disable()
    cache = Cache(target, chosen, scheduler)
    cache._enable(target, transformers, found, used)
    return cache


def _check_alone(transformer: nn.Module) -> None:
    """Raises an error if a transformer has a cache of diffusers, which would skip blocks of its own."""
    foreign = hooks.foreign_cache(transformer)
    if foreign is not None:
        raise RuntimeError(f"a diffusers cache is already on ({foreign}); call transformer.disable_cache() first")


def _check(transformer: nn.Module) -> None:
    """Raises an error if a transformer cannot be cached as it stands."""
    _check_alone(transformer)
    # accelerate has the weights of what it hooks elsewhere, and brings them when they are needed
    here = (module for module in transformer.modules() if not hasattr(module, "_hf_hook"))
    if any(p.is_meta for module in here for p in module.parameters(recurse=False)):
        raise ValueError(f"{type(transformer).__name__} has parameters on the meta device: load its weights first")


def disable(target: Any) -> None:
    """Takes every cache off a pipeline or transformer that `enable` was called with. Harmless if none is on."""
    for cache in list(_caches.get(target, [])) if _is_target(target) else ():
        cache.disable()


def _is_target(target: Any) -> bool:
    return isinstance(target, nn.Module) or hasattr(target, "components")


def transformers_of(target: Any) -> list[nn.Module]:
    """The denoiser of a pipeline, or both of them where noise levels are shared out, or the module itself."""
    if isinstance(target, nn.Module):
        return [target]
    if not hasattr(target, "components"):
        raise TypeError(f"enable needs a diffusers pipeline or a torch module; got {type(target).__name__}")
    for names in (("transformer", "transformer_2"), ("unet",)):
        modules = [getattr(target, name, None) for name in names]
        if any(isinstance(module, nn.Module) for module in modules):
            return [module for module in modules if isinstance(module, nn.Module)]
    raise ValueError(f"{type(target).__name__} has neither a transformer nor a unet: nothing to cache")
