"""Results on disk. A shard is three files:

- `shard-00000.safetensors`: its arrays;
- `shard-00000.parquet`: its table, and in the metadata the facts;
- `shard-00000.json`: its timing, the only thing that differs from run to run; its samples, and the digests of all. It
  is written last, and makes the shard count.

Every file is written under another name, forced to the disk and then renamed. All bear the hash of the configuration,
which `work.json` tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic
from .task import Results, Shard

FORMAT = "dittocache-work-1"
CONFIG, KEY = "work.json", "dittocache"
SHOWN = 3  # differences that a message names


class Folder:
    """The results of one configuration.

    Args:
        path: the folder; `begin` makes it.
        config: what results depend on, as JSON values.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config = json.loads(_json(config))
        self.hash = _digest(_json(config).encode())

    # ---- the whole folder -------------------------------------------------------------------------------------------
    def begin(self, shards: Sequence[Shard]) -> None:
        """Makes the folder ready: checks whose it is, and removes damaged shards so that they are done again.

        Raises:
            ValueError: it holds results of another configuration; one line that says what differs.
            OSError: it cannot be written.
            ImportError: pyarrow is missing.
        """
        if importlib.util.find_spec("pyarrow") is None:
            raise ImportError("shards need pyarrow: pip install 'dittocache[eval]'")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock("work", wait=True):
            if (self.path / CONFIG).exists():
                self._compare()
            else:
                self._write(CONFIG, _json({"format": FORMAT, "config": self.config}, indent=1).encode())
        for shard in shards:
            with self.claim(shard) as mine:  # somebody else's is being written
                if mine and self.done(shard) and not self._sound(shard):
                    self._file(shard, "json").unlink()

    def _compare(self) -> None:
        try:
            found = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError
            theirs = found["config"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path / CONFIG} is damaged, or of another format: give another folder") from None
        if theirs != self.config:
            raise ValueError(
                f"{self.path} holds shards of another configuration: {_differences(theirs, self.config)}; "
                "give another folder, or the same options"
            )

    # ---- a shard ----------------------------------------------------------------------------------------------------
    def done(self, shard: Shard) -> bool:
        """Whether all files of a shard are there."""
        return self._file(shard, "json").exists()

    @contextlib.contextmanager
    def claim(self, shard: Shard, wait: bool = False) -> Iterator[bool]:
        """Whether the shard is ours until the block ends; the system itself takes back what a killed process held.

        Args:
            wait: until whoever has it now is done, or dead.
        """
        with self._lock(f"shard-{shard.number:05d}", wait) as mine:
            yield mine

    def write(self, shard: Shard, results: Results) -> None:
        """Writes a shard; it is there as a whole or not at all.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        import pyarrow
        from pyarrow import parquet
        from safetensors.numpy import save

        # one entry of metadata each: the order of several would differ from run to run
        # (and safetensors writes memory as it lies, whatever the strides)
        plain = {name: np.ascontiguousarray(array) for name, array in sorted(results.arrays.items())}
        arrays = save(plain, metadata={KEY: self.hash})
        about = {"hash": self.hash, "facts": results.facts}
        table = pyarrow.table(dict(results.table)).replace_schema_metadata({KEY: _json(about)})
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink)
        contents = {"safetensors": arrays, "parquet": sink.getvalue().to_pybytes()}
        timing = _json(results.timing)
        digests = {kind: _digest(content) for kind, content in contents.items()} | {"timing": _digest(timing.encode())}
        last = {"hash": self.hash, "samples": shard.samples, "timing": results.timing, "digests": digests}
        for kind, content in (contents | {"json": _json(last).encode()}).items():
            self._write(self._file(shard, kind).name, content)

    def read(self, shard: Shard) -> Results:
        """What `write` wrote.

        Raises:
            ValueError: it is missing, damaged, or of another configuration or other samples.
        """
        import pyarrow
        from pyarrow import parquet
        from safetensors.numpy import load

        try:
            last = json.loads(self._file(shard, "json").read_text(encoding="utf-8"))
            contents = {kind: self._file(shard, kind).read_bytes() for kind in ("safetensors", "parquet")}
            if last["hash"] != self.hash:
                raise ValueError("it is of another configuration")
            if tuple(last["samples"]) != shard.samples:
                raise ValueError("it is of other samples")
            for kind, content in (contents | {"timing": _json(last["timing"]).encode()}).items():
                if last["digests"][kind] != _digest(content):
                    raise ValueError(f"its {kind} is not what was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"shard {shard.number} in {self.path} is missing or damaged: {reason}") from None
        table = parquet.read_table(pyarrow.BufferReader(contents["parquet"]))
        facts = json.loads(table.schema.metadata[KEY.encode()])["facts"]
        return Results(table.to_pydict(), load(contents["safetensors"]), facts, last["timing"])

    def _sound(self, shard: Shard) -> bool:
        try:
            self.read(shard)
        except ValueError:
            return False
        return True

    # ---- files ------------------------------------------------------------------------------------------------------
    def _file(self, shard: Shard, kind: str) -> Path:
        return self.path / f"shard-{shard.number:05d}.{kind}"

    def _write(self, name: str, content: bytes) -> None:
        try:
            atomic.write(self.path / name, content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {name} was not written in {self.path}; what is there is whole, and the same "
                "command goes on from it",
            ) from None

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        from filelock import FileLock, Timeout

        locks = self.path / "locks"
        locks.mkdir(exist_ok=True)
        lock = FileLock(locks / f"{name}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(data: Any, indent: int | None = None) -> str:
    return json.dumps(data, sort_keys=True, allow_nan=False, indent=indent)


def _differences(theirs: Any, ours: Any) -> str:
    """What differs, as text: the first few entries by name."""
    a, b = dict(_entries(theirs)), dict(_entries(ours))
    names = [name for name in {*a, *b} if a.get(name, ...) != b.get(name, ...)]
    names.sort(key=lambda name: (name.count("."), name))  # what is said at the top tells most
    told = [f"{name} is {_show(a, name)} there and {_show(b, name)} here" for name in names[:SHOWN]]
    return ", ".join(told) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _show(entries: Mapping[str, Any], name: str) -> str:
    from ..parts import show

    return show(entries[name]) if name in entries else "absent"


def _entries(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of JSON values by dotted name."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if not children:
        yield name, data
        return
    for key, value in children:
        yield from _entries(value, f"{name}.{key}" if name else str(key))
