"""Who runs the shards: this process, processes on this machine, or Ray's workers on a cluster.

The folder is the queue. A worker claims a shard, runs it and writes it; a claim is a lock that the system takes back
when its process dies, so a killed worker's shard is free again at once, and a shard that is done is never run again.
Several commands, on machines that share the folder, may work on it together.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from ..parts import check_choice, check_int
from .folder import Folder
from .task import Results, Shard, Task, plan

Progress = Callable[[int, int, str], None]  # shards done, shards in all, what is running
DEATHS = 3  # workers that one shard may cost


def run(
    task: Task,
    samples: int | Sequence[int],
    shard_size: int,
    out: str | Path,
    engine: str = "local",
    workers: int | Sequence[Mapping[str, float]] = 1,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Folder, list[Shard]]:
    """Runs a task over all samples, apart from the shards that the folder holds already.

    Args:
        task: what is done.
        samples: numbers of the samples, or how many.
        shard_size: samples that are computed together; results may depend on it, so it is part of the configuration.
        out: the folder.
        engine: `local`, `accelerate` (processes of this machine, or the ranks of `accelerate launch`), or `ray`.
        workers: how many, or (Ray) what each of them needs, such as [{"num_cpus": 2}, {"num_gpus": 1}].
        progress: called now and then.
        options: `address` of Ray's cluster; by default one is started on this machine.

    Returns:
        The folder, and the shards, which are all in it.

    Raises:
        ValueError: contradictory arguments, or a folder of another configuration.
        OSError: the disk is full, or (ChildProcessError) workers died again and again; shards that are done stay.
    """
    check_choice("engine", engine, ENGINES)
    if isinstance(workers, int):
        check_int("workers", workers, 1)
    shards = plan(samples, shard_size)
    folder = Folder(out, {**task.config(), "shard_size": shard_size})
    folder.begin(shards)
    report = progress or (lambda done, total, what: None)
    if not all(map(folder.done, shards)):
        ENGINES[engine](task, folder, shards, workers, report, **options)
    report(len(shards), len(shards), "done")
    return folder, shards


def _work(task: Task, folder: Folder, shards: Sequence[Shard], go_on: Callable[[], bool]) -> None:
    """Runs whatever is not done: first what nobody has claimed, then what its owner left undone.

    Args:
        go_on: asked before every shard.
    """
    opened = False
    for wait in (False, True):
        for shard in shards:
            if folder.done(shard):
                continue
            with folder.claim(shard, wait) as mine:
                if not go_on():
                    return
                if mine and not folder.done(shard):
                    if not opened:
                        task.open()
                        opened = True
                    folder.write(shard, task.run(shard.samples))


def _count(folder: Folder, shards: Sequence[Shard]) -> int:
    return sum(map(folder.done, shards))


# ---- this process ---------------------------------------------------------------------------------------------------
def local(task: Task, folder: Folder, shards: Sequence[Shard], workers: Any, progress: Progress) -> None:
    """One shard after another, here."""
    if workers != 1:
        raise ValueError(f"the engine local is one worker, this process; {workers} need the engine accelerate or ray")

    def go_on() -> bool:
        progress(_count(folder, shards), len(shards), "running")
        return True

    _work(task, folder, shards, go_on)


# ---- processes ------------------------------------------------------------------------------------------------------
def accelerate(task: Task, folder: Folder, shards: Sequence[Shard], workers: Any, progress: Progress) -> None:
    """Processes of this machine; under `accelerate launch` its ranks, each on the device that accelerate gives it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        if workers != 1:
            raise ValueError(f"under accelerate launch its processes are the workers: leave {workers} workers out")
        PartialState()  # chooses the device of this process
        local(task, folder, shards, 1, progress)
        return
    if not isinstance(workers, int):
        raise ValueError("workers that differ need the engine ray; accelerate takes their number")
    while (done := _count(folder, shards)) < len(shards):
        signals = _processes(task, folder, shards, min(workers, len(shards) - done), progress)
        if _count(folder, shards) == done:
            raise ChildProcessError(f"all {len(signals)} workers died before a shard was done (exit codes {signals})")


