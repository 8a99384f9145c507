"""The genetic search on a tiny pipeline."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import tiny

import dittocache
from dittocache import Recipe
from dittocache.calibrate import Setup
from dittocache.calibrate.trial import Trial
from dittocache.fill import Taylor
from dittocache.tune import genetic
from dittocache.tune.genetic import Candidate, evolve, front
from dittocache.when import Every, ReuseSteps

SETUP = Setup(num_steps=4, guidance_scale=1.5, seed=3, conditions=(1, 2))


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(tiny.pipeline(transformer=tiny.dit(in_channels=1, out_channels=1, num_layers=1)), SETUP, [0, 1])


@pytest.fixture(scope="module")
def everything(trial: Trial) -> list[Candidate]:
    """Every plan with a gene for every step and kind of site: three steps, two kinds."""
    space = genetic._Space(trial, "module", Recipe(Every(1)).fill, "kind")
    return [space.judged(np.array(bits)) for bits in itertools.product((False, True), repeat=6)]


def numbers(found: list[Candidate]) -> list[tuple[float, float]]:
    return [(candidate.compute, candidate.error) for candidate in found]


def test_the_front_is_that_of_all_plans_if_all_are_tried(trial: Trial, everything: list[Candidate]) -> None:
    seen: list[int] = []
    found = evolve(
        trial, genes="kind", population=24, generations=20, progress=lambda done, total, what: seen.append(done)
    )
    wanted = [
        one
        for one in everything
        if not any(
            other.error <= one.error and other.compute <= one.compute and numbers([other]) != numbers([one])
            for other in everything
        )
    ]
    assert set(numbers(found)) == set(numbers(wanted)) and len(found) > 2
    assert numbers(found) == sorted(numbers(found)) and seen == sorted(seen) and seen[-1] <= len(everything)


def test_a_front_is_found_that_beats_even_intervals(trial: Trial) -> None:
    found = evolve(trial, population=12, generations=6, seed=1)
    even = evolve(trial, population=5, generations=1)
    assert all(any(f.compute <= e.compute and f.error <= e.error for f in found) for e in even)
    assert len(found) > len(even)


def test_a_candidate_is_what_its_recipe_does(trial: Trial) -> None:
    for candidate in evolve(trial, population=8, generations=2):
        assert trial.error(candidate.recipe) == candidate.error
        with dittocache.enable(trial.pipe, candidate.recipe) as cache:
            tiny.draw(trial.pipe, 4)
        assert cache.trace == candidate.recipe.when.plan  # type: ignore[attr-defined]
        assert cache.report().compute_fraction == pytest.approx(candidate.compute)
        assert candidate.recipe.made_for["model"] == "DiTTransformer2DModel"


def test_candidates_are_saved(trial: Trial, tmp_path) -> None:
    found = evolve(trial, population=6, generations=1, fill=Taylor(1))[0]
    found.recipe.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again == found.recipe and again.fill == Taylor(1) and trial.error(again) == found.error


def test_it_is_decided_by_its_seed_and_leaves_numpy_alone(trial: Trial) -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    runs = [numbers(evolve(trial, population=8, generations=3, seed=seed)) for seed in (2, 2, 3)]
    assert runs[0] == runs[1] != runs[2]
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_seeds_are_tried(trial: Trial, everything: list[Candidate]) -> None:
    settings = {"genes": "kind", "population": 6, "generations": 1}
    without = numbers(evolve(trial, **settings))  # type: ignore[arg-type]
    better = next(candidate for candidate in front(everything) if numbers([candidate])[0] not in without)
    found = evolve(trial, seeds=[better.recipe], **settings)  # type: ignore[arg-type]
    assert numbers([better])[0] in numbers(found)


def test_the_time_is_kept(trial: Trial) -> None:
    """Nothing but the first plan is tried when there is no time; what it found is returned."""
    (found,) = evolve(trial, seconds=0)
    assert found.compute == 1 and found.error == 0


def test_columns_go_by_kind(trial: Trial) -> None:
    space = genetic._Space(trial, "module", Recipe(Every(1)).fill, "kind")
    table = space.plan(np.array([1, 0, 0, 1, 0, 0])).table
    kinds = dict(zip(space.trace.kinds, table.T.tolist(), strict=True))
    assert kinds == {"attention": [1, 1, 0, 0], "feed-forward": [1, 0, 1, 0]}
    assert space.genome(Recipe(Every(2, anchor="start"))).tolist() == [False, False, True, True, False, False]


def test_front() -> None:
    recipe = Recipe(Every(2))
    made = [Candidate(recipe, error, compute) for error, compute in ((3, 1), (2, 2), (2, 3), (5, 1), (0, 4), (1, 5))]
    assert numbers(front(made)) == [(1, 3), (2, 2), (4, 0)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"population": 1}, "population.*2 or more; got 1"),
        ({"population": 4}, "hold the 5 plans that it begins with; got 4"),
        ({"generations": 0}, "generations.*1 or more; got 0"),
        ({"seconds": -1}, "seconds.*-1"),
        ({"genes": "block"}, "genes must be one of site, kind; got 'block'"),
        ({"where": "transformer"}, "where must be one of.*'transformer'"),
        ({"seeds": [dittocache.recipe("teacache")]}, "a seed is a static plan.*teacache"),
        ({"seeds": [Recipe(ReuseSteps((9,)))]}, "reuse_steps in a run of 4 steps.*9"),
    ],
)
def test_bad_input(trial: Trial, params, message) -> None:
    with pytest.raises(ValueError, match=message):
        evolve(trial, **params)


def test_without_pymoo(trial: Trial, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(ImportError, match=r"pymoo: pip install 'dittocache\[tune\]'"):
        evolve(trial)
