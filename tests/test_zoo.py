"""The zoo holds every transformer class of the installed diffusers, and its models do what a denoiser does."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import transformers
from torch import Tensor, nn
from zoo import EXCLUDED, TEXT, ZOO, Entry, prediction

every = pytest.mark.parametrize("name", sorted(ZOO))


@functools.cache
def classes() -> set[str]:
    """Models that are defined in diffusers.models.transformers or handed on by it, and exported ones that bear the name
    of a transformer wherever they are defined."""
    found = set()
    for info in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{info.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            shown = issubclass(cls, ModelMixin) or (issubclass(cls, nn.Module) and hasattr(transformers, name))
            if shown and cls.__module__ == module.__name__:
                found.add(name)
    named = [name for name in dir(diffusers) if re.search(r"(Transformer|DiT|UVi[tT]).*Model$", name)]
    exported = {name: getattr(diffusers, name) for name in named}
    found.update(name for name, cls in exported.items() if inspect.isclass(cls) and issubclass(cls, ModelMixin))
    return found


def entry(name: str) -> Entry:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return ZOO[name]


@functools.cache
def model(name: str) -> Any:
    """For tests that change nothing."""
    return entry(name).build(0)


def predict(name: str, changes: dict[str, Any] | None = None, **given: Any) -> Tensor:
    with torch.no_grad():
        return prediction(model(name), entry(name).inputs(model(name), **given) | (changes or {}))


@functools.cache
def plain(name: str) -> Tensor:
    """The prediction of step 0."""
    return predict(name)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# ---- which classes --------------------------------------------------------------------------------------------------
def test_every_transformer_of_diffusers_is_in_the_zoo():
    unknown = sorted(classes() - ZOO.keys() - EXCLUDED.keys())
    assert not unknown, f"diffusers {diffusers.__version__}: neither in ZOO nor in EXCLUDED: {', '.join(unknown)}"


def test_the_walk_finds_what_is_there():
    assert {"FluxTransformer2DModel", "UVit2DModel", "StableAudioDiTModel", "T5FilmDecoder"} <= classes()


def test_a_class_is_either_in_the_zoo_or_excluded_with_a_reason():
    assert not ZOO.keys() & EXCLUDED.keys()
    assert all(len(reason) > 20 for reason in EXCLUDED.values())


@pytest.mark.slow
@every
def test_the_entry_is_of_its_class_and_names_its_arguments(name):
    assert type(model(name)).__name__ == name == entry(name).name
    kwargs = entry(name).inputs(model(name))
    assert {*entry(name).latents, *entry(name).time, *entry(name).conditions} <= kwargs.keys()
    assert kwargs.keys() <= inspect.signature(model(name).forward).parameters.keys()


# ---- the models -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@every
def test_main_lists_have_three_blocks_and_all_of_them_run(name):
    ran: set[str] = set()
    expected = set()
    built = entry(name).build(0)
    for path in entry(name).stacks:
        blocks = built.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList) and len(blocks) >= 3, path
        for n, block in enumerate(blocks):
            expected.add(f"{path}.{n}")
            block.register_forward_hook(lambda *_, place=f"{path}.{n}": ran.add(place))
    with torch.no_grad():
        prediction(built, entry(name).inputs(built))
    assert ran == expected


@pytest.mark.slow
@every
def test_no_weight_is_left_at_a_constant(name):
    constant = [n for n, p in model(name).named_parameters() if p.numel() > 1 and (p == p.flatten()[0]).all()]
    assert not constant  # gates that start closed would hide a wrongly reused feature


@pytest.mark.slow
@every
def test_what_any_block_gives_shows(name):
    built = entry(name).build(0)
    given = entry(name).inputs(built)
    unseen = []
    with torch.no_grad():
        for path in entry(name).stacks:
            for n, block in enumerate(built.get_submodule(path)):
                handle = block.register_forward_hook(lambda module, args, output: _shaken(output))
                if distance(prediction(built, given), plain(name)) < 1e-4:
                    unseen.append(f"{path}.{n}")
                handle.remove()
    assert not unseen


def _shaken(output: Any) -> Any:
    """With noise: a factor alone would be lost in the norm that follows."""
    if isinstance(output, Tensor):
        return output + 0.1 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return output and tuple(map(_shaken, output))  # None: the last block of a stream of text


def test_models_of_other_seeds_are_other_models():
    first, same, other = (ZOO["DiTTransformer2DModel"].build(seed) for seed in (0, 0, 1))
    assert first is not same
    assert torch.equal(first.proj_out_1.weight, same.proj_out_1.weight)
    assert not torch.equal(first.proj_out_1.weight, other.proj_out_1.weight)


# ---- their predictions ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@every
def test_predicts_the_same_again(name):
    assert torch.equal(predict(name), plain(name))
    assert plain(name).isfinite().all()
    assert 0.1 < plain(name).std() < 10


@every
def test_depends_on_all_that_it_is_given(name):
    """On each argument, the others unchanged."""
    other = entry(name).inputs(model(name), k=3, seed=11)
    for argument in [*entry(name).latents, *entry(name).time, *entry(name).conditions]:
        assert distance(predict(name, {argument: other[argument]}), plain(name)) > 1e-3, argument


@pytest.mark.slow
@every
def test_latents_and_time_drift_with_the_steps(name):
    """Each of them alone changes the prediction, what is given for the whole run stays."""
    first, third = (entry(name).inputs(model(name), k=k) for k in (0, 3))
    for argument in [*entry(name).latents, *entry(name).time]:
        assert distance(predict(name, {argument: third[argument]}), plain(name)) > 1e-3, argument
    moving = {argument: third[argument] for argument in [*entry(name).latents, *entry(name).time]}
    with torch.no_grad():
        together = prediction(model(name), first | moving)
    assert torch.equal(together, predict(name, k=3))


@pytest.mark.slow
@every
def test_takes_another_size(name):
    if len(entry(name).sizes) == 1:
        pytest.skip(f"{name} has one size")
    small, large = plain(name), predict(name, size=entry(name).sizes[1])
    assert small.shape != large.shape and small.shape[0] == large.shape[0]
    assert large.isfinite().all()


@every
def test_rows_of_a_batch_are_independent(name):
    rows = predict(name, batch=3, k=2, seed=5).chunk(3)
    alone = [predict(name, batch=1, k=2, seed=5 + j) for j in range(3)]
    assert [row.shape for row in rows] == [row.shape for row in alone]
    assert not torch.equal(alone[0], alone[1])
    apart = max(distance(row, one) for row, one in zip(rows, alone))
    if entry(name).joined:
        assert apart > 1e-2, f"the rows are independent, whatever is said: {entry(name).joined}"
    else:
        assert apart < entry(name).tolerance


def test_text_has_a_prime_number_of_tokens():
    assert TEXT == 7
