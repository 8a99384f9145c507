"""Does this installation work? Every answer is found by trying."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .provenance import machine, versions

EXTRAS = {"torchmetrics": "SSIM", "matplotlib": "pictures of plans"}


class Check(NamedTuple):
    """One question: whether the answer is good, and what was found."""

    name: str
    ok: bool
    found: str


def missing_extras() -> str:
    """What evaluation lacks and how to get it, in one line; empty if nothing."""
    missing = [f"{name} ({use})" for name, use in EXTRAS.items() if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} missing: pip install 'dittocache[eval]'" if missing else ""


def examine(device: str, load: Callable[[], Any]) -> list[Check]:
    """All checks, in order; `load` gives the bundled pipeline on that device."""
    parts = ", ".join(f"{name} {version}" for name, version in versions().items())
    missing = missing_extras()
    loaded: list[Any] = []
    checks = [
        Check("versions", True, parts),
        Check("device", True, f"{device}: {machine(torch.device(device))}, {torch.get_num_threads()} threads"),
        Check("extras for evaluation", not missing, missing or "all there"),
        _try("bundled model", lambda: _bundled(load(), loaded)),
    ]
    if loaded:
        checks += [
            _try("a cache skips", lambda: _skips(loaded[0])),
            _try("and comes off", lambda: _comes_off(loaded[0])),
        ]
    return checks


def _try(name: str, attempt: Callable[[], str]) -> Check:
    try:
        return Check(name, True, attempt())
    except Exception as error:  # whatever is wrong is the finding
        return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])


def _draw(pipe: Any, labels: str, steps: int) -> torch.Tensor:
    """Pictures [n, c, h, w] in [0, 1]."""
    generators = [torch.Generator().manual_seed(j) for j in range(len(labels))]
    options = {"num_inference_steps": steps, "guidance_scale": 1.5, "generator": generators, "output_type": "pt"}
    return pipe(class_labels=labels, **options).images.cpu()


def _bundled(pipe: Any, loaded: list[Any]) -> str:
    from ..bundled.judge import load_judge

    loaded.append(pipe)
    count = sum(p.numel() for p in pipe.transformer.parameters())
    if not all(p.isfinite().all() for p in pipe.transformer.parameters()):
        raise ValueError("the weights are not all finite")
    labels = "DITTOCACHE"
    read = load_judge()(_draw(pipe, labels, 10)).argmax(1).tolist()
    right = sum(a == b for a, b in zip(read, pipe.get_label_ids(labels), strict=True))
    if right < 8:
        raise ValueError(f"the judge reads {right} of {len(labels)} drawn characters")
    return f"{count / 1e6:.1f} M parameters; the judge reads {right} of {len(labels)} characters drawn in 10 steps"


def _skips(pipe: Any) -> str:
    from .. import enable

    with enable(pipe, "fora", interval=3) as cache:
        _draw(pipe, "A", 3)
        shares = cache.trace.table.mean(1).tolist()
        fraction = cache.report().compute_fraction
    if shares != [1.0, 0.0, 1.0] or not fraction < 1:
        raise ValueError(f"FORA over 3 steps computed {shares} of the sites, {fraction:.0%} of the compute")
    return f"FORA over 3 steps: the second is reused, {fraction:.0%} of the compute is done"


def _comes_off(pipe: Any) -> str:
    from .. import enable

    before = _draw(pipe, "A", 3)
    with enable(pipe, "fora", interval=3):
        cached = _draw(pipe, "A", 3)
    if torch.equal(cached, before):
        raise ValueError("pictures do not change while a cache is on")
    if not torch.equal(_draw(pipe, "A", 3), before):
        raise ValueError("pictures differ after the cache was taken off")
    return "pictures are the same, bit for bit, after it was taken off"
