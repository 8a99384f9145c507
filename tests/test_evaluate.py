"""Metrics with known answers, what a comparison finds and says, and its files, whole and damaged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dittocache import bundled
from dittocache.bundled.judge import load_judge
from dittocache.evaluate import (
    Comparison,
    Result,
    compare,
    findings,
    frechet_distance,
    metrics,
    psnr,
    ssim,
    standard_rows,
)
from dittocache.evaluate.compare import cached, fewer, uncached
from dittocache.evaluate.comparison import FEWER_STEPS, UNCACHED


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- metrics --------------------------------------------------------------------------------------------------------
def test_psnr_of_noise_against_noise_is_7_8_decibels():
    # the mean squared difference of two independent uniform numbers is 1/6
    assert psnr(noise(200, 1, 32, 32), noise(200, 1, 32, 32, seed=1)) == pytest.approx(10 * math.log10(6), abs=0.05)


def test_psnr_pools_the_error_before_the_logarithm():
    reference = torch.zeros(2, 1, 8, 8)
    pictures = reference.clone()
    pictures[1] += 0.1  # one picture is equal, one has a squared error of 0.01
    assert psnr(pictures, reference) == pytest.approx(-10 * math.log10(0.005))


def test_equal_pictures():
    pictures = noise(3, 1, 32, 32)
    assert psnr(pictures, pictures) == math.inf
    assert ssim(pictures, pictures) == pytest.approx(1.0)


def test_ssim_falls_with_noise():
    pictures = noise(4, 1, 32, 32)
    slightly, badly = (
        ssim((pictures + s * (noise(4, 1, 32, 32, seed=2) - 0.5)).clamp(0, 1), pictures) for s in (0.1, 0.8)
    )
    assert 1 > slightly > badly > 0


@pytest.mark.parametrize("other", [(3, 1, 32, 31), (2, 1, 32, 32), (3, 32, 32)])
def test_pictures_that_do_not_pair_are_refused(other):
    with pytest.raises(ValueError, match="share a shape"):
        psnr(noise(3, 1, 32, 32), noise(*other))


def test_frechet_distance_of_equal_sets_is_zero():
    features = noise(50, 16)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shift_is_its_square():
    features = noise(50, 16).double()
    assert frechet_distance(features + 0.5, features) == pytest.approx(16 * 0.25)


def test_frechet_distance_of_diagonal_gaussians():
    # samples with exactly known mean and covariance: one pair of points at +-sqrt(d - 0.5) s_i on every axis
    def samples(deviations: torch.Tensor, mean: float) -> torch.Tensor:
        d = len(deviations)
        points = torch.cat([torch.diag(deviations), -torch.diag(deviations)]).double()
        return mean + points * math.sqrt((2 * d - 1) / 2)

    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    closed_form = 3 * 0.7**2 + ((a - b) ** 2).sum().item()  # |m1 - m2|^2 + sum (s1 - s2)^2
    assert frechet_distance(samples(a, 0.7), samples(b, 0.0)) == pytest.approx(closed_form)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy import linalg

    a, b = noise(300, 8).double(), (noise(200, 8, seed=1) @ noise(8, 8, seed=2)).double()
    root = linalg.sqrtm(torch.cov(a.T).numpy() @ torch.cov(b.T).numpy()).real
    expected = (
        (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * np.trace(root)
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_needs_samples_and_equal_widths():
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(noise(1, 4), noise(5, 4))
    with pytest.raises(ValueError, match="features are"):
        frechet_distance(noise(5, 4), noise(5, 3))


def test_accuracy():
    assert metrics.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


# ---- findings -------------------------------------------------------------------------------------------------------
def result(label: str, method: str, speedup: float, decibels: float | None, spread: float = 0.02) -> Result:
    return Result(
        label=label,
        method=method,
        steps=50,
        recipe=None if method in (UNCACHED, FEWER_STEPS) else {},
        summary=label,
        seconds=(1 / speedup,),
        compute_fraction=1 / speedup,
        speedup=speedup,
        speedup_low=speedup * (1 - spread),
        speedup_high=speedup * (1 + spread),
        psnr=decibels,
        ssim=None,
        frechet=None,
        accuracy=None,
        bytes_peak=0,
        plan=None,
    )


def comparison(*rows: Result) -> Comparison:
    plain = (result("uncached", UNCACHED, 1, None), result("25", FEWER_STEPS, 2, 40), result("12", FEWER_STEPS, 4, 34))
    pictures = np.zeros((2, 12, 12, 1), dtype=np.uint8)
    results = plain + rows
    return Comparison(results, {r.label: pictures for r in results}, ("A", "B"), (0, 1), {"model": "none"})


def test_fewer_steps_are_interpolated_in_the_logarithm_of_time_and_never_extrapolated():
    found = comparison()
    assert findings.fewer_steps_psnr(found, math.sqrt(8)) == pytest.approx(37)
    assert findings.fewer_steps_psnr(found, 2) == pytest.approx(40)
    assert findings.fewer_steps_psnr(found, 1.9) is None
    assert findings.fewer_steps_psnr(found, 4.1) is None


@pytest.mark.parametrize(
    ("decibels", "spread", "sentence"),
    [
        (39.0, 0.02, "DuCa draws 2 pictures 2.8× faster, and 2.0 dB closer to the originals than fewer steps"),
        (37.2, 0.05, "come out even here: DuCa, the best caching row at 2.8×, is 0.2 dB ahead, less than the clock"),
        (36.8, 0.05, "come out even here: DuCa, the best caching row at 2.8×, is 0.2 dB behind, less than the clock"),
        (36.0, 0.02, "Taking fewer steps wins here: DuCa, the best caching row at 2.8×, is 1.0 dB further"),
    ],
)
def test_the_headline_says_what_was_found_whichever_way_it_went(decibels, spread, sentence):
    rows = result("DuCa", "duca", math.sqrt(8), decibels, spread), result("FORA", "fora", 3, 30)
    assert sentence in findings.headline(comparison(*rows))


def test_the_headline_without_anything_comparable():
    assert "No caching row" in findings.headline(comparison(result("ToCa", "toca", 1.2, 45)))


def test_a_row_that_fewer_steps_beat_in_speed_and_closeness_has_lost():
    """Also where no measured number of steps is as slow; a number of steps that another beats counts for nothing."""
    slow = result("ToCa", "toca", 1.2, 30)
    assert findings.gain(comparison(slow), slow) == -10
    between = result("FORA", "fora", math.sqrt(8), 37)
    worse = result("3 steps", "fewer steps", 2.5, 20)
    assert findings.gain(comparison(between, worse), between) == findings.gain(comparison(between), between)


def test_a_faster_and_closer_number_of_steps_counts_in_place_of_a_slower_one():
    """A row between the two is compared with the better; one that is slower than all of them with none."""
    worse = result("33 steps", "fewer steps", 1.4, 20)  # comparison() has 2x and 4x
    between, slower = result("GOC", "goc", 1.5, 60), result("GOC", "goc", 1.3, 60)
    assert findings.gain(comparison(between, worse), between) == 60 - findings.fewer_steps_psnr(comparison(), 2.0)
    assert findings.gain(comparison(slower, worse), slower) is None


# ---- files ----------------------------------------------------------------------------------------------------------
def test_files_come_back_as_they_were(tmp_path):
    before = comparison(result("DuCa", "duca", 3, math.inf))
    before.save(tmp_path / "new" / "folder")
    after = Comparison.load(tmp_path / "new" / "folder")
    assert after.to_dict() == before.to_dict()
    assert after.results == before.results
    assert all(np.array_equal(after.pictures[label], pictures) for label, pictures in before.pictures.items())
    assert {path.suffix for path in (tmp_path / "new" / "folder").iterdir()} == {".json", ".safetensors"}


def damage_json(folder, change):
    data = json.loads((folder / "comparison.json").read_text())
    change(data)
    (folder / "comparison.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "comparison.json").unlink(), "comparison.json is missing"),
        (lambda f: (f / "pictures.safetensors").unlink(), "pictures.safetensors is missing"),
        (lambda f: (f / "comparison.json").write_text("{"), "comparison.json is damaged"),
        (lambda f: (f / "comparison.json").write_bytes(b"\xff\xfe"), "comparison.json is damaged"),
        (lambda f: (f / "comparison.json").write_text("[]"), "not a comparison: format is 'list'"),
        (lambda f: (f / "comparison.json").write_text('{"format": "other"}'), "not a comparison: format is 'other'"),
        (lambda f: (f / "pictures.safetensors").write_bytes(b"PK"), "pictures.safetensors is damaged"),
        (lambda f: damage_json(f, lambda d: d.pop("results")), "damaged comparison: KeyError"),
        (lambda f: damage_json(f, lambda d: d["results"][0].pop("seconds")), "damaged comparison: KeyError"),
        (
            lambda f: damage_json(f, lambda d: d["results"][0].update(speedup="fast")),
            "speedup of row 'uncached' is 'fast'",
        ),
        (lambda f: damage_json(f, lambda d: d.update(results=[])), "it has no rows"),
        (lambda f: damage_json(f, lambda d: d["results"][0].update(label="x")), "pictures of row 'x'"),
        (lambda f: damage_json(f, lambda d: d["labels"].append("C")), "3 pictures of row 'uncached'"),
        (lambda f: damage_json(f, lambda d: d["results"][1].update(plan={"format": 1})), "not a plan"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(tmp_path, damage, message):
    comparison().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as caught:
        Comparison.load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- measuring, on the real model -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def measured(bundled_pipe):
    from dittocache.bundled.judge import load_judge

    calls = []
    rows = [uncached(6), fewer(3), cached("none", 6), cached("fora", 6, "FORA", interval=2), cached("duca", 6)]
    found = compare(
        bundled_pipe,
        rows,
        [0, 1, 2],
        [5, 6, 7],
        chunk=2,
        judge=load_judge(),
        names="ABC",
        model="glyphs",
        progress=lambda *call: calls.append(call),
    )
    return found, calls


def test_compare_measures_every_row(measured):
    found, _ = measured
    rows = {r.label: r for r in found.results}
    assert list(rows) == ["uncached", "3 steps", "none", "FORA", "duca"]
    assert all(len(r.seconds) == 2 and r.speedup_low <= r.speedup <= r.speedup_high for r in rows.values())
    assert rows["uncached"].speedup == rows["uncached"].ideal_speedup == rows["uncached"].efficiency == 1
    assert rows["uncached"].psnr is rows["uncached"].frechet is None
    assert rows["3 steps"].ideal_speedup == 2
    assert rows["none"].psnr == math.inf and rows["none"].compute_fraction == 1
    assert 0.5 < rows["FORA"].compute_fraction < 1 and rows["FORA"].bytes_peak > 0
    assert 10 < rows["FORA"].psnr < 100 and 0 < rows["FORA"].ssim < 1 and rows["FORA"].frechet > 0
    assert rows["FORA"].efficiency == pytest.approx(rows["FORA"].speedup / rows["FORA"].ideal_speedup)
    assert len(rows["FORA"].plan["table"]) == 6
    assert all(p.shape == (3, 32, 32, 1) and p.dtype == np.uint8 for p in found.pictures.values())


def test_compare_pairs_labels_and_seeds(measured, bundled_pipe):
    found, _ = measured
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    again = bundled_pipe(
        [0, 1, 2], num_inference_steps=6, guidance_scale=1.5, generator=generators, output_type="np"
    ).images
    difference = np.abs(np.rint(again * 255) - found.pictures["uncached"])
    assert difference.max() <= 1
    assert found.labels == ("A", "B", "C") and found.seeds == (5, 6, 7)


def test_compare_rotates_the_order_and_tells_its_progress(measured):
    _, calls = measured
    names = [name for _, _, name in calls]
    assert names[5:10] == ["uncached", "3 steps", "none", "FORA", "duca"]
    assert names[10:15] == ["3 steps", "none", "FORA", "duca", "uncached"]
    assert [done for done, _, _ in calls] == list(range(16)) and calls[-1][1] == 15


def test_compare_leaves_the_pipeline_untouched(measured, bundled_pipe):
    assert not hasattr(bundled_pipe.transformer.transformer_blocks[0].attn1, "_diffusers_hook")
    assert type(bundled_pipe.scheduler).__module__.startswith("diffusers")


def test_compare_keeps_its_provenance(measured, tmp_path):
    found, _ = measured
    made = Comparison.load(found.save(tmp_path)).provenance
    assert made["model"] == "glyphs" and made["steps"] == 6 and made["threads"] >= 1 and made["machine"]
    assert made["versions"]["torch"] and "M parameters" in made["network"]


def test_compare_refuses_what_cannot_be_compared(bundled_pipe):
    with pytest.raises(ValueError, match="one seed for every condition"):
        compare(bundled_pipe, [uncached(4)], [0, 1], [0])
    with pytest.raises(ValueError, match="first row is the reference"):
        compare(bundled_pipe, [cached("fora", 4)], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="a label of its own"):
        compare(bundled_pipe, [uncached(4), uncached(4)], [0, 1], [0, 1])


def test_compare_of_a_model_with_prompts():
    pipe, asked = bundled.load("emoji"), bundled.questions("emoji", 3)
    pipe.set_progress_bar_config(disable=True)
    arguments = pipe, [uncached(6), cached("fora", 6, interval=2)], asked.conditions, [0, 1, 2]
    with pytest.raises(ValueError, match="pass classes for prompts such as 'grinning face"):
        compare(*arguments, judge=load_judge("emoji"))
    found = compare(*arguments, judge=load_judge("emoji"), classes=asked.classes)
    assert found.labels == tuple(asked.names) and found.provenance["guidance_scale"] == 2.0
    assert [r.accuracy for r in found.results] == [1, 1], "the judge reads what was asked for"
    assert found.pictures["uncached"].shape == (3, 16, 16, 3)


def test_questions_are_spread_over_all():
    assert bundled.questions("glyphs", 3).names == ["A", "M", "Y"]
    many = bundled.questions("glyphs", 38)
    assert many.conditions == many.classes == [*range(36), 0, 1]
    asked = bundled.questions("emoji", 10)
    assert asked.conditions == asked.names and set(asked.names) <= set(bundled.emoji_names())
    assert asked.classes == sorted(set(asked.classes))


def test_the_standard_rows_show_every_method_twice():
    rows = standard_rows(50)
    assert rows[0] == uncached(50)
    assert [r.steps for r in rows if r.method == FEWER_STEPS] == [40, 33, 25, 17, 13, 10]
    assert [r.method for r in rows if r.recipe] == [
        m for m in ("fora", "toca", "duca", "goc", "taylorseer") for _ in range(2)
    ]
