"""Files are replaced as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dittocache import atomic

FULL = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_takes_its_place_when_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with atomic.replacing(path) as beside:
        assert beside.parent == tmp_path
        beside.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"a.json": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(error, tmp_path):
    atomic.write(tmp_path / "a.json", b"old")
    with pytest.raises(error), atomic.replacing(tmp_path / "a.json") as beside:
        beside.write_bytes(b"half")
        raise error
    assert contents(tmp_path) == {"a.json": b"old"}


@full_disk
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    atomic.write(tmp_path / "a.json", b"old")
    (tmp_path / f"a.json{atomic.BESIDE}").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(tmp_path / "a.json", b"new")
    assert contents(tmp_path) == {"a.json": b"old"}


def test_several_files_replace_and_remove_what_was_there(tmp_path):
    atomic.write_all(tmp_path, {"a": b"1", "b": b"2"})
    atomic.write_all(tmp_path, {"a": b"3", "b": None, "c": b"4", "d": None})
    assert contents(tmp_path) == {"a": b"3", "c": b"4"}


def test_several_files_are_not_touched_before_all_are_written(tmp_path):
    atomic.write_all(tmp_path, {"a": b"1", "b": b"2"})
    with pytest.raises(OSError, match="No such file"):
        atomic.write_all(tmp_path, {"a": b"3", "b": None, "missing/c": b"4"})
    assert contents(tmp_path) == {"a": b"1", "b": b"2"}
