"""What a method records from uncached runs, and what it makes of it: the interface, and the recording itself."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache import enable, wanted
from ..describe import describe
from ..fill import At, Entry, Fill
from ..methods.base import Interval, ReuseList, RouterLogits, Threshold, schedule
from ..parameters import Parameter, parameter
from ..parts import jsonable, plain
from ..plan import REUSE
from ..recipe import Recipe
from ..when import Every, When
from .setup import Setup, conditional_half, denoiser, draw
from .statistics import Statistics


class Seen(NamedTuple):
    """Output and (if asked for) input of a module, conditional rows only: [samples, tokens, channels]."""

    output: Tensor
    input: Any


See = Callable[[At, Seen, "Seen | None"], None]  # where the run stands, this step's, the step before's
CALIBRATORS: dict[str, type[Calibrator]] = {}


@dataclass(frozen=True)
class Calibrator:
    """A method's calibration: a frozen dataclass whose fields are its parameters, annotated like a method's.

    Attributes:
        method: name of the method.
        where, keeps: the sites that are recorded, and what of them, as in a recipe.
        streams: of a block's or stack's changes, that in the sample's stream alone ("main"), or all as one ("all").
        keeps_inputs: their inputs are wanted, too.
        once: every sample must be one row of one network call a step; others count what they see.
        usual: samples that are enough, as a rule.
        needs_samples: False if these parameters make a recipe of the weights alone.
    """

    method: ClassVar[str]
    where: ClassVar[str] = "module"
    keeps: ClassVar[str] = "output"
    streams: ClassVar[str] = "main"
    keeps_inputs: ClassVar[bool] = False
    once: ClassVar[bool] = True
    usual: ClassVar[int] = 64

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            CALIBRATORS[cls.method] = cls

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        hints = typing.get_type_hints(cls, include_extras=True)
        return {f.name: parameter(f.name, hints[f.name], f.default) for f in dataclasses.fields(cls)}

    @property
    def needs_samples(self) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        """Those parameters that the statistics depend on; the others may change between recording and fitting."""
        return {}

    def watch(self, pipe: Any, setup: Setup, sums: dict[str, Tensor]) -> See:
        """A function that adds what it sees of an uncached run to the sums.

        Raises:
            ValueError: parameters, model and setup do not go together; asked before anything is drawn.
        """
        raise NotImplementedError

    def recording(self, fill: Recorder) -> Recipe:
        """The all-compute recipe that shows the recorder what it is to see."""
        return Recipe(when=Every(1), where=self.where, keeps=self.keeps, fill=fill, method="none")

    def collect(self, pipe: Any, setup: Setup, samples: Sequence[int]) -> dict[str, Tensor]:
        """Draws some samples uncached, and returns the sums over them."""
        sums: dict[str, Tensor] = {}
        half = None if setup.guidance_scale <= 1 else conditional_half(pipe)
        see = self.watch(pipe, setup, sums)
        recorder = Recorder(see, self.keeps_inputs, half, len(samples), self.once, self.streams)
        with enable(pipe, self.recording(recorder)):
            draw(pipe, setup, samples)
        # a cache and its run refer to each other: what the function holds would wait for the garbage collector
        recorder.see = _nothing
        return sums

    def fit(self, statistics: Statistics, pipe: Any, setup: Setup) -> Recipe:
        """The recipe that the statistics give."""
        raise NotImplementedError


@dataclass(frozen=True)
class OnSchedule(Calibrator):
    """A calibration for corrections on top of a schedule: every interval-th step, a list of steps, or L2C's router."""

    interval: Interval = 2
    reuse_steps: ReuseList = None
    router_logits: RouterLogits = None
    threshold: Threshold = 0.1

    @property
    def schedule(self) -> dict[str, Any]:
        """The parameters that the schedule is made of."""
        return {name: getattr(self, name) for name in ("interval", "reuse_steps", "router_logits", "threshold")}

    @property
    def when(self) -> When:
        return schedule(**self.schedule)

    def reused(self, pipe: Any, num_steps: int) -> dict[str, list[int]]:
        """Site -> the steps at which the schedule reuses it.

        Raises:
            ValueError: the schedule is not one for this model or number of steps, or reuses nothing.
        """
        description = describe(denoiser(pipe))
        sites = [description.columns[j] for j in wanted(Recipe(when=self.when), description)]
        table = self.when.table(num_steps, sites)
        if not (table == REUSE).any():
            raise ValueError(f"the schedule reuses nothing in {num_steps} steps: there is nothing to calibrate")
        return {site.name: [int(k) for k in np.flatnonzero(table[:, n] == REUSE)] for n, site in enumerate(sites)}


