"""The tiny video and audio pipelines are fit to test with: alive, deterministic, and every video of a batch its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pipelines
import pytest
import tiny
import torch
from pipelines import PROMPTS, Case, run, videos
from torch import Tensor, nn

STEPS = 4

# pipelines that make one video at a time, and what they say to two
SINGLE = {
    "wan-vace": (ValueError, "more than one video is not yet supported"),
    # its embedding of the frame rate is laid out frame by frame, its timesteps video by video
    "skyreels-v2-df": (RuntimeError, "must match the size"),
}

# forwards of one branch, where this is not the number of steps
FORWARDS = {
    "skyreels-v2-df-async": STEPS + 2 * 2,  # the third frame starts 2 x 2 steps after the first
    "skyreels-v2-df-long": STEPS * 2,  # two pieces
    "cogvideox-v2v": int(0.7 * STEPS),  # of a strength of 0.7
    "wan-v2v": int(0.7 * STEPS),
}

_built: dict[str, Any] = {}
_drawn: dict[str, Tensor] = {}


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in modules(pipe).items()
        for key, value in part.state_dict().items()
    }


pytestmark = pytest.mark.slow  # the pipelines themselves; what a cache does to them is in test_pipelines_cached.py


@pytest.fixture(params=list(videos.CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return videos.CASES[request.param]


@pytest.fixture
def pipe(case: Case) -> Iterator[Any]:
    """Built once for all tests; every test leaves the weights and the scheduler's settings as they are."""
    if case.name not in _built:
        _built[case.name] = case.build(0)
    pipe = _built[case.name]
    before, scheduler = weights(pipe), (pipe.scheduler, type(pipe.scheduler), dict(pipe.scheduler.config))
    yield pipe
    assert scheduler == (pipe.scheduler, type(pipe.scheduler), dict(pipe.scheduler.config))
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


@pytest.fixture
def drawn(case: Case, pipe: Any) -> Tensor:
    """The video of the first prompt, drawn once for all tests."""
    if case.name not in _drawn:
        _drawn[case.name] = run(case, pipe, steps=STEPS)
    return _drawn[case.name]


def test_names():
    assert all(case.name == name for name, case in videos.CASES.items())
    assert set(videos.CASES) <= set(pipelines.CASES)


def test_no_weight_is_left_at_zero(pipe: Any):
    for name, part in modules(pipe).items():
        for key, value in part.named_parameters():
            assert value.any() and not torch.equal(value, torch.ones_like(value)), f"{name}.{key}"


def test_runs_and_repeats(case: Case, pipe: Any, drawn: Tensor):
    assert len(drawn) == 1 and torch.isfinite(drawn).all() and drawn.std() > 0.05
    assert torch.equal(run(case, pipe, steps=STEPS), drawn)
    assert torch.equal(run(case, case.build(0), steps=STEPS), drawn)
    assert tiny.relative(run(case, case.build(1), steps=STEPS), drawn) > 0.1


def test_depends_on_all_it_is_given(case: Case, pipe: Any, drawn: Tensor):
    changes: dict[str, dict[str, Any]] = {"prompt": {"prompt": PROMPTS[2]}, "seed": {"seed": 10}, "steps": {"steps": 5}}
    if case.scale is not None:
        changes |= {"more guidance": {case.scale: 6.0}}
        if case.guidance != "none":
            changes |= {"no guidance": {case.scale: 0.0 if case.scale == "stg_scale" else 1.0}}
    for what, changed in changes.items():
        assert tiny.relative(run(case, pipe, **{"steps": STEPS} | changed), drawn) > 1e-2, what


def test_depends_on_its_guider():
    """HunyuanVideo 1.5 has its guidance as a component."""
    case = videos.CASES["hunyuan-video-1.5"]
    pipe = case.build(0)
    usual = run(case, pipe, steps=2)
    pipe.guider = pipe.guider.new(guidance_scale=6.0)
    assert tiny.relative(run(case, pipe, steps=2), usual) > 1e-2


@pytest.mark.parametrize("name", ["ltx2", "ltx2-stg", "ltx2-all"])
def test_audio(name: str):
    """LTX-2's second output, which `run` leaves out."""
    case = videos.CASES[name]
    pipe = case.build(0)

    def listen(**kwargs: Any) -> Tensor:
        return pipe(**case.call(pipe, steps=2, **kwargs))[1]

    audio = listen()
    assert audio.shape == (1, 2, 18, 4) and torch.isfinite(audio).all()
    assert torch.equal(listen(), audio)
    for changed in ({"prompt": PROMPTS[2]}, {"seed": 10}, {f"audio_{case.scale}": 5.0}):
        assert tiny.relative(listen(**changed), audio) > 1e-2, changed


def test_videos_are_independent(case: Case, pipe: Any, drawn: Tensor):
    if case.name in SINGLE:
        error, message = SINGLE[case.name]
        with pytest.raises(error, match=message):
            run(case, pipe, steps=STEPS, batch=2)
        return
    both = run(case, pipe, steps=STEPS, batch=2)
    other = run(case, pipe, steps=STEPS, seed=1, prompt=PROMPTS[1])
    assert len(both) == 2
    assert tiny.relative(both[:1], drawn) < 1e-5 and tiny.relative(both[1:], other) < 1e-5


def test_calls_of_the_denoiser(case: Case, pipe: Any):
    """`guidance` and `branches` say how many forwards there are for a step, and of how many rows."""
    batch = 1 if case.name in SINGLE else 2
    rows: list[int] = []
    own: list[bool] = []  # whether it was the case's denoiser that was called, rather than its second

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))
        own.append(module is case.model(pipe))

    found = [modules(pipe)[name] for name in (case.denoiser, f"{case.denoiser}_2") if name in modules(pipe)]
    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in found]
    run(case, pipe, steps=STEPS, batch=batch)
    for handle in handles:
        handle.remove()
    pattern = {
        "none": [batch],
        "batched": [batch * case.branches],
        "separate": [batch] * case.branches,
        "mixed": [batch * 2] + [batch] * (case.branches - 2),
    }[case.guidance]
    assert rows == pattern * FORWARDS.get(case.name, STEPS)
    assert own[0] and case.steady == all(own)
    if not case.steady:  # the second denoiser takes over once
        assert own == sorted(own, reverse=True) and own.count(True) % len(pattern) == 0


def test_sizes(case: Case, pipe: Any, drawn: Tensor):
    with pytest.raises(ValueError, match=f"{case.name} draws no videos of 20 pixels"):
        case.call(pipe, size=20)
    if case.other_size is not None:
        other = run(case, pipe, steps=2, size=case.other_size)
        assert torch.isfinite(other).all() and other.numel() > drawn.numel()
