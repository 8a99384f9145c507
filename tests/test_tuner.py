"""From a budget to a saved recipe, on tiny pipelines: goals, journals, judging, the whole search, resuming it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler

import dittocache
from dittocache import Recipe, bundled
from dittocache.calibrate import Setup
from dittocache.calibrate.setup import draw
from dittocache.evaluate.comparison import Comparison
from dittocache.evaluate.metrics import frechet_distance
from dittocache.evaluate.rows import Row, Run, fewer
from dittocache.tune import Effort, Goal, Unreachable, save, tune
from dittocache.tune.contender import Contender
from dittocache.tune.journal import FILE, Journal
from dittocache.tune.judge import Judge, _structured
from dittocache.tune.learned import learned
from dittocache.tune.published import SPACES, explore
from dittocache.tune.trajectory import record
from dittocache.tune.tuner import _split, _Tuner
from dittocache.when import ReuseSteps

STEPS = 12
SETUP = Setup(num_steps=STEPS, guidance_scale=1.5, seed=3, conditions=(1, 2))
EFFORT = Effort(samples=4, trial=4, judged=4, held_out=4, batch=2, tries=4, methods=2)

GOAL = Goal("psnr", 18.0)


def pipeline():
    return tiny.pipeline(scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def loss(pipe) -> float:
    """A PSNR that about half of the steps keep."""
    judge = Judge(pipe, replace(SETUP, seed=77), range(4), batch=2)
    return judge.score([fewer(STEPS // 2)])[0]["psnr"]


# ---- goals ----------------------------------------------------------------------------------------------------------
def test_goals():
    goal = Goal.of("psnr>=35")
    assert goal == Goal("psnr", 35.0) and goal.met({"psnr": 35.1, "speedup": 1.1}) and not goal.met({"psnr": 34.9})
    assert not goal.met({"psnr": 50, "speedup": 0.9}), "slower than doing nothing"
    distance = Goal.of(" fd <= 0.5 ")
    assert (
        distance.met({"fd": 0.4, "speedup": 2}) and not distance.met({"fd": 0.6}) and distance.loss({"fd": 0.6}) == 0.6
    )
    speed = Goal.of(min_speedup=3)
    assert speed.met({"speedup": 3.0}) and not speed.met({"speedup": 2.9})
    ranked = sorted(
        [
            {"psnr": 30, "speedup": 3.1},
            {"psnr": 40, "speedup": 2.0},
            {"psnr": 35, "speedup": 3.5},
            {"psnr": 9, "speedup": 2.5},
        ],
        key=speed.rank,
    )
    assert [one["psnr"] for one in ranked] == [35, 30, 9, 40], "those that are fast enough, then those that nearly are"
    ranked = sorted([{"psnr": 36, "speedup": 2}, {"psnr": 35, "speedup": 3}, {"psnr": 34, "speedup": 9}], key=goal.rank)
    assert [one["psnr"] for one in ranked] == [35, 36, 34]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget is a largest loss or a least speed-up; got neither"),
        ({"max_loss": "psnr>=30", "min_speedup": 2.0}, "a budget is a largest loss or a least speed-up; got both"),
        ({"max_loss": "psnr"}, r"a largest loss is written like psnr>=35, .* got 'psnr'"),
        ({"max_loss": "beauty>=3"}, "a largest loss is written like psnr>=35"),
        ({"max_loss": "psnr<=35"}, "a largest loss in psnr is written psnr>=35; got 'psnr<=35'"),
        ({"max_loss": "fd>=1"}, "a largest loss in fd is written fd<=1; got 'fd>=1'"),
        ({"max_loss": "fd<=-1"}, "the bound of fd must be a number at least 0; got -1"),
        ({"max_loss": "ssim>=1.5"}, "the bound of ssim must be a number .*; got 1.5"),
        ({"max_loss": "psnr>=1e"}, "'1e' in 'psnr>=1e' is no number"),
        ({"min_speedup": 1.0}, "the least speed-up must be more than 1; got 1.0"),
        ({"min_speedup": float("nan")}, "the least speed-up must be a number that is finite; got nan"),
        ({"min_speedup": 2.0, "metric": "beauty"}, "metric must be one of psnr, ssim, latent, fd; got 'beauty'"),
    ],
)
def test_budgets_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Goal.of(**arguments)


# ---- the journal ----------------------------------------------------------------------------------------------------
def test_a_journal_computes_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"a": float("inf")}

    journal = Journal(tmp_path, {"x": 1})
    assert journal("key", compute) == journal("key", compute) == {"a": float("inf")} and len(calls) == 1
    assert Journal(tmp_path, {"x": 1})("key", compute) == {"a": float("inf")} and len(calls) == 1
    with pytest.raises(ValueError, match="holds a search with x = 1, not 2: choose another folder"):
        Journal(tmp_path, {"x": 2})
    assert Journal(None, {"x": 2})("key", compute) and len(calls) == 2


@pytest.mark.parametrize("torn", ['{"key": "b", "val', ""])
def test_a_line_that_was_being_written_is_dropped(tmp_path, torn):
    Journal(tmp_path, {"x": 1})("a", lambda: 1)
    with (tmp_path / FILE).open("a") as file:
        file.write(torn)
    again = Journal(tmp_path, {"x": 1})
    assert again.found == {"a": 1}
    assert again("b", lambda: 2) == 2 and Journal(tmp_path, {"x": 1}).found == {"a": 1, "b": 2}


def test_a_journal_whose_first_line_is_torn(tmp_path):
    (tmp_path / FILE).write_text('{"x"')
    assert Journal(tmp_path, {"x": 1})("a", lambda: 1) == 1
    assert Journal(tmp_path, {"x": 1}).found == {"a": 1}


@pytest.mark.parametrize("damaged", [b'{"x": 1}\nnonsense\n', b"[1]\n", b"3\n", b"\xff\xfe\n"])
def test_a_damaged_journal(tmp_path, damaged):
    (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged: choose another folder, or delete it"):
        Journal(tmp_path, {"x": 1})


# ---- judging --------------------------------------------------------------------------------------------------------
def test_numbers_of_a_row_are_those_of_its_pictures(pipe):
    setup = replace(SETUP, seed=50)
    numbers = Judge(pipe, setup, range(4), batch=2).score(
        [fewer(5), Row("hold", "fora", STEPS, dittocache.recipe("fora"))]
    )
    plain = draw(pipe, setup, range(4)).double()
    drawn = draw(pipe, replace(setup, num_steps=5), range(4)).double()
    with dittocache.enable(pipe, "fora"):
        held = draw(pipe, setup, range(4)).double()
    for found, pictures in zip(numbers, (drawn, held), strict=True):
        assert found["psnr"] == pytest.approx(-10 * float((pictures - plain).square().mean().log10()), abs=1e-3)
        assert found["speedup_low"] <= found["speedup"] <= found["speedup_high"]
    assert numbers[1]["compute_fraction"] < 0.6


def test_both_references(pipe):
    setup = replace(SETUP, seed=50)
    (own,) = Judge(pipe, setup, range(2), solution=100).score([fewer(8)])
    (against,) = Judge(pipe, setup, range(2), solution=100, against="solution").score([fewer(8)])
    assert own["psnr"] == against["psnr own"] and own["psnr solution"] == against["psnr"]
    truth = draw(pipe, replace(setup, num_steps=100), range(2)).double()
    drawn = draw(pipe, replace(setup, num_steps=8), range(2)).double()
    assert against["psnr"] == pytest.approx(-10 * float((drawn - truth).square().mean().log10()), abs=1e-3)


def test_a_judge_of_features(pipe):
    def look(pictures):
        return {"features": pictures.flatten(1), "probabilities": pictures.flatten(1)[:, :2]}

    (numbers,) = Judge(pipe, SETUP, range(6), batch=3, look=look).score([fewer(4)])
    both = [draw(pipe, replace(SETUP, num_steps=steps), range(6)).flatten(1) for steps in (4, STEPS)]
    assert numbers["fd"] == pytest.approx(frechet_distance(*both), rel=1e-3) and numbers["fd"] > 0


def test_a_speedup_is_the_uncached_time_over_the_rows(pipe):
    comparison, (numbers,) = Judge(pipe, SETUP, range(6), batch=2).compare([fewer(4)], list("abcdef"), {}, "4 steps")
    ratios = [a / b for a, b in zip(comparison.results[0].seconds, comparison.results[1].seconds, strict=True)]
    assert numbers["speedup"] == pytest.approx(sorted(ratios)[1], rel=0.1)


def test_every_stage_has_samples_of_its_own():
    """Other seeds, and other prompts for the last check."""
    text = bundled.load("emoji")
    prompts = ("red heart", "cat face", "rainbow", "dog face", "sun", "key", "pizza", "rocket")
    tuner = _Tuner(text, Goal(speedup=2.0), replace(SETUP, conditions=prompts), ["own"], [], "own", None,
                   EFFORT, None, None, "", None)  # fmt: skip

    def asked(judge: Judge) -> tuple[set, set]:
        conditions, seeds = zip(*(judge._asked(part) for part in judge.parts), strict=True)
        return {c for part in conditions for c in part}, {s for part in seeds for s in part}

    fitted = {SETUP.seed + j for j in range(EFFORT.samples + EFFORT.trial)}
    assert not asked(tuner.judge)[0] & asked(tuner.last)[0] and not {*tuner.fitting.conditions} & asked(tuner.last)[0]
    assert not asked(tuner.judge)[1] & asked(tuner.last)[1] and not fitted & (
        asked(tuner.judge)[1] | asked(tuner.last)[1]
    )


@pytest.mark.parametrize("size", [10, 11])
def test_pictures_that_are_large_enough_for_ssim(size):
    run = Run(np.zeros((1, size, 20, 1)), (torch.zeros(1),), 1.0)
    assert _structured(run) == (size == 11)


@pytest.mark.parametrize(
    ("goal", "table", "asked"),
    [
        (Goal("psnr", 30.0), lambda budget: {"psnr": 20 + 2 * budget, "speedup": 20 / budget}, [10, 5, 3, 4]),
        (Goal(speedup=2.0), lambda budget: {"psnr": 0, "speedup": 18 / budget}, [6, 7, 8, 9]),
        (Goal(speedup=2.0), lambda budget: {"psnr": 0, "speedup": 9 / budget}, [6, 4, 5]),
        # 5 % more than the goal is enough for a larger budget, and 4 % are not
        (Goal(speedup=2.0), lambda budget: {"psnr": 0, "speedup": {6: 2.11, 7: 2.0}[budget]}, [6, 7]),
        (Goal(speedup=2.0), lambda budget: {"psnr": 0, "speedup": {6: 2.09, 5: 2.5}[budget]}, [6, 5]),
    ],
)
def test_budgets_that_are_tried(pipe, goal, table, asked):
    tuner = _Tuner(pipe, goal, SETUP, ["own"], [], "own", None, EFFORT, None, None, "", None)
    seen: list[int] = []

    def judged(budget):
        seen.append(budget)
        return Contender(fewer(budget), table(budget))

    tuner._meet(judged, 2, 19)
    assert seen == asked


def test_plans_of_as_many_steps_are_equally_fast(pipe, monkeypatch):
    """A busy machine must not choose between them: the closer one is better, though it was measured to be too slow."""
    tuner = _Tuner(pipe, Goal(speedup=3.0), SETUP, ["own"], [], "own", None, EFFORT, None, None, "", None)
    measured = {
        "plain": (3.1, 40),
        "searched": (2.5, 42),
        "refined": (3.2, 44),
        "of three": (4.0, 30),
        "3 steps": (2.0, 50),
    }

    def contender(label, filled, grid):
        recipe = None if grid is None else Recipe(ReuseSteps(filled))
        return Contender(Row(label, "solver", STEPS, recipe), grid=grid)

    def score(rows, share):
        speed, psnr = measured[rows[0].label]
        return [{"speedup": speed, "psnr": psnr}]

    monkeypatch.setattr(tuner.judge, "score", score)
    first, second = tuple(range(4, STEPS)), tuple(range(3, STEPS - 1))
    found = [
        tuner._score(contender("plain", first, 0)),
        tuner._score(contender("searched", second, 0)),
        tuner._score(contender("of three", (1, *first), 0)),
        tuner._score(contender("3 steps", (), None)),
        tuner._score(contender("refined", second, 0)),
    ]
    speeds = {c.row.label: c.numbers["speedup"] for c in tuner.tried}
    assert speeds == {"plain": 3.1, "searched": 3.1, "refined": 3.1, "of three": 4.0, "3 steps": 2.0}
    assert [c.row.label for c in tuner._ranked(found)][:3] == ["refined", "searched", "plain"]
    measured["plain"] = (2.6, 40)
    tuner._score(found[0], 1.0)
    assert {c.numbers["speedup"] for c in tuner.tried if c.row.label in ("plain", "searched", "refined")} == {2.6}


def test_cheaper_plans_are_tried_more_often():
    """A search of three tenths of the steps draws as many as it was told; what it costs is about the same for all."""
    effort = replace(EFFORT, tries=30)
    assert [effort.plans(share) for share in (0.3, 0.15, 0.6)] == [30, 60, 15]
    assert replace(EFFORT, tries=1).plans(0.9) == 1 and replace(EFFORT, tries=0).plans(0.3) == 0


# ---- published methods ----------------------------------------------------------------------------------------------
def test_every_space_is_of_the_methods_own_parameters():
    for name, space in SPACES.items():
        for low_or_high in (0, 1):
            dittocache.recipe(name, **{p: ends[low_or_high] for p, ends in space.items()})


def test_exploring_finds_the_better_half():
    """A loss with a known best: interval 2 of FORA, and everything else is worse."""
    seen = []

    def judged(name, params):
        seen.append((name, params["interval"]))
        worse = 0 if name == "fora" else 10
        return {"speedup": 1.0, "error": worse + params["interval"]}

    explore(judged, 14, lambda numbers: numbers["error"], ("fora", "goc"))
    assert len(seen) == 14 and {name for name, _ in seen} == {"fora", "goc"}
    assert min(interval for name, interval in seen if name == "fora") == 2
    again, first = [], list(seen)
    seen.clear()
    explore(judged, 14, lambda numbers: numbers["error"], ("fora", "goc"))
    assert seen == first and not again, "the same seed, the same tries"


def test_a_method_that_does_not_go_with_the_model_is_passed_over():
    tried = []
    explore(lambda name, params: tried.append(name), 3, lambda numbers: 0.0, ("fora",))
    assert tried == ["fora"] * 3
    with pytest.raises(ValueError, match="'l2c' is not searched here; these are: fora, "):
        explore(lambda name, params: None, 1, lambda numbers: 0.0, ("l2c",))


def test_learned_factors_fit_better_than_holding(pipe):
    runs = record(pipe, SETUP, range(4))
    recipe = learned(runs, (0, 3, 6, 9), rounds=300)
    wanted = runs.predictions.flatten(1).double()
    for k in (5, 8, 11):
        history = [a for a in (9, 6, 3, 0) if a < k][:3]
        made = sum(c * wanted[a] for c, a in zip(recipe.fill.coefficients[k], history, strict=False))
        assert (made - wanted[k]).norm() < (wanted[history[0]] - wanted[k]).norm()


# ---- the whole search -----------------------------------------------------------------------------------------------
def test_a_largest_loss(pipe, loss, tmp_path):
    goal, said = Goal("psnr", loss), []
    found = tune(pipe, goal, SETUP, effort=EFFORT, out=tmp_path, progress=lambda done, total, what: said.append(what))
    assert found.numbers["psnr"] >= loss and found.met
    assert found.numbers["speedup"] > 1
    assert "about" in said[0] and "a picture" in said[0], "what it will cost is told first"
    methods = {one["method"] for one in found.tried}
    assert {"solver", "fewer steps"} < methods
    assert [r.label for r in found.comparison.results][:2] == ["uncached", found.row.label]
    assert not tiny.traces_of_cache(pipe.transformer)


def test_a_least_speedup_and_its_files(pipe, tmp_path):
    goal = Goal(speedup=1.1)  # far from what is possible, so that a busy machine does not matter
    found = tune(pipe, goal, SETUP, effort=EFFORT, out=tmp_path, model="tiny")
    save(found, goal, tmp_path, "tiny")
    told = json.loads((tmp_path / "tune.json").read_text())
    assert told["goal"] == "at least 1.1x faster, closest in psnr" and told["met"] == found.met
    assert {"label", "speedup", "psnr", "method"} <= set(told["tried"][0])
    assert Comparison.load(tmp_path).provenance["tried"]
    if found.row.recipe is not None:
        recipe = Recipe.from_pretrained(tmp_path)
        assert recipe.provenance["measured"][1]["label"] == found.row.label
        assert recipe.provenance["setup"]["num_steps"] == STEPS and recipe.provenance["model"] == "tiny"
        with dittocache.enable(pipe, tmp_path) as cache:
            draw(pipe, SETUP, [0])
            assert cache.trace.compute_fraction < 1
        with pytest.raises(ValueError, match="made for"), dittocache.enable(pipe, tmp_path):
            draw(pipe, replace(SETUP, num_steps=5), [0])


def test_other_schedulers_and_steps_are_searched_together(pipe):
    effort = replace(EFFORT, methods=0, tries=0)
    found = tune(
        pipe, Goal("psnr", 8.0), SETUP, schedulers=["own", "unipc"], steps=[12, 8], against="solution", solution=50,
        effort=effort,
    )  # fmt: skip
    plans = {(one["scheduler"], one["steps"]) for one in found.tried if one["method"] == "solver"}
    assert plans == {(None, 12), (None, 8), ("UniPCMultistepScheduler", 12), ("UniPCMultistepScheduler", 8)}
    assert all("psnr own" in one for one in found.tried)
    assert type(pipe.scheduler) is DDIMScheduler


def test_an_unreachable_budget_says_what_is_in_reach(pipe):
    with pytest.raises(Unreachable, match=r"a speed-up of 7 is out of reach: .* so that 6 is the most"):
        tune(pipe, Goal(speedup=7), SETUP, effort=EFFORT)
    with pytest.raises(Unreachable, match=r"nothing reaches psnr >= 150, .*; the best here: .*: [\d.]+x, psnr \d+"):
        tune(pipe, Goal("psnr", 150.0), SETUP, effort=replace(EFFORT, methods=0, tries=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"against": "truth"}, "pictures are compared with own or solution; got 'truth'"),
        ({"schedulers": ["nonsense"]}, "'nonsense' is no scheduler of diffusers"),
        ({"steps": [2]}, "a plan's steps must be a whole number, 3 or more; got 2"),
        ({"solution": 5}, "the steps of the solution must be a whole number, 13 or more; got 5"),
        ({"goal": Goal("fd", 1.0)}, "fd needs features: name a judge"),
        (
            {"goal": Goal("fd", 1.0), "look": print, "effort": replace(EFFORT, judged=1)},
            "fd needs two pictures at once",
        ),
        ({"goal": Goal("ssim", 0.9)}, "ssim needs pictures of 11 pixels or more; these have 8"),
        (
            {"schedulers": ["own", "FlowMatchEulerDiscreteScheduler"]},
            "FlowMatchEulerDiscreteScheduler does not predict as",
        ),
    ],
)
def test_what_cannot_be_tuned(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        tune(pipe, **{"goal": Goal(speedup=2.0), "setup": SETUP, "effort": EFFORT} | arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "samples must be a whole number, 1 or more; got 0"),
        ({"held_out": 1}, "held_out must be a whole number, 2 or more; got 1"),
        ({"tries": -1}, "tries must be a whole number, 0 or more; got -1"),
        ({"seconds": -1.0}, "the time budget in seconds must be a number at least 0; got -1.0"),
    ],
)
def test_efforts_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        Effort(**values)


def test_no_search_in_another_ones_folder(pipe, tmp_path):
    Journal(tmp_path, {"goal": "another"})
    with pytest.raises(ValueError, match="holds a search with "):
        tune(pipe, Goal(speedup=2.0), SETUP, effort=EFFORT, out=tmp_path)


def test_a_time_budget_ends_the_search(pipe):
    found = tune(pipe, GOAL, SETUP, effort=replace(EFFORT, seconds=0.0, tries=50, methods=50))
    assert {one["method"] for one in found.tried} <= {"solver", "fewer steps"}


def test_prompts_of_the_check_are_others():
    assert _split(("a", "b", "c", "d", "e")) == (("a", "b", "c", "e"), ("d",))
    assert _split(("a", "b")) == (("a", "b"), ("a", "b")) and _split((1, 2, 3, 4)) == ((1, 2, 3, 4), (1, 2, 3, 4))


def test_a_killed_search_goes_on(tmp_path):
    """Killed at its fifth result; what the journal holds is not drawn again, and the end is that of one in peace."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        import test_tuner as t
        from dittocache.tune import journal
        count, write = 0, journal.Journal._write
        def dying(self, line):
            global count
            write(self, line)
            count += 1
            if count == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        journal.Journal._write = dying
        t.tune(t.pipeline(), t.GOAL, t.SETUP, effort=t.EFFORT, out=sys.argv[1])
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], capture_output=True
    )
    assert ended.returncode == -9, ended.stderr.decode()[-500:]
    before = (tmp_path / FILE).read_text()
    assert len(before.splitlines()) == 5
    found = tune(pipeline(), GOAL, SETUP, effort=EFFORT, out=tmp_path)
    after = (tmp_path / FILE).read_text()
    assert after.startswith(before) and found.tried
    again = tune(pipeline(), GOAL, SETUP, effort=EFFORT, out=tmp_path)
    assert (tmp_path / FILE).read_text() == after, "everything is there"
    assert again.row.label == found.row.label


def test_warnings_are_not_for_searches(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        tune(pipe, GOAL, SETUP, effort=replace(EFFORT, methods=0, tries=1))


def test_a_pipeline_with_a_cache_is_refused(pipe):
    with dittocache.enable(pipe, "fora"), pytest.raises(ValueError, match="a cache is on"):
        tune(pipe, Goal(speedup=2.0), SETUP, effort=EFFORT)
    assert torch.is_tensor(draw(pipe, SETUP, [0]))


@pytest.mark.parametrize("speed", [2, 3, 4])
def test_the_saved_recipes_of_glyphs(speed):
    pipe = bundled.load("glyphs")
    pipe.set_progress_bar_config(disable=True)
    setup = Setup(num_steps=50, seed=12)
    plain = draw(pipe, setup, range(4)).double()
    with dittocache.enable(pipe, Path(__file__).parents[1] / "benchmarks" / "tuned" / f"{speed}x") as cache:
        error = float((draw(pipe, setup, range(4)).double() - plain).square().mean())
        assert cache.report().to_dict()["ideal_speedup"] > speed
    assert error < 1e-3, "30 dB: far from what fewer steps give"
