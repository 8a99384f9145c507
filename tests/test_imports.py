"""Who may import whom: `cli -> evaluate, tune, train, calibrate -> methods -> recipe -> when/which/fill/fix, plan`, and
`hooks -> run, clock, describe, plan`. Nothing below knows anything above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dittocache

ROOT = Path(dittocache.__file__).parent
ANSWERS = {"when", "which", "fill", "fix"}
# what a part (a file at the top, or a folder) may import of this package
ALLOWED: dict[str, set[str]] = {
    "parts": set(),
    "atomic": set(),
    "clock": set(),
    "plan": {"parts", "drawing"},
    "drawing": {"plan"},
    "tensors": {"parts"},
    "samples": set(),
    "streams": set(),
    "flops": set(),
    "fill": {"parts", "plan", "tensors", "samples"},
    "fix": {"parts"},
    "which": {"parts", "plan"},
    "when": {"parts", "plan", "tensors"},
    "origin": {"parts"},
    "noise": {"parts"},
    "describe": {"plan"},
    "models": {"describe"},
    "parameters": {"parts", "when"},
    "saved": {"parts", "tensors", "atomic"},
    "card": {"parts", "plan", "saved", "bundled", *ANSWERS},
    "recipe": {"parts", "plan", "tensors", "origin", "parameters", "saved", "card", *ANSWERS},
    "run": {"plan", "fill"},
    "selection": {"plan", "fill", "which", "streams"},
    "forward": {"run", "describe", "plan", "fill", "flops", "which", "when", "samples", "streams", "selection"},
    "hooks": {"run", "clock", "describe", "plan", "fill", "forward", "which", "streams"},
    "methods": {"recipe", "parameters", "parts", "plan", "tensors", *ANSWERS},
    "cache": {"hooks", "clock", "describe", "run", "plan", "recipe", "when", "parts", "noise", "origin", "fix"},
    "work": {"parts", "atomic"},
    "bundled": set(),
}
ABOVE = {"evaluate", "tune", "train", "calibrate"}
BELOW = {*ALLOWED}
for part in ABOVE:
    ALLOWED[part] = BELOW | ABOVE
ALLOWED["cli"] = BELOW | ABOVE
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = BELOW
SCRIPTS = {
    "bundled/build.py",
    "bundled/build_glyphs.py",
    "bundled/build_emoji.py",
    "bundled/train.py",
}  # run by hand, imported by nobody: they may use what is above
# narrower than the whole part
ONLY = {
    ("run", "fill"): {"fill", "fill.base"},
    ("cache", "fix"): {"fix"},
}


def imports(path: Path):
    """(line, dotted name inside the package) of every import of this package, wherever in the file it stands."""
    package = ["dittocache", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text())
    for_types = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for b in node.body
        for n in ast.walk(b)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:  # names in annotations are no dependence
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join(base)]
            folder = ROOT.joinpath(*base[1:]) if base and base[0] == "dittocache" else None
            if folder is not None and folder.is_dir():  # `from . import clock` names modules, or names of __init__
                names = [
                    ".".join([*base, a.name])
                    if (folder / f"{a.name}.py").exists() or (folder / a.name).is_dir()
                    else names[0]
                    for a in node.names
                ]
        else:
            continue
        for name in names:
            if name == "dittocache" or name.startswith("dittocache."):
                yield node.lineno, name.removeprefix("dittocache").removeprefix(".")


FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_below_knows_anything_above(file):
    part = file.parts[0].removesuffix(".py")
    assert part in ALLOWED, f"{part} is new: say in this test where it stands"
    for line, name in imports(ROOT / file):
        other = name.split(".")[0]
        if other == part or (str(file) in SCRIPTS and other in ABOVE):
            continue
        if other == "":  # the package's own version is all that may be taken from the top
            assert part in ABOVE | {"cli", "recipe", "__main__", "bundled"}, f"{file}:{line} imports the package itself"
            continue
        assert other in ALLOWED[part], f"{file}:{line}: {part} must not know {other}"
        if (part, other) in ONLY:
            assert name in ONLY[part, other], f"{file}:{line}: of {other}, {part} may know {ONLY[part, other]} only"


def test_the_rule_sees_imports():
    """The parser finds relative, absolute, nested and module imports."""
    names = {name for _, name in imports(ROOT / "cache.py")}
    assert {"hooks", "clock", "plan", "recipe", "run"} <= names
    assert "drawing" in {name for _, name in imports(ROOT / "plan.py")}  # inside a function


@pytest.mark.parametrize("part", sorted(ANSWERS))
def test_the_four_answers_know_no_models_and_no_hooks(part):
    """Pure tensor mathematics: torch and numpy, not diffusers."""
    for path in (ROOT / part).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(n.split(".")[0] in ("diffusers", "safetensors", "huggingface_hub") for n in names), path


def test_the_answers_do_not_know_each_other():
    for part in ANSWERS:
        for path in (ROOT / part).glob("*.py"):
            others = {name.split(".")[0] for _, name in imports(path)}
            assert not others & (ANSWERS - {part}), path


def test_only_the_hooks_touch_forwards():
    for file in FILES:
        if file.parts[0] in ("hooks.py", "forward.py", "bundled", "evaluate", "models", "cli"):
            continue
        text = (ROOT / file).read_text()
        assert "register_forward" not in text and "HookRegistry" not in text, file


def test_scripts_are_imported_by_nobody_below():
    for file in FILES:
        if file.parts[0] != "bundled":
            names = {name for _, name in imports(ROOT / file)}
            assert not names & {script.removesuffix(".py").replace("/", ".") for script in SCRIPTS}, file


def test_public_names():
    assert len(dittocache.__all__) <= 12
    for name in dittocache.__all__:
        assert getattr(dittocache, name) is not None
    assert {"enable", "disable", "recipe", "methods", "describe", "Recipe", "Plan", "Cache", "bundled"} <= set(
        dittocache.__all__
    )


@pytest.mark.slow
def test_importing_brings_no_heavy_extras():
    """The core works without its extras: nothing of them is imported on the way."""
    extras = ["matplotlib", "torchmetrics", "pandas", "accelerate", "torchvision", "gradio", "optuna", "scipy"]
    # diffusers itself imports accelerate where it is installed
    theirs = "import sys, diffusers; diffusers.DiffusionPipeline, diffusers.DiTTransformer2DModel; old = {*sys.modules}"
    code = (
        f"{theirs}; import dittocache, dittocache.methods; print([m for m in {extras} if m in {{*sys.modules}} - old])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"
