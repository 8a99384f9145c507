"""What is shared out: a task, its samples in shards, and what a shard gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..parts import check_int


@dataclass(frozen=True)
class Results:
    """What a shard gave. Everything but `timing` is the same, byte for byte, whoever computed it.

    Args:
        table: columns of one length, numbers or texts.
        arrays: whatever is too large for a table, by name.
        facts: JSON values about the whole shard.
        timing: JSON values that differ from run to run: seconds, names of machines.
    """

    table: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Work on numbered samples. It is pickled for every worker, and opened there once.

    Results may depend on `config()` and on the samples of the shard, and on nothing else: not on other shards, not on
    the worker, not on global random states.
    """

    def config(self) -> dict[str, Any]:
        """Everything that results depend on, as JSON values; callable before `open`."""

    def open(self) -> None:
        """Loads what `run` needs, once for every worker."""

    def run(self, samples: Sequence[int]) -> Results:
        """The results of some samples."""


class Shard(NamedTuple):
    """A number of samples that are always computed together."""

    number: int
    samples: tuple[int, ...]


def plan(samples: int | Sequence[int], size: int) -> list[Shard]:
    """Cuts samples (their numbers, or how many: 0, 1, 2, ...) into shards of one size; the last may be smaller.

    Raises:
        ValueError: there are none, one occurs twice, or the size is below 1.
    """
    check_int("the size of a shard", size, 1)
    numbers = list(range(samples)) if isinstance(samples, int) else list(samples)
    if not numbers:
        raise ValueError("there are no samples: 1 or more are needed")
    if len(set(numbers)) != len(numbers):
        raise ValueError("a sample occurs twice: every number must be given once")
    return [Shard(n, tuple(numbers[at : at + size])) for n, at in enumerate(range(0, len(numbers), size))]
