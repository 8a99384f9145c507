"""Blocks that were compiled before a cache came on stay compiled under its hooks."""

from __future__ import annotations

import pytest
import torch

import dittocache


@pytest.mark.slow
def test_compiled_under_the_hooks() -> None:
    pipe = dittocache.bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(n) for n in range(2)]
        images = pipe(class_labels=[1, 2], num_inference_steps=8, generator=generators, output_type="np").images
        return torch.from_numpy(images)

    with dittocache.enable(pipe, "duca", ratio=0.3) as cache:
        plain, trace = draw(), cache.trace
    for block in pipe.transformer.transformer_blocks:
        block.compile()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with dittocache.enable(pipe, "duca", ratio=0.3) as cache:
        compiled = draw()
        assert cache.trace == trace
        frames = counters["frames"]["ok"]
        assert frames >= 2, "attention and feed-forward were compiled"
        again = draw()
        assert counters["frames"]["ok"] == frames, "decisions must not make anything compile again"
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    # the first forward of all counts FLOPs and runs uncompiled
    torch.testing.assert_close(again, compiled, rtol=1e-4, atol=1e-5)
