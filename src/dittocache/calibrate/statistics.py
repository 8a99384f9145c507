"""Sums over samples. They add up: shards can be recorded anywhere, at any time, and merged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import atomic
from ..parts import check_ints, show

FORMAT = "dittocache-statistics-1"
FILE, READABLE = "statistics.safetensors", "statistics.json"


@dataclass
class Statistics:
    """What was recorded from some samples.

    Attributes:
        method: the method that they are for.
        settings: all that they depend on apart from the samples; shards of other settings do not add up.
        samples: numbers of the samples, in order.
        sums: name -> sum over the samples; counts are among them where they are not the number of samples.
        record: how they were made: seconds, memory, versions; not compared.
    """

    method: str
    settings: dict[str, Any]
    samples: tuple[int, ...] = ()
    sums: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.sums.values())

    def sum(self, name: str) -> Tensor:
        """A sum by its name; a ValueError if it is not there."""
        if name not in self.sums:
            raise ValueError(f"these statistics are incomplete: {name!r} is missing")
        return self.sums[name]

    def add(self, sums: Mapping[str, Tensor], samples: Iterable[int]) -> None:
        """Adds what was recorded from more samples.

        Raises:
            ValueError: a sum is not finite, has another shape, or a sample is in already. Nothing is added then.
        """
        new = tuple(samples)
        twice = sorted(set(new) & set(self.samples))
        if twice or len(set(new)) < len(new):
            raise ValueError(f"sample {(twice or new)[0]} is in these statistics already")
        for name, value in sums.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"the statistics {name!r} of samples {show(list(new))} are not finite")
            if name in self.sums and self.sums[name].shape != value.shape:
                raise ValueError(
                    f"the statistics {name!r} are {list(value.shape)}, those so far {list(self.sums[name].shape)}"
                )
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.samples = tuple(sorted((*self.samples, *new)))

    def check(self, method: str, settings: Mapping[str, Any]) -> None:
        """Raises a ValueError that names the first setting in which these statistics differ."""
        if self.method != method:
            raise ValueError(f"these statistics are for {self.method!r}, not for {method!r}")
        mine, theirs = _flat(self.settings), _flat(settings)
        for name in dict.fromkeys((*mine, *theirs)):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"these statistics were recorded with {name} = {show(mine.get(name))}, not {show(theirs.get(name))}"
                )

    # ---- files ------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Writes `statistics.safetensors`, whole or not at all, and `statistics.json` for people."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "method": self.method,
            "settings": self.settings,
            "samples": list(self.samples),
            "record": self.record,
        }
        tensors = {name: t.contiguous() for name, t in self.sums.items()}
        with atomic.replacing(folder / FILE) as beside:
            save_file(tensors, beside, metadata={"dittocache": json.dumps(about)})
        (folder / READABLE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Statistics:
        """Inverse of `save`.

        Raises:
            ValueError: there are none, or the file is damaged or of another kind.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} holds no statistics: {FILE} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("dittocache", "null"))
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            if not isinstance(about, Mapping) or about.get("format") != FORMAT:
                raise ValueError("it is not of this format")
            found = cls(about["method"], about["settings"], tuple(about["samples"]), sums, about["record"])
            check_ints("samples", found.samples, 0)
            if not isinstance(found.settings, Mapping) or not isinstance(found.record, Mapping):
                raise ValueError("its settings or its record are damaged")
            if not found.samples or not sums or any(not torch.isfinite(t).all() for t in sums.values()):
                raise ValueError("it holds no samples, or values that are not finite")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is damaged, or holds no statistics: {show(str(error))}") from None
        return found


def merge(shards: Iterable[Statistics]) -> Statistics:
    """One set of statistics from several that were recorded with equal settings from different samples.

    Raises:
        ValueError: there are none, settings differ, or a sample is in two of them.
    """
    parts = list(shards)
    if not parts:
        raise ValueError("there are no statistics to merge")
    whole = Statistics(parts[0].method, parts[0].settings)
    for part in parts:
        part.check(whole.method, whole.settings)
        whole.add(part.sums, part.samples)
    whole.record = {
        **parts[0].record,
        "merged": len(parts),
        "seconds": round(sum(part.record.get("seconds", 0.0) for part in parts), 2),
        "memory": {**peak(*(part.record.get("memory", {}) for part in parts)), "statistics": whole.bytes},
    }
    return whole


def peak(*memories: Mapping[str, int]) -> dict[str, int]:
    """The largest of every figure."""
    return {name: max(memory.get(name, 0) for memory in memories) for one in memories for name in one}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: list(value) if isinstance(value, tuple) else value}
