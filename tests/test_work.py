"""The work queue: the same bytes for any number of workers, killed workers and drivers, damaged files, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest

from dittocache.work import Folder, Results, Shard, plan, run

SAMPLES, SIZE = 10, 2
slow = pytest.mark.slow  # every process takes seconds to start


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, started once."""
    ray = pytest.importorskip("ray")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    yield
    ray.shutdown()


@pytest.fixture
def engine(request):
    """Name of an engine, which is there."""
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return request.param


def engines(*cases: tuple) -> Any:
    """Parameters that begin with an engine; those of Ray, and more than two processes, are slow."""
    many = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=slow if case[0] == "ray" or 4 in case else ()) for case in many]


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files but the timing."""
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".parquet", ".safetensors")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    run(jobs.Noise(), SAMPLES, SIZE, out)
    return contents(out)


# ---- plan -----------------------------------------------------------------------------------------------------------
def test_shards_hold_every_sample_once():
    shards = plan(10, 4)
    assert [s.samples for s in shards] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [s.number for s in shards] == [0, 1, 2]
    assert plan([7, 3], 5) == [Shard(0, (7, 3))]


@pytest.mark.parametrize(
    ("samples", "size", "message"), [(0, 4, "no samples"), ([1, 1], 4, "occurs twice"), (3, 0, "size of a shard")]
)
def test_a_plan_that_is_none(samples, size, message):
    with pytest.raises(ValueError, match=message):
        plan(samples, size)


# ---- files ----------------------------------------------------------------------------------------------------------
def test_what_is_read_is_what_was_written(tmp_path):
    folder, shards = run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    wanted, found = jobs.Noise().run(shards[1].samples), folder.read(shards[1])
    assert found.table == {"sample": [2, 3], "mean": wanted.table["mean"].tolist(), "name": ["sample 2", "sample 3"]}
    assert set(found.arrays) == {"noise", "turned"}
    assert np.array_equal(found.arrays["noise"], wanted.arrays["noise"])
    assert np.array_equal(found.arrays["turned"], wanted.arrays["noise"].T)  # its memory lies the other way round
    assert found.facts == {"count": 2} and found.timing == {"pid": os.getpid()}


def test_shards_that_are_done_are_not_done_again(tmp_path):
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("shard-*.*")}
    (tmp_path / "shard-00003.json").unlink()
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    again = {path.name: path.stat().st_ino for path in tmp_path.glob("shard-*.*")}
    assert {name for name in again if again[name] != inodes[name]} == {
        f"shard-00003.{kind}" for kind in ("parquet", "safetensors", "json")
    }


def test_more_samples_keep_the_shards_that_are_there(tmp_path):
    run(jobs.Noise(), 5, SIZE, tmp_path)  # the last shard is half
    kept = (tmp_path / "shard-00001.parquet").stat().st_ino
    folder, shards = run(jobs.Noise(), 8, SIZE, tmp_path)
    assert (tmp_path / "shard-00001.parquet").stat().st_ino == kept
    assert [j for shard in shards for j in folder.read(shard).table["sample"]] == list(range(8))


@pytest.mark.parametrize("kind", ["parquet", "safetensors", "json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_shard_is_done_again(kind, damage, tmp_path, undisturbed):
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    file = tmp_path / f"shard-00002.{kind}"
    whole = bytearray(file.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 3] ^= 255
    file.write_bytes({"cut": whole[:-5], "flipped": whole, "empty": b""}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    folder, shards = run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    assert contents(tmp_path) == undisturbed
    assert folder.read(shards[2]).timing == {"pid": os.getpid()}


def test_another_configuration_is_refused_and_says_what_differs(tmp_path, undisturbed):
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    with pytest.raises(ValueError, match=r"another configuration: scale is 1\.0 there and 2\.0 here; give") as error:
        run(jobs.Noise(2.0), SAMPLES, SIZE, tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="shard_size is 2 there and 3 here"):
        run(jobs.Noise(), SAMPLES, 3, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_file_of_another_configuration_is_done_again(tmp_path, undisturbed):
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path / "a")
    run(jobs.Noise(2.0), SAMPLES, SIZE, tmp_path / "b")
    for kind in ("parquet", "safetensors"):
        name = f"shard-00001.{kind}"
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path / "a")
    assert contents(tmp_path / "a") == undisturbed


@pytest.mark.parametrize("text", ["", "{}", '{"format": "x", "config": {}}', "[]"])
def test_a_damaged_configuration_is_one_line(text, tmp_path):
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    (tmp_path / "work.json").write_text(text)
    with pytest.raises(ValueError, match=r"work\.json is damaged"):
        run(jobs.Noise(), SAMPLES, SIZE, tmp_path)


# ---- full disks -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize(
    ("engine", "kind"),
    engines(("local", "safetensors"), ("local", "parquet"), ("local", "json"), ("accelerate", "json"), ("ray", "json")),
    indirect=["engine"],
)
def test_a_full_disk_leaves_nothing_half(kind, engine, tmp_path, undisturbed):
    (tmp_path / f"shard-00002.{kind}.new").symlink_to("/dev/full")  # the real path of a write, and a real ENOSPC
    with pytest.raises(OSError, match=rf"No space left on device: shard-00002\.{kind} was not written") as error:
        run(jobs.Noise(), SAMPLES, SIZE, tmp_path, engine)
    assert "\n" not in str(error.value)
    assert (tmp_path / "shard-00001.json").exists() and not (tmp_path / "shard-00002.json").exists()
    assert not list(tmp_path.glob("*.new"))
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    code = (
        "import resource, jobs\n"
        "from dittocache.work import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        f"run(jobs.Noise(), {SAMPLES}, {SIZE}, {str(tmp_path)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "OSError: [Errno 27] File too large: shard-00000.safetensors was not written" in found.stderr
    assert not contents(tmp_path) and not list(tmp_path.glob("*.new"))


# ---- workers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("engine", "workers"),
    engines(("accelerate", 1), ("accelerate", 2), ("accelerate", 4), ("ray", 1), ("ray", 2), ("ray", 4)),
    indirect=["engine"],
)
def test_the_same_bytes_for_any_number_of_workers(engine, workers, tmp_path, undisturbed):
    seen: list[tuple[int, int]] = []
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path, engine, workers, lambda done, total, what: seen.append((done, total)))
    assert contents(tmp_path) == undisturbed
    assert seen[-1] == (5, 5) and sorted(seen) == seen
    pids = {json.loads(path.read_text())["timing"]["pid"] for path in tmp_path.glob("shard-*.json")}
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    ("engine", "workers"), engines(("accelerate", 1), ("accelerate", 2), ("ray", 1), ("ray", 2)), indirect=["engine"]
)
def test_a_killed_workers_shard_is_done_by_another(engine, workers, tmp_path, undisturbed):
    mark, out = tmp_path / "mark", tmp_path / "out"
    folder, shards = run(jobs.Once(mark=mark), SAMPLES, SIZE, out, engine, workers)
    assert contents(out) == undisturbed
    assert folder.read(shards[2]).timing["pid"] != int(mark.read_text())  # it was another process
    assert [j for shard in shards for j in folder.read(shard).table["sample"]] == list(range(SAMPLES))


@slow
@pytest.mark.parametrize(
    ("engine", "message"),
    engines(("accelerate", "workers died"), ("ray", "shard 2 cost 3 workers")),
    indirect=["engine"],
)
def test_a_shard_that_kills_every_worker_ends_the_run(engine, message, tmp_path):
    with pytest.raises(ChildProcessError, match=message):
        run(jobs.Once(), SAMPLES, SIZE, tmp_path, engine, 2)
    assert "shard-00002.parquet" not in contents(tmp_path) and "shard-00000.parquet" in contents(tmp_path)


@pytest.mark.parametrize(
    ("engine", "workers"), [("local", 1), pytest.param("accelerate", 2, marks=slow), pytest.param("ray", 2, marks=slow)]
)
def test_a_killed_driver_goes_on_where_it_was(engine, workers, tmp_path, undisturbed):
    mark, out = tmp_path / "mark", tmp_path / "out"
    found = subprocess.run([sys.executable, jobs.__file__, mark, out, engine, str(workers)], capture_output=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    kept = {path: path.stat().st_ino for path in out.glob("shard-*.json")}
    assert kept
    run(jobs.Noise(), SAMPLES, SIZE, out, engine, workers)
    assert contents(out) == undisturbed
    assert {path: path.stat().st_ino for path in kept} == kept


@pytest.mark.parametrize("engine", engines("local", "accelerate", "ray"), indirect=True)
def test_an_error_of_the_task_is_raised_here(engine, tmp_path):
    with pytest.raises(ValueError, match="nothing can be done about 0"):
        run(jobs.Failing(), SAMPLES, SIZE, tmp_path, engine)


def test_two_commands_share_a_folder(tmp_path, undisturbed):
    """One of them holds a shard when the other comes by, which does the rest and waits for this one."""
    folder = Folder(tmp_path, {**jobs.Noise().config(), "shard_size": SIZE})
    shards = plan(SAMPLES, SIZE)
    folder.begin(shards)
    with folder.claim(shards[1]) as mine:
        assert mine
        code = f"import jobs; from dittocache.work import run; run(jobs.Noise(), {SAMPLES}, {SIZE}, {str(tmp_path)!r})"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        other = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while not folder.done(shards[4]):
            assert other.poll() is None
        assert not folder.done(shards[1])
        folder.write(shards[1], Results({"sample": [2, 3]}, timing={"by": "us"}))
    assert other.wait(60) == 0
    assert folder.read(shards[1]).timing == {"by": "us"}


@pytest.mark.parametrize(
    ("engine", "workers", "message"),
    [
        ("cluster", 1, "engine must be one of"),
        ("local", 2, "the engine local is one worker"),
        ("accelerate", 0, "workers must be a whole number"),
        ("accelerate", [{"num_cpus": 1}], "workers that differ need the engine ray"),
    ],
)
def test_contradictory_arguments(engine, workers, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(jobs.Noise(), SAMPLES, SIZE, tmp_path, engine, workers)
    assert not contents(tmp_path)


@slow
def test_a_worker_that_ray_can_never_start(tmp_path, cluster):
    with pytest.raises(ValueError, match=r"a worker needs num_gpus=99, this machine has"):
        run(jobs.Noise(), SAMPLES, SIZE, tmp_path, "ray", [{"num_gpus": 99}])


@slow
def test_workers_of_ray_may_differ(tmp_path, undisturbed, cluster):
    run(jobs.Noise(), SAMPLES, SIZE, tmp_path, "ray", [{"num_cpus": 2}, {"num_cpus": 0.5}])
    assert contents(tmp_path) == undisturbed
