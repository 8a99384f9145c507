"""Hold: the last computed output stands in until the next."""

from __future__ import annotations

from dataclasses import dataclass

from .base import At, Entry, Features, Fill


@dataclass(frozen=True)
class Hold(Fill):
    """The output of the last computed step, unchanged. What most of the papers do."""

    name = "hold"
    depth = 1

    def keep(self, entry: Entry, value: Features, at: At) -> None:
        entry.values, entry.steps = [value], [at.step]

    def fill(self, entry: Entry, at: At) -> Features:
        return entry.values[0]
