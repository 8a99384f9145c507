"""Files that are there as a whole or not at all: written beside their place, forced to the disk, then put into it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

BESIDE = ".new"  # what the name of an unfinished file ends with; a killed process leaves it behind


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name in the same folder, to write the file under; it takes its place when the block ends.

    If the block or the disk fails, what was there stays, and nothing is left beside it.
    """
    beside = path.with_name(path.name + BESIDE)
    try:
        yield beside
        _force(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write(path: Path, content: bytes) -> None:
    """Writes a file as a whole; an OSError leaves what was there."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_all(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Writes several files, in their order, once all of them are on the disk; those without content are removed.

    Raises:
        OSError: the disk is full, or the folder cannot be written; then no file was changed. (If putting them into
            place fails, which a full disk does not do, the first ones may be new.)
    """
    with tempfile.TemporaryDirectory(suffix=BESIDE, prefix=".", dir=folder) as scratch:
        for name, content in files.items():
            if content is not None:
                (Path(scratch) / name).write_bytes(content)
                _force(Path(scratch) / name)
        for name, content in files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                os.replace(Path(scratch) / name, folder / name)


def _force(path: Path) -> None:
    """What was written is on the disk: only then is it known to fit."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