def _processes(task: Task, folder: Folder, shards: Sequence[Shard], count: int, progress: Progress) -> list[Any]:
    """Starts processes and waits until all are over; returns their exit codes. An error in one of them is raised."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use torch's threads or a GPU
    devices = _devices()
    processes: list[Any] = []
    receivers: list[Any] = []
    try:
        for number in range(count):
            receiver, sender = context.Pipe(duplex=False)
            device = devices[number % len(devices)] if devices else None
            process = context.Process(target=_process, args=(task, folder, shards, device, sender), daemon=True)
            process.start()
            sender.close()  # only the process holds it now: its end is the end of the pipe
            processes.append(process)
            receivers.append(receiver)
        while receivers:
            progress(_count(folder, shards), len(shards), f"{len(receivers)} workers")
            told: list[Any] = connection.wait(receivers, timeout=1)
            for ready in told:
                try:
                    raise ready.recv()
                except EOFError:  # done, or killed without a word
                    receivers.remove(ready)
    finally:
        for process in processes:
            if receivers:  # an error, or an interruption
                process.terminate()
            process.join()
    return [process.exitcode for process in processes]


def _process(task: Task, folder: Folder, shards: Sequence[Shard], device: str | None, sender: Any) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    parent = multiprocessing.parent_process()
    try:
        _work(task, folder, shards, lambda: parent is not None and parent.is_alive())
    except Exception as error:  # whatever it is, it is raised again where the work was asked for
        sender.send(
            error if isinstance(error, (OSError, ValueError)) else RuntimeError(f"{type(error).__name__}: {error}")
        )


def _devices() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]


# ---- Ray ------------------------------------------------------------------------------------------------------------
def ray(
    task: Task,
    folder: Folder,
    shards: Sequence[Shard],
    workers: Any,
    progress: Progress,
    address: str | None = None,
) -> None:
    """Ray's workers, here or on a cluster; results come back to this process, which alone writes them."""
    try:
        import ray
    except ImportError:
        raise ImportError("the engine ray needs Ray: pip install 'dittocache[ray]'") from None
    started = not ray.is_initialized()
    needs = [{"num_cpus": 1}] * workers if isinstance(workers, int) else list(workers)
    if started:
        ray.init(address=address, log_to_driver=False, logging_level="error", **({} if address else _here(needs)))
    try:
        if not address:
            _check_needs(needs, ray.cluster_resources())
        _Pool(task, folder, shards, needs).run(progress)
    finally:
        if started:
            ray.shutdown()


def _here(needs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """How Ray is started on this machine: workers may outnumber the cores, and import what this process can."""
    cores = max(os.cpu_count() or 1, math.ceil(sum(need.get("num_cpus", 0) for need in needs)))
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return {"num_cpus": cores, "include_dashboard": False, "runtime_env": {"env_vars": paths}}


def _check_needs(needs: Sequence[Mapping[str, float]], there: Mapping[str, float]) -> None:
    """Raises a ValueError for a worker that this machine can never start."""
    for need in needs:
        for name, key in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            if need.get(name, 0) > there.get(key, 0):
                raise ValueError(f"a worker needs {name}={need[name]}, this machine has {there.get(key, 0):g}")


class _Worker:
    """What lives in a worker of Ray."""

    def __init__(self, task: Task) -> None:
        self.task, self.opened = task, False

    def run(self, shard: Shard) -> Results:
        if not self.opened:
            self.task.open()
            self.opened = True
        return self.task.run(shard.samples)


class _Job(NamedTuple):
    """A shard that a worker is at."""

    worker: Any
    need: Mapping[str, float]
    shard: Shard
    claim: ExitStack


class _Pool:
    """Workers of Ray. One that died is replaced, and its shard given out again."""

    def __init__(
        self, task: Task, folder: Folder, shards: Sequence[Shard], needs: Sequence[Mapping[str, float]]
    ) -> None:
        self.task, self.folder, self.shards, self.needs = task, folder, shards, needs
        self.deaths: Counter[Shard] = Counter()

    def run(self, progress: Progress) -> None:
        """Until all shards are done; those that another command has claimed come last."""
        for wait in (False, True):
            waiting = [shard for shard in self.shards if not self.folder.done(shard)]
            idle = [(self._worker(need), need) for need in self.needs[: len(waiting)]]
            jobs: dict[Any, _Job] = {}
            try:
                while waiting or jobs:
                    while waiting and idle:
                        shard, claim = waiting.pop(0), ExitStack()
                        mine = claim.enter_context(self.folder.claim(shard, wait))
                        if not mine or self.folder.done(shard):
                            claim.close()
                            continue
                        worker, need = idle.pop(0)
                        jobs[worker.run.remote(shard)] = _Job(worker, need, shard, claim)
                    progress(_count(self.folder, self.shards), len(self.shards), f"{len(jobs)} workers")
                    for reference in self._ready(jobs):
                        job = jobs[reference]
                        worker = self._finish(reference, job)
                        del jobs[reference]
                        job.claim.close()
                        idle.append((worker, job.need))
                        if not self.folder.done(job.shard):
                            waiting.insert(0, job.shard)
            finally:
                for job in jobs.values():
                    job.claim.close()

    def _worker(self, need: Mapping[str, float]) -> Any:
        import ray

        return ray.remote(_Worker).options(**need).remote(self.task)

    def _ready(self, jobs: Mapping[Any, _Job]) -> list[Any]:
        import ray

        return ray.wait(list(jobs), num_returns=1, timeout=1)[0] if jobs else []

    def _finish(self, reference: Any, job: _Job) -> Any:
        """Writes what a job gave; returns its worker, or another one if it died."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            results = ray.get(reference)
        except RayTaskError as error:  # the task itself failed
            raise error.cause from None
        except RayActorError as error:
            self.deaths[job.shard] += 1
            if self.deaths[job.shard] == DEATHS:
                reason = str(error).strip().splitlines()[-1]
                raise ChildProcessError(f"shard {job.shard.number} cost {DEATHS} workers; the last: {reason}") from None
            return self._worker(job.need)
        self.folder.write(job.shard, results)
        return job.worker


ENGINES: dict[str, Callable[..., None]] = {"local": local, "accelerate": accelerate, "ray": ray}
