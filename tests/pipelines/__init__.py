"""Real diffusers pipelines around tiny random models, for tests.

Everything is the real thing (transformer or UNet, VAE, scheduler, the pipeline's own `__call__`) but the text encoders:
prompts become embeddings by a hash (`stubs.embed`). `CASES` names them all; `images.py` and `videos.py` hold them.

    case = CASES["sd3"]
    pipe = case.build(0)
    pictures = run(case, pipe, steps=4, batch=2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPTS = ("a cat", "two dogs", "an old tree", "the sea")  # picture j of a batch is of prompt j, unless told otherwise


@dataclass(frozen=True)
class Case:
    """One pipeline.

    `build(seed)` makes it, with random weights everywhere and no progress bar. `call(pipe, steps=6, batch=1, seed=0,
    size=None, **overrides)` gives the keyword arguments of one call. Picture j has the generator of seed + j, and
    prompt j; `prompt` (a text for all of them, or a list of one each) is an override too. Other overrides go to the
    pipeline as they are. `size` is the side in pixels, None the case's own.
    """

    name: str
    build: Callable[[int], Any]
    call: Callable[..., dict[str, Any]]
    guidance: str  # "none", "batched" (all branches in one forward), "separate" (a forward for each), or "mixed"
    branches: int = 1  # of guidance; 2 with the usual one
    scale: str | None = "guidance_scale"  # the argument that sets the strength of guidance; None: there is no such
    denoiser: str = "transformer"  # the component that is called every step
    other_size: int | None = None  # another side in pixels that it can draw; None: it has one size only
    steady: bool = True  # every step calls the denoiser the same number of times

    def model(self, pipe: Any) -> Any:
        """The denoiser of a pipeline of this case."""
        return getattr(pipe, self.denoiser)


def run(case: Case, pipe: Any, **kwargs: Any) -> Tensor:
    """Pictures, videos or latents `[batch, ...]` of one call; `kwargs` are those of `case.call`.

    The global generator, which a few pipelines draw from though they are given others, is set for the call.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(kwargs.get("seed", 0))
        out = pipe(**case.call(pipe, **kwargs))[0]
    return out if isinstance(out, Tensor) else torch.stack(list(out))


from . import images, videos  # noqa: E402 (the cases are made of what stands above)

CASES: dict[str, Case] = images.CASES | videos.CASES
