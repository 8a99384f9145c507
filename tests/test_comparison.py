"""Further measures, intervals and errors by step in a comparison's files; several comparisons side by side."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from dittocache.evaluate import Comparison, Result, findings
from dittocache.evaluate.compare import cached, compare, fewer, uncached
from dittocache.evaluate.comparison import FEWER_STEPS, UNCACHED, Score, side_by_side
from dittocache.evaluate.rows import Row, run_row
from dittocache.evaluate.steps import step_errors


def result(label: str, method: str, **more) -> Result:
    values = {
        "steps": 4, "recipe": None, "summary": label, "seconds": (1.0,), "compute_fraction": 0.5, "speedup": 1.9,
        "speedup_low": 1.8, "speedup_high": 2.0, "psnr": 30.0, "ssim": None, "frechet": None, "accuracy": None,
        "bytes_peak": 0, "plan": None,
    }  # fmt: skip
    return Result(label=label, method=method, **values | more)


def comparison(*rows: Result, seed: int = 0, **made) -> Comparison:
    results = (result("uncached", UNCACHED, psnr=None), *rows)
    generator = np.random.default_rng(seed)
    pictures = {r.label: generator.integers(0, 256, (2, 4, 4, 1), dtype=np.uint8) for r in results}
    return Comparison(results, pictures, ("A", "B"), (0, 1), made)


@pytest.fixture
def full() -> Comparison:
    scores = {
        "psnr": Score(value=math.inf, low=31.5, high=math.inf),
        "latent error": Score(value=0.25, low=None, high=None),
    }
    deltas = {"psnr": Score(value=-math.inf, low=-math.inf, high=1.0)}
    row = result("ToCa", "toca", psnr=math.inf, scores=scores, deltas=deltas, step_errors=(0.0, 0.1, 0.2, 0.25))
    return comparison(row, baseline="uncached", tried=[{"x": 1.5, "y": 33.0, "label": "one"}])


# ---- files ----------------------------------------------------------------------------------------------------------
def test_all_comes_back_as_it_was(full, tmp_path):
    after = Comparison.load(full.save(tmp_path))
    assert after.results == full.results and after.provenance == full.provenance
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON


def test_files_from_before_there_were_scores_load(full, tmp_path):
    full.save(tmp_path)
    data = json.loads((tmp_path / "comparison.json").read_text())
    for row in data["results"]:
        for name in ("scores", "deltas", "step_errors"):
            del row[name]
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    row = Comparison.load(tmp_path).results[1]
    assert (row.scores, row.deltas, row.step_errors) == ({}, {}, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["results"][1]["scores"]["latent error"].update(value="bad"), "latent error of row 'ToCa' is"),
        (lambda d: d["results"][1]["scores"]["latent error"].update(low=math.nan), "latent error of row 'ToCa' is"),
        (lambda d: d["results"][1]["deltas"]["psnr"].pop("value"), "KeyError('value')"),
        (lambda d: d["results"][1].update(scores=[1]), "AttributeError"),
        (lambda d: d["results"][1].update(step_errors=[0.1, math.nan]), "step_errors of row 'ToCa' is [0.1, nan]"),
        (lambda d: d["results"][1].update(seconds=["long"]), "seconds of row 'ToCa' is ['long']"),
        (lambda d: d["results"][1].update(bytes_peak=None), "bytes_peak of row 'ToCa' is None"),
        (lambda d: d["seeds"].append(2), "3 seeds for 2 pictures"),
        (lambda d: d["provenance"]["tried"][0].update(y=None), "what was tried has no place in a chart"),
        (lambda d: d["provenance"].update(tried=[1]), "TypeError"),
    ],
)
def test_damaged_numbers_are_one_clear_line(full, tmp_path, change, message):
    full.save(tmp_path)
    data = json.loads((tmp_path / "comparison.json").read_text())
    change(data)
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    with pytest.raises(ValueError) as caught:
        Comparison.load(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("pictures", [np.zeros((2, 4, 5, 1), np.uint8), np.zeros((2, 4, 4, 1), np.float32)])
def test_pictures_that_do_not_pair_are_refused(full, tmp_path, pictures):
    dataclasses.replace(full, pictures=full.pictures | {"ToCa": pictures}).save(tmp_path)
    with pytest.raises(ValueError, match=r"pictures of row 'ToCa' are .*, expected uint8 \[2, 4, 4, 1\]"):
        Comparison.load(tmp_path)


# ---- measures -------------------------------------------------------------------------------------------------------
def test_a_score_is_found_by_name_with_its_interval(full):
    row = full.results[1]
    assert row.score("psnr") == {"value": math.inf, "low": 31.5, "high": math.inf}
    assert row.score("ssim") is None
    assert result("x", "fora").score("psnr") == {"value": 30.0, "low": None, "high": None}


def test_measures_stand_in_their_order_and_unknown_ones_last():
    scores = {"sharpness": Score(value=3.0, low=None, high=None), "lpips": Score(value=0.1, low=None, high=None)}
    told = {"sharpness": {"title": "Sharpness", "unit": "px", "better": "lower"}}
    found = findings.measures(comparison(result("a", "fora", ssim=0.9, scores=scores), measures=told))
    assert [m.name for m in found] == ["psnr", "ssim", "lpips", "sharpness"]
    assert found[-1].full_title == "Sharpness, px" and found[-1].lower


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("psnr", 31.04, "31.0"), ("psnr", -math.inf, "−∞"), ("accuracy", 0.975, "98 %"), ("lpips", 2e-5, "2.0e−05"),
     ("frechet", 0.0, "0.00"), ("recall", None, "–")],
)  # fmt: skip
def test_values_as_texts(name, value, text):
    assert next(m for m in findings.MEASURES if m.name == name).text(value) == text


def test_without_fewer_steps_the_headline_is_about_the_fastest_row():
    found = comparison(result("slow", "fora"), result("fast", "fora", speedup=3.0, psnr=25.0))
    assert findings.headline(found) == "2 pictures, drawn up to 3.0× faster: fast, 25.0 dB from the originals."


# ---- side by side ---------------------------------------------------------------------------------------------------
def test_rows_of_the_same_samples_stand_side_by_side():
    delta = {"psnr": Score(value=1.0, low=0.5, high=1.5)}
    a = comparison(result("x", "fora"), baseline="x", tried=[{"x": 1, "y": 2, "label": "one"}])
    b = comparison(result("x", FEWER_STEPS), result("y", "toca", deltas=delta), command="b", baseline="x", tried=[
        {"x": 3, "y": 4, "label": "two"}])  # fmt: skip
    both = side_by_side([a, b], ["one", "two"])
    assert [r.label for r in both.results] == ["uncached", "x", "x (two)", "y"]
    assert np.array_equal(both.pictures["y"], b.pictures["y"])
    assert both.results[3].deltas == delta
    assert [point["label"] for point in both.provenance["tried"]] == ["one", "two"]
    assert both.provenance["name"] == "one" and both.provenance["others"][0]["command"] == "b"
    other_baseline = dataclasses.replace(b, provenance={"baseline": "y"})
    assert side_by_side([a, other_baseline], ["one", "two"]).results[3].deltas == {}


def test_one_comparison_stays_as_it_is(full):
    assert side_by_side([full], ["one"]).to_dict() == full.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("A", "C")}, "one and two cannot stand side by side: they drew other labels"),
        ({"seeds": (0, 2)}, "one and two cannot stand side by side: they drew from other seeds"),
        ({"pictures": {"uncached": np.zeros((2, 4, 4, 1), np.uint8)}}, "pictures of their references are not equal"),
    ],
)
def test_other_samples_are_refused(change, message):
    a = comparison()
    with pytest.raises(ValueError, match=message):
        side_by_side([a, dataclasses.replace(a, **change)], ["one", "two"])


def test_a_name_that_occurs_twice_is_refused(full):
    with pytest.raises(ValueError, match="need names of their own; got a, a"):
        side_by_side([full, full], ["a", "a"])


# ---- error against step ---------------------------------------------------------------------------------------------
def errors_of(pipe, rows, conditions, seeds, guidance=1.5):
    return step_errors(rows, (run_row(pipe, row, conditions, seeds, guidance, every_step=True) for row in rows))


def test_errors_by_step_start_at_zero(bundled_pipe):
    other = Row("solver", "fewer steps", 6, scheduler="DPMSolverMultistepScheduler")
    rows = [uncached(6), fewer(3), cached("none", 6), cached("fora", 6, "FORA", interval=3), other]
    found = errors_of(bundled_pipe, rows, [0, 1, 2], [5, 6, 7])
    assert set(found) == {"none", "FORA"}  # fewer or other steps have none to compare with
    assert found["none"] == (0.0,) * 6
    assert len(found["FORA"]) == 6 and found["FORA"][0] == 0  # the first step is computed
    assert all(0 < error < 1 for error in found["FORA"][2:])


def test_errors_by_step_are_those_that_a_callback_sees(bundled_pipe):
    import torch

    from dittocache import enable

    def draw() -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        latents = []

        def keep(pipe, step, timestep, inputs):
            latents.append(inputs["latents"])
            return inputs

        bundled_pipe([0, 1], num_inference_steps=4, guidance_scale=1.5, generator=generators, callback_on_step_end=keep)
        return latents

    rows = [uncached(4), cached("fora", 4, interval=2)]
    found = errors_of(bundled_pipe, rows, [0, 1], [5, 6])
    reference = draw()
    with enable(bundled_pipe, rows[1].recipe):
        drawn = draw()
    wanted = [float((x - r).norm() / r.norm()) for x, r in zip(drawn, reference)]
    assert found[rows[1].label] == pytest.approx(wanted, rel=1e-4)
    assert wanted[-1] > 0


def test_a_comparison_has_errors_by_step(bundled_pipe):
    rows = [uncached(4), fewer(2), cached("fora", 4, interval=2)]
    found = compare(bundled_pipe, rows, [0, 1, 2], [5, 6, 7], chunk=2)
    wanted = errors_of(bundled_pipe, [rows[0], rows[2]], [0, 1], [5, 6])  # no more at once than are drawn at once
    assert [row.step_errors for row in found.results] == [None, None, wanted[rows[2].label]]
