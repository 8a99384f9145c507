"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` from every test, wherever pytest starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

torch.set_num_threads(1)  # tiny models: more threads only cost

settings.register_profile(
    "dittocache",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dittocache")


@pytest.fixture(scope="session")
def bundled_pipe():
    """The bundled pipeline; tests leave it as they found it."""
    from dittocache import bundled

    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    """The bundled pipeline's class around a tiny random DiT."""
    import tiny

    return tiny.pipeline()


@pytest.fixture(params=["dit", "pixart", "flux"])
def model(request):
    """A tiny random transformer of each family."""
    import tiny

    return tiny.build(request.param)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test leaves a run open in the context of the next, or another attention kernel to all models."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as kernels

    kernel = kernels._active_backend
    yield
    kernels.set_active_backend(kernel)
    from dittocache import hooks, run

    run._active.set(())
    hooks._forward.set(None)
