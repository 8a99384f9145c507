"""What a forward costs in user and system time and in page faults: untouched, all-compute, all reused.

    python benchmarks/page_faults.py
    MALLOC_TOP_PAD_=268435456 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 \
        python benchmarks/page_faults.py

The bundled model, 16 rows, one thread, in turn; medians over the rounds, per forward.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import warnings

import torch

import dittocache

ROUNDS, FORWARDS, ROWS = 5, 30, 16


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the all-compute plan says that it skipped nothing
    model = dittocache.bundled.load("glyphs").transformer
    x, labels, time = torch.randn(ROWS, 1, 32, 32), torch.arange(ROWS), torch.full((ROWS,), 500)

    def forwards(count: int, cache: dittocache.Cache | None) -> None:
        with torch.no_grad(), cache.run(count) if cache else contextlib.nullcontext():
            for k in range(count):
                if cache:
                    cache.step(k)
                model(x, timestep=time, class_labels=labels)

    found: dict[str, list[list[float]]] = {"untouched": [], "all computed": [], "all but one reused": []}
    for _ in range(ROUNDS):
        for name, interval in zip(found, (None, 1, FORWARDS + 1), strict=True):
            with contextlib.ExitStack() as stack:
                cache = (
                    stack.enter_context(dittocache.enable(model, "fora", interval=interval, anchor="start"))
                    if interval
                    else None
                )
                forwards(2, cache)
                before = resource.getrusage(resource.RUSAGE_SELF)
                forwards(FORWARDS, cache)
                after = resource.getrusage(resource.RUSAGE_SELF)
            fields = ("ru_utime", "ru_stime", "ru_minflt")
            found[name].append([(getattr(after, f) - getattr(before, f)) / FORWARDS for f in fields])
    for name, rows in found.items():
        user, system, faults = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:<20} user {1e3 * user:6.1f} ms   system {1e3 * system:5.1f} ms   page faults {faults:6.0f}")


if __name__ == "__main__":
    main()
