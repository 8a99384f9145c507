"""The command line, on the real bundled model: what it prints and writes, and how it refuses wrong arguments."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import dittocache
from dittocache.cli import app

COMMANDS = ("demo", "report", "bench", "sample", "eval", "tune", "calibrate", "train", "methods", "describe", "doctor")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Relative paths end in a fresh folder, and the number of threads stays what it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder that a small demo wrote, and what the command printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return folder, run("demo", "--out", folder, "--pictures", 3, "--steps", 10)


# ---- help and version -----------------------------------------------------------------------------------------------
def test_version():
    assert run("--version").stdout == f"dittocache {dittocache.__version__}\n"


def test_without_a_command_it_shows_its_help():
    assert all(name in run().stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    text = run(command, "--help").stdout
    assert "Examples" in text and f"dittocache {command}" in text


# ---- wrong arguments ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["demo", "--nonsense"], "No such option: --nonsense"),
        (["demo", "--pictures", "many"], "--pictures"),
        (["demo", "--pictures", "1"], "--pictures"),
        (["demo", "--steps", "3"], "--steps"),
        (["demo", "--out", "file"], "file"),
        (["demo", "--device", "abacus"], "no device 'abacus'"),
        (["report"], "Missing argument"),
        (["report", "nowhere"], "nowhere holds no comparison: comparison.json is missing"),
        (["report", "damaged"], "comparison.json is damaged"),
        (["bench", "--method", "nope"], "unknown method 'nope'; known: "),
        (["bench", "-p", "interval=2"], "--param needs --method"),
        (["sample", "--method", "nope"], "unknown method 'nope'; known: "),
        (["sample", "--method", "fora", "-p", "interval"], "a parameter is NAME=VALUE, not 'interval'"),
        (["sample", "--method", "fora", "-p", "interval=0"], "interval must be a whole number, 1 or more; got 0"),
        (
            ["sample", "--method", "fora", "-p", "interval=three"],
            "interval must be a whole number, 1 or more; got 'three'",
        ),
        (["sample", "--method", "fora", "-p", "speed=2"], "fora has no parameter 'speed'; known: interval, anchor"),
        (["sample", "--method", "damaged"], "no saved recipe at 'damaged'"),
        (["sample", "--labels", "A!"], "class_labels contains '!'"),
        (["sample", "--labels", ""], "class_labels is empty"),
        (["sample", "--model", "emoji", "--labels", " ,"], "prompt is empty; give at least one text"),
        (["sample", "--model", "nope"], "unknown bundled model 'nope'; known: emoji, glyphs"),
        (["demo", "--model", "nope"], "unknown bundled model 'nope'; known: emoji, glyphs"),
        (["sample", "--guidance", "nan"], "guidance_scale is nan"),
        (["sample", "--out", "nowhere/a.png"], "there is no folder 'nowhere'"),
        (["sample", "--out", "picture.doc"], "'picture.doc' does not end like a picture's file"),
        (["sample", "--plan-out", "plan.png"], "--plan-out needs --method"),
        (["methods", "nope"], "unknown method 'nope'; known: "),
        (
            ["describe", "Nope"],
            "'Nope' is neither a bundled model (emoji, glyphs), nor a class of diffusers, nor a folder",
        ),
        (["describe", "DDIMScheduler"], "'DDIMScheduler' is not a network"),
        (["describe", "ZImageControlNetModel"], "cannot be built from its default configuration"),
        (["describe", "AutoencoderKL"], "nothing to cache"),
        (["describe", "damaged"], "holds no transformer"),
        (["describe", "foreign"], "config.json' is damaged, or not a config of diffusers"),
        (["doctor", "--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, name in (
        ("damaged", "comparison.json"),
        ("damaged", "pictures.safetensors"),
        ("foreign", "config.json"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("no JSON")
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


# ---- demo and report ------------------------------------------------------------------------------------------------
def test_demo_prints_a_table_and_writes_page_numbers_and_pictures(demo):
    folder, result = demo
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "index.html", "pictures.safetensors"]
    for row in ("uncached", "5 steps", "FORA mild", "ToCa strong", "DuCa strong"):
        assert row in result.stdout
    assert str(folder / "index.html") in result.stdout.replace("\n", "")


def test_report_writes_the_same_page_again(demo, tmp_path):
    folder, _ = demo
    page = (folder / "index.html").read_text()
    run("report", folder, "--out", "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_report_as_json(demo):
    found = json.loads(run("report", demo[0], "--json").stdout)
    assert found["results"][0]["label"] == "uncached"
    assert found["results"][-1]["efficiency"] > 0


# ---- bench, sample --------------------------------------------------------------------------------------------------
def test_bench_measures_one_method():
    arguments = ["--method", "fora", "-p", "interval=2", "--batch", 1, "--repeats", 2, "--steps", 4]
    found = json.loads(run("bench", *arguments, "--json").stdout)
    assert [r["label"] for r in found["results"]] == ["uncached", "none", "fora(interval=2)"]
    assert all(len(r["seconds"]) == 2 for r in found["results"])
    assert "fora(interval=2)" in run("bench", *arguments).stdout


def test_sample_draws_without_caching(tmp_path):
    result = run("sample", "--labels", "AB", "--steps", 4)
    assert "2 pictures in" in result.stdout and "sample.png" in result.stdout
    assert Image.open(tmp_path / "sample.png").size == (2 * 32 * 4, 32 * 4)


def test_sample_draws_emoji(tmp_path):
    result = run("sample", "--model", "emoji", "--labels", "red heart, , cat face", "--steps", 4, "--method", "pab")
    assert "2 pictures in" in result.stdout and "cross-attention" in result.stdout
    picture = Image.open(tmp_path / "sample.png")
    assert picture.size == (2 * 16 * 4, 16 * 4) and picture.mode == "RGB"


def test_sample_draws_with_a_method_and_its_plan(tmp_path):
    arguments = ["--labels", "A", "--steps", 6, "--method", "duca", "-p", "interval=3", "-p", "sensitive_window=none"]
    result = run("sample", *arguments, "--out", "a.png", "--plan-out", "plan.png")
    assert "compute share" in result.stdout
    assert Image.open(tmp_path / "a.png").size == (128, 128)
    assert Image.open(tmp_path / "plan.png").width > 100


def test_sample_with_a_saved_recipe(tmp_path):
    dittocache.recipe("fora", interval=2).save_pretrained(tmp_path / "saved")
    found = json.loads(run("sample", "--labels", "A", "--steps", 4, "--method", "saved", "--json").stdout)
    assert 0.5 < found["report"]["compute_fraction"] < 1


# ---- methods, describe, doctor --------------------------------------------------------------------------------------
def test_methods_lists_all():
    listed = json.loads(run("methods", "--json").stdout)
    assert set(listed) == set(dittocache.methods())
    assert all(name in run("methods").stdout for name in listed)


def test_a_method_tells_its_parameters_and_how_to_cite_it():
    text = run("methods", "duca").stdout
    assert all(name in text for name in dittocache.methods()["duca"].parameters)
    assert dittocache.methods()["duca"].bibtex in text
    assert json.loads(run("methods", "duca", "--json").stdout)["parameters"]["interval"]["default"] == 3


@pytest.mark.parametrize("target", ["glyphs", "DiTTransformer2DModel", "FluxTransformer2DModel", "saved"])
def test_describe(target, tmp_path):
    import tiny

    tiny.build("pixart").save_pretrained(tmp_path / "saved")
    assert "sites in" in run("describe", target).stdout
    found = json.loads(run("describe", target, "--json").stdout)
    assert {"attention", "feed-forward"} <= {site["kind"] for site in found["sites"]}


def test_doctor_finds_a_sound_installation():
    checks = json.loads(run("doctor", "--json").stdout)
    assert all(check["ok"] for check in checks) and len(checks) == 6


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_missing_extra_is_named_before_anything_is_drawn(command, monkeypatch):
    from dittocache.evaluate import doctor

    monkeypatch.setattr(doctor, "EXTRAS", {"not_installed": "everything"})
    assert "not_installed (everything) missing: pip install 'dittocache[eval]'" in run(command, code=2).stderr
    assert "wrong" in run("doctor", code=1).stdout


def test_doctor_finds_damaged_weights(monkeypatch, tmp_path):
    import shutil

    from dittocache import bundled

    shutil.copytree(bundled.folder("glyphs"), tmp_path / "models" / "glyphs")
    weights = next((tmp_path / "models").rglob("diffusion_pytorch_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(bundled, "_FOLDER", tmp_path / "models")
    text = run("doctor", code=1).stdout
    assert "wrong" in text and "bundled model" in text