class Recorder(Fill):
    """Shows every computed output, and that of the step before, to a function; nothing else is kept."""

    def __init__(
        self, see: See, keeps_inputs: bool, half: int | None, samples: int, once: bool, streams: str = "main"
    ) -> None:
        self.see, self.half, self.samples, self.once, self.streams = see, half, samples, once, streams
        self.keeps_inputs = keeps_inputs  # type: ignore[misc]
        self.latest: dict[str, int] = {}  # site -> the step it was seen in last

    def keep(self, entry: Entry, value: tuple[Tensor, ...], at: At) -> None:
        output = value[at.main] if self.streams == "main" else torch.cat([one.flatten(1) for one in value], dim=1)
        old = Seen(self._rows(entry.values[0][0]), self._rows(entry.inputs)) if entry.values else None
        new = Seen(self._rows(output), self._rows(at.inputs))
        if self.once and (self.latest.get(at.site.name) == at.step or len(new.output) != self.samples):
            raise ValueError(
                f"calibration needs one network call a step with one row a sample (or two: guidance); {at.site.name!r} "
                f"was called again in step {at.step}, or with {len(output)} rows for {self.samples} samples"
            )
        self.latest[at.site.name] = at.step
        self.see(at, new, old)
        # a copy: what a model changes in place would be dropped, and a change between steps be missing
        kept = output.clone() if self.once else output
        entry.values, entry.steps, entry.inputs = [(kept,)], [at.step], at.inputs

    def _rows(self, value: Any) -> Any:
        """The conditional rows of a batch that holds both halves of guidance."""
        if value is None or self.half is None or len(value) != 2 * self.samples:
            return value
        return value.chunk(2)[self.half]


def _nothing(at: At, new: Seen, old: Seen | None) -> None:
    """Sees nothing."""


def add(sums: dict[str, Tensor], name: str, value: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Adds a value to a sum, on the CPU."""
    value = value.detach().to("cpu", dtype)
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.clone()


def digest(*tensors: Tensor) -> str:
    """A short text that tells tensors apart; of types that numpy has."""
    values = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(values).hexdigest()[:16]


def make(method: str, params: Mapping[str, Any]) -> Calibrator:
    """The calibrator of a method.

    Raises:
        ValueError: the method is not calibrated, or has no such parameter, or a value is out of range.
    """
    if method not in CALIBRATORS:
        raise ValueError(f"{method!r} is not calibrated; these are: {', '.join(sorted(CALIBRATORS))}")
    known = CALIBRATORS[method].parameters()
    for name, value in params.items():
        if name not in known:
            raise ValueError(f"calibrating {method} has no parameter {name!r}; known: {', '.join(known)}")
        known[name].check(value)
    return CALIBRATORS[method](**{n: v if known[n].type == "data" else _plain(v) for n, v in params.items()})


def _plain(value: Any) -> Any:
    """A parameter's value without anything of numpy's, so that it can be written as JSON."""
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else plain(value)


def described(calibrator: Calibrator) -> dict[str, Any]:
    """Parameters as JSON values, without tensors."""
    kinds = calibrator.parameters()
    return {n: jsonable(getattr(calibrator, n)) for n, p in kinds.items() if p.type != "data"}
