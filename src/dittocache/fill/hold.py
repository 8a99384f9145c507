"""Hold: the last computed output stands in until the next."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Entry, Features, Fill


@dataclass(frozen=True)
class Hold(Fill):
    """The output of the last computed step, unchanged. What most of the papers do."""

    name = "hold"

    def keep(self, entry: Entry, value: Features, step: int) -> None:
        entry.values, entry.steps = [value], [step]

    def fill(self, entry: Entry, step: int) -> Features:
        return entry.values[0]
