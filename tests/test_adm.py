"""The protocol of guided-diffusion's evaluator: statistics that add up, its files, its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dittocache.evaluate import adm, metrics
from dittocache.evaluate.features import load
from dittocache.evaluate.inception import Inception


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seen(n: int, seed: int = 0, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """What the metric `inception` returns, with few dimensions."""
    return {
        "features": noise(n, 6, seed=seed) + shift,
        "spatial": noise(n, 4, seed=seed + 100) + shift,
        "probabilities": (5 * noise(n, 3, seed=seed + 200)).softmax(1),
    }


def whole(*batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def statistics() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in adm.STATISTICS.items()}


def levels(n: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


# ---- running statistics ---------------------------------------------------------------------------------------------
def test_running_moments_are_those_of_the_whole():
    features = noise(50, 5) + 3
    running, other = adm.RunningMoments(), adm.RunningMoments()
    for part in features[:30].split(7):
        running.add(part)
    other.add(features[30:])
    other.merge(running)
    mean, covariance = other.moments()
    assert other.count == 50
    assert covariance.dtype == torch.float64
    torch.testing.assert_close(mean, features.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance, torch.cov(features.double().T), rtol=1e-10, atol=1e-13)


def test_moments_of_one_sample_are_refused():
    running = adm.RunningMoments()
    running.add(noise(1, 5))
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        running.moments()


def test_merged_shards_are_the_whole():
    batches = [seen(20, seed=n) for n in range(3)]
    together, first, second = adm.Activations(), adm.Activations(), adm.Activations()
    for batch in batches:
        together.add(batch)
    first.add(batches[0])
    for batch in batches[1:]:
        second.add(batch)
    first.merge(second)
    assert len(first) == len(together) == 60
    references = seen(30, seed=9)
    reference = adm.Reference(
        metrics.moments(references["features"]), metrics.moments(references["spatial"]), references["features"]
    )
    one, other = adm.evaluate(together, reference), adm.evaluate(first, reference)
    assert one.fid == pytest.approx(other.fid, rel=1e-10)
    assert one.sfid == pytest.approx(other.sfid, rel=1e-10)
    assert (one.inception_score, one.precision, one.recall) == (other.inception_score, other.precision, other.recall)


# ---- the numbers ----------------------------------------------------------------------------------------------------
def test_the_numbers_are_those_of_the_metrics():
    samples, references = whole(seen(40), seen(40, seed=1, shift=0.1)), seen(30, seed=2)
    found = adm.Activations()
    found.add(samples)
    pool, spatial = metrics.moments(references["features"]), metrics.moments(references["spatial"])
    numbers = adm.evaluate(found, adm.Reference(pool, spatial, references["features"]))
    assert numbers.fid == pytest.approx(metrics.frechet_distance(samples["features"], pool), rel=1e-9)
    assert numbers.sfid == pytest.approx(metrics.frechet_distance(samples["spatial"], spatial), rel=1e-9)
    assert abs(numbers.fid - numbers.sfid) > 1e-3
    assert numbers.inception_score == pytest.approx(metrics.inception_score(samples["probabilities"], 1))
    wanted = metrics.precision_recall(samples["features"], references["features"], k=3)
    assert (numbers.precision, numbers.recall) == wanted
    assert wanted[0] != wanted[1]
    assert numbers.samples == 80


def test_without_pictures_there_is_no_precision():
    found = adm.Activations()
    found.add(seen(10))
    reference = adm.Reference(found.pool.moments(), found.spatial.moments(), None)
    numbers = adm.evaluate(found, reference)
    assert numbers.precision is None
    assert numbers.recall is None
    assert numbers.fid == pytest.approx(0, abs=1e-9)


def test_the_inception_score_is_taken_over_parts_of_5000():
    # the first 5,000 are of one class, the 2,500 after them of two: mean of 1 and 2
    rows = torch.eye(2)[[0] * 5000 + [0, 1] * 1250]
    found = adm.Activations()
    found.add({"features": noise(7500, 2), "spatial": noise(7500, 2), "probabilities": rows})
    reference = adm.Reference(found.pool.moments(), found.spatial.moments(), None)
    assert adm.evaluate(found, reference).inception_score == pytest.approx(1.5)


def test_too_few_samples():
    found = adm.Activations()
    found.add(seen(3))
    with pytest.raises(ValueError, match="the number of samples must be a whole number, 4 or more; got 3"):
        adm.evaluate(found, adm.Reference(found.pool.moments(), found.spatial.moments(), None))


def test_labels_do_not_depend_on_who_draws():
    drawn = adm.labels()
    assert drawn.shape == (50_000,)
    assert drawn.unique().tolist() == list(range(1000))
    assert torch.equal(drawn, adm.labels())
    assert not torch.equal(drawn, adm.labels(seed=1))


# ---- files ----------------------------------------------------------------------------------------------------------
def test_pictures_are_written_as_the_evaluator_reads_them(tmp_path):
    data, path = levels(11), tmp_path / "samples.npz"
    pictures = torch.from_numpy(data).permute(0, 3, 1, 2) / 255
    adm.write_pictures(path, pictures.split(4), 11)
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], data)
    assert adm.count_pictures(path) == 11
    batches = list(adm.pictures(path, batch=3))
    assert [len(batch) for batch in batches] == [3, 3, 3, 2]
    torch.testing.assert_close(torch.cat(batches), pictures)


def test_pictures_of_compressed_files(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", levels(5))
    assert torch.equal(
        torch.cat(list(adm.pictures(tmp_path / "a.npz"))),
        torch.from_numpy(levels(5) / np.float32(255)).permute(0, 3, 1, 2),
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([4, 4], "wanted 9 pictures; got 8"), ([4, 6], "wanted 9 pictures of .* got 10"), ([], "got 0")],
)
def test_a_wrong_count_leaves_no_file(tmp_path, sizes, message):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        adm.write_pictures(path, [noise(n, 3, 8, 8) for n in sizes], 9)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]
    assert path.read_bytes() == b"old"


def test_pictures_of_several_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"of \(8, 8, 3\); got 4, of \(9, 8, 3\)"):
        adm.write_pictures(tmp_path / "a.npz", [noise(2, 3, 8, 8), noise(2, 3, 9, 8)], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.zeros(3)}, r"has neither mu, sigma, mu_s, sigma_s nor pictures arr_0; it has other"),
        ({"mu": np.zeros(2048), "arr_0": levels(9)}, "has mu but lacks sigma, mu_s, sigma_s"),
        (statistics() | {"mu_s": np.zeros(2048)}, r"mu_s must be floats \[2023\]; got float64 \[2048\]"),
        ({"arr_0": levels(9).astype(np.float32)}, r"arr_0 must be uint8 \[n, h, w, 3\]; got float32 \[9, 8, 8, 3\]"),
        ({"arr_0": levels(9)[..., 0]}, r"got uint8 \[9, 8, 8\]"),
        ({"arr_0": np.asfortranarray(levels(9))}, "in Fortran order"),
        ({"arr_0": levels(3)}, "needs more than 3 pictures; got 3"),
        ({"arr_0": np.array([{}, 1], dtype=object)}, r"got object \[2\]"),
    ],
)
def test_bad_references_are_refused_by_their_headers(tmp_path, content, message):
    np.savez(tmp_path / "reference.npz", **content)
    with pytest.raises(ValueError, match=message) as caught:
        adm.check_reference(tmp_path / "reference.npz")
    assert "\n" not in str(caught.value)


def test_what_is_no_npz_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a npz file"):
        adm.check_reference(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a npz file"):
        adm.check_reference(tmp_path / "text.npz")
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="lacks arr_0; it has other"):
        adm.count_pictures(tmp_path / "a.npz")


# ---- all of it ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(Inception().state_dict(), path)
    return load("inception", {"inception": path})


def test_a_reference_with_statistics_and_pictures(inception, tmp_path):
    path = tmp_path / "reference.npz"
    given = statistics() | {"mu": np.arange(2048.0), "arr_0": levels(4), "arr_1": np.zeros(4)}
    np.savez(path, **given)
    reference = adm.read_reference(path, inception)
    assert reference.pool[0].tolist() == given["mu"].tolist()  # of the file, not of the pictures
    assert reference.spatial[1].shape == (2023, 2023)
    pictures = torch.from_numpy(levels(4)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(reference.features, inception(pictures)["features"])


def test_a_reference_of_pictures_only(inception, tmp_path):
    np.savez(tmp_path / "reference.npz", levels(5))
    reference = adm.read_reference(tmp_path / "reference.npz", inception, batch=2)
    wanted = inception(torch.from_numpy(levels(5)).permute(0, 3, 1, 2) / 255)
    for found, name in ((reference.pool, "features"), (reference.spatial, "spatial")):
        mean, covariance = metrics.moments(wanted[name])
        torch.testing.assert_close(found[0], mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found[1], covariance, rtol=1e-3, atol=1e-8)


@pytest.mark.slow
def test_samples_against_themselves(inception, tmp_path):
    path = tmp_path / "samples.npz"
    adm.write_pictures(path, noise(6, 3, 16, 16).split(4), 6)
    samples = adm.gather(adm.pictures(path, batch=4), inception)
    numbers = adm.evaluate(samples, adm.read_reference(path, inception))
    scale = samples.pool.moments()[1].trace().item()
    assert numbers.fid == pytest.approx(0, abs=1e-3 * scale)
    assert (numbers.precision, numbers.recall, numbers.samples) == (1, 1, 6)
    assert numbers.inception_score >= 1
