"""What a search has found so far, on disk: a line for every result, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..parts import show

FILE = "journal.jsonl"


class Journal:
    """Results by key. A line that was being written when the process died is dropped.

    Args:
        folder: where the file is; None keeps everything in memory.
        config: everything that results depend on, JSON values.

    Raises:
        ValueError: the folder holds the journal of another configuration; the line says what differs.
    """

    def __init__(self, folder: Path | None, config: Mapping[str, Any]) -> None:
        self.path = None if folder is None else folder / FILE
        self.found: dict[str, Any] = {}
        self.config = json.loads(json.dumps(config))
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.config)

    def __call__(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of this key; computed and written if it is not there."""
        if key not in self.found:
            value = json.loads(json.dumps(compute()))
            self._write({"key": key, "value": value})
            self.found[key] = value
        return self.found[key]

    def _read(self, path: Path) -> None:
        try:
            whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
            config, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
            self.found = {line["key"]: line["value"] for line in lines}
            if not isinstance(config, (dict, type(None))):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(path)!r} is damaged: choose another folder, or delete it") from None
        if torn:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        if config is None:
            self._write(self.config)
        elif config != self.config:
            both = sorted({*config, *self.config})
            name = next(name for name in both if config.get(name) != self.config.get(name))
            raise ValueError(
                f"{str(path.parent)!r} holds a search with {name} = {show(config.get(name))}, not "
                f"{show(self.config.get(name))}: choose another folder"
            )

    def _write(self, line: Any) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
