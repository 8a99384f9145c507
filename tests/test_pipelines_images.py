"""The tiny image pipelines are fit to test with: alive, deterministic, and every picture of a batch is its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pipelines
import pytest
import tiny
import torch
from pipelines import PROMPTS, Case, images, run
from torch import Tensor, nn

# old calls of NumPy inside of diffusers' schedulers, and one of its own names
pytestmark = [
    pytest.mark.slow,  # the pipelines themselves; what a cache does to them is in test_pipelines_cached.py
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

NAMES = list(images.CASES)
ALL = images.CASES | images.SOLVERS
STEPS = 4  # most tests; few, but more than any solver needs to start up

# pipelines of which the pictures of a batch are not independent, and why
DEPENDENT = {
    "sd3-controlnet": "draws the posterior of its control picture from the global generator, for the batch at once",
}

_built: dict[str, Any] = {}
_drawn: dict[str, Tensor] = {}


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def state(pipe: Any) -> dict[str, Any]:
    """What a test must leave as it was."""
    found: dict[str, Any] = {"scheduler": (type(pipe.scheduler), dict(pipe.scheduler.config))}
    for name, module in modules(pipe).items():
        found[name] = tiny.fingerprint(module)
        found[f"{name}: weights"] = {key: value.clone() for key, value in module.state_dict().items()}
        processors: dict[str, Any] = getattr(module, "attn_processors", {})
        found[f"{name}: processors"] = {key: type(value) for key, value in processors.items()}
        registries = {
            key: part._diffusers_hook for key, part in module.named_modules() if hasattr(part, "_diffusers_hook")
        }
        found[f"{name}: hooks"] = {key: tuple(registry.hooks) for key, registry in registries.items()}
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return bool(a == b)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return ALL[request.param]


@pytest.fixture
def pipe(case: Case) -> Iterator[Any]:
    """Built once for all tests; every test has to leave it as its first call left it."""
    if case.name not in _built:
        _built[case.name] = case.build(0)
        _drawn[case.name] = run(case, _built[case.name], steps=STEPS, batch=2)
    pipe = _built[case.name]
    before = state(pipe)
    yield pipe
    assert same(before, state(pipe)), f"{case.name}: a test left the pipeline changed"


@pytest.fixture
def drawn(case: Case, pipe: Any) -> Tensor:
    """Two pictures, of two prompts and seeds."""
    return _drawn[case.name]


def test_names() -> None:
    assert all(case.name == name for name, case in ALL.items())
    assert set(pipelines.CASES) >= set(NAMES)
    assert not set(NAMES) & set(pipelines.videos.CASES)
    assert {case.guidance for case in images.CASES.values()} == {"none", "batched", "separate"}


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_runs_and_repeats(case: Case, pipe: Any, drawn: Tensor) -> None:
    assert len(drawn) == 2 and torch.isfinite(drawn).all() and drawn.std() > 0.05
    assert torch.equal(run(case, pipe, steps=STEPS, batch=2), drawn)
    assert torch.equal(run(case, case.build(0), steps=STEPS, batch=2), drawn)
    assert tiny.relative(run(case, case.build(1), steps=STEPS, batch=2), drawn) > 0.1


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_depends_on_all_it_is_given(case: Case, pipe: Any, drawn: Tensor) -> None:
    changes: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": PROMPTS[2:]},
        "seed": {"seed": 10},
        "steps": {"steps": 5},
    }
    if case.scale is not None:
        changes |= {"no guidance": {case.scale: 1.0}, "more guidance": {case.scale: 6.0}}
    for what, changed in changes.items():
        other = run(case, pipe, **{"steps": STEPS, "batch": 2} | changed)
        assert min(tiny.relative(other[j], drawn[j]) for j in range(2)) > 1e-3, what


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_pictures_are_independent(case: Case, pipe: Any, drawn: Tensor) -> None:
    alone = [run(case, pipe, steps=STEPS, seed=j, prompt=PROMPTS[j])[0] for j in range(2)]
    apart = max(tiny.relative(drawn[j], alone[j]) for j in range(2))
    assert apart > 1e-2 if case.name in DEPENDENT else apart < 2e-5


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_calls_of_the_denoiser(case: Case, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`guidance`, `branches` and `steady` say how often it is called in a step, and with how many rows."""
    calls: list[list[int]] = [[]]  # rows of every call, step after step
    take = pipe.scheduler.step

    @functools.wraps(take)
    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append([])
        return take(*args, **kwargs)

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[-1].append(len(args[0] if args else kwargs["hidden_states"]))  # of a tensor or a list

    monkeypatch.setattr(pipe.scheduler, "step", step)
    with case.model(pipe).register_forward_pre_hook(see, with_kwargs=True):
        run(case, pipe, steps=STEPS, batch=3)
    assert calls.pop() == []
    usual = [3] * case.branches if case.guidance == "separate" else [3 * case.branches]
    assert usual in calls and all(made[: len(usual)] == usual for made in calls)
    assert case.steady == all(made == usual for made in calls)


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_sizes(case: Case, pipe: Any, drawn: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{case.name} draws no pictures of 20 pixels"):
        case.call(pipe, size=20)
    if case.other_size is not None:
        other = run(case, pipe, steps=2, size=case.other_size)
        assert torch.isfinite(other).all() and other.numel() > drawn[:1].numel()


@pytest.mark.parametrize("case", list(images.SOLVERS), indirect=True)
def test_solvers(case: Case, pipe: Any, drawn: Tensor) -> None:
    assert torch.isfinite(drawn).all()
    assert torch.equal(run(case, pipe, steps=STEPS, batch=2), drawn)
    assert tiny.relative(run(case, pipe, steps=STEPS, seed=1, prompt=PROMPTS[1])[0], drawn[1]) < 2e-5
    plain = images.CASES[case.name.split("/")[0]]
    assert type(pipe.scheduler) is not type(plain.build(0).scheduler)
