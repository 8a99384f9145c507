"""Every method on every model: what `docs/compatibility.md` says, measured.

    python tests/matrix.py --write      measure all cells and write the table (make compat)
    python tests/matrix.py NAME ...     measure some models and print them

A cell works if, on inputs that never change, every step equals the uncached output and compute was really skipped. It
may instead be refused: one clear line, before or at the first forward, and nothing changed. Anything else is a defect.
"""

from __future__ import annotations

import argparse
import functools
import json
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import dittocache
from dittocache import Recipe
from dittocache.cache import wanted
from dittocache.models.stdit3 import STDiT3

STEPS = 5
ROOT = Path(__file__).parent.parent
TABLE, CELLS = ROOT / "docs" / "compatibility.md", ROOT / "docs" / "compatibility.json"
SHARE = {"ratio": 0.4, "ratio_schedule": "constant", "spatial_bonus": None}
REFUSALS = (ValueError, RuntimeError)

Parameters = dict[str, Any]


# ---- made-up data for the methods that need some --------------------------------------------------------------------
def _module_sites(model: nn.Module) -> list[Any]:
    found = dittocache.describe(model)
    return [found.columns[j] for j in wanted(dittocache.recipe("fora"), found)]


def _router(model: nn.Module, predict: Callable[[], Tensor]) -> Parameters:
    """Scores that reuse all but the first site in every second step."""
    logits = torch.full((STEPS, len(_module_sites(model))), -2.0)
    logits[:, 0] = 2
    return {"router_logits": logits, "threshold": 0.5}


def _trend(model: nn.Module, predict: Callable[[], Tensor]) -> Parameters:
    """No trend, in the shapes of the outputs: on a frozen input nothing moves."""
    shapes: dict[str, torch.Size] = {}
    handles = []
    for site in _module_sites(model):

        def see(module: nn.Module, args: Any, output: Any, name: str = site.name) -> None:
            shapes[name] = (output if isinstance(output, Tensor) else output[0]).shape[1:]

        handles.append(model.get_submodule(site.name).register_forward_hook(see))
    predict()
    for handle in handles:
        handle.remove()
    return {"trend": {f"{name}@{k}": torch.zeros(shape) for name, shape in shapes.items() for k in range(1, STEPS)}}


def _factors(model: nn.Module, predict: Callable[[], Tensor]) -> Parameters:
    """Low-rank factors of rank 1, of ones."""
    factors = {}
    for entry in dittocache.describe(model).linears:
        out, width = entry.module.weight.shape  # type: ignore[union-attr, misc]
        factors |= {f"{entry.site.name}/A": torch.ones(out, 1), f"{entry.site.name}/B": torch.ones(1, width)}
    return {"factor_tensors": factors}


def _changes(model: nn.Module, predict: Callable[[], Tensor]) -> Parameters:
    """Changes of the blocks that use up half of the budget in a step."""
    found = dittocache.describe(model)
    recipe = dittocache.recipe("fora")
    names = [found.columns[j].name for j in wanted(Recipe(when=recipe.when, where="block"), found)]
    return {"changes": {name: torch.full((STEPS,), 0.3) for name in names}, "delta": 0.5}


Data = Callable[[nn.Module, Callable[[], Tensor]], Parameters]
METHODS: dict[str, tuple[str, Parameters | Data]] = {
    "fora": ("fora", {"interval": 3}),
    "toca": ("toca", {**SHARE, "selector": "attention"}),
    "duca": ("duca", {**SHARE, "selector": "norm", "interval": 4}),
    "l2c": ("l2c", _router),
    "eoc": ("eoc", _trend),
    "goc": ("goc", {}),
    "icc": ("icc", _factors),
    "eb-cache": ("eb-cache", {"interval": 2}),
    "taylorseer": ("taylorseer", {"interval": 3, "order": 1}),
    "taylorseer lite": ("taylorseer", {"interval": 3, "order": 1, "lite": True}),
    "pab": ("pab", {"timestep_range": (0, 1000)}),
    "teacache": ("teacache", {"threshold": 0.2}),
    "fbcache": ("fbcache", {"threshold": 0.2}),
    "dicache": ("dicache", {"threshold": 0.2}),
    "magcache": ("magcache", {"ratios": (1.0,) * STEPS}),
    "dpcache": ("dpcache", {"full_steps": (0, 1, 2), "num_steps": STEPS}),
    "lemica": ("lemica", {"full_steps": (0, 2, 4), "num_steps": STEPS}),
    "block-caching": ("block-caching", _changes),
    "deepcache": ("deepcache", {"interval": 2}),
}


def recipe_for(name: str, model: nn.Module, predict: Callable[[], Tensor]) -> Recipe:
    """The recipe of a column of the table, with made-up data for this model where the method needs some."""
    method, params = METHODS[name]
    return dittocache.recipe(method, **(params if isinstance(params, dict) else params(model, predict)))


def meant(error: BaseException) -> bool:
    """Whether an error was raised by a statement of this package, rather than by something that went wrong in it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return "dittocache" in Path(last.filename).parts and (last.line or "").startswith("raise")


def measure(model: nn.Module, predict: Callable[[], Tensor], name: str, tolerance: float = 1e-5) -> dict[str, Any]:
    """One cell: {"computed": share} or {"refused": reason}; what is neither raises.

    Args:
        predict: a forward on inputs that are always the same.
        name: the column.
        tolerance: largest relative distance that is still equal.

    Raises:
        AssertionError: an output differs, nothing was skipped, or the model is not as before.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = predict()
        try:
            with dittocache.enable(model, recipe_for(name, model, predict)) as cache:
                with cache.run(STEPS, timesteps=[800 - 100 * k for k in range(STEPS)]):
                    for k in range(STEPS):
                        cache.step(k)
                        distance = float((predict() - expected).abs().max() / expected.abs().max())
                        assert distance <= tolerance, f"{name}: step {k} differs by {distance:.1e}"
                computed = cache.trace.compute_fraction
        except REFUSALS as error:
            assert meant(error), f"{name}: {type(error).__name__} of nobody's: {error}"
            assert torch.equal(predict(), expected), f"{name}: the refusal left something behind"
            assert "\n" not in str(error), f"{name}: not one line: {error}"
            return {"refused": str(error)}
        assert computed < 0.995, f"{name}: nothing was skipped"
        assert torch.equal(predict(), expected), f"{name}: the model is not as before"
    return {"computed": round(computed, 2)}


# ---- the table ------------------------------------------------------------------------------------------------------
def models() -> dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor], float]]]:
    """Name -> the tiny model, a forward of it on a frozen input, and its tolerance."""
    import tiny
    from zoo import ZOO, prediction

    def of_zoo(name: str) -> tuple[nn.Module, Callable[[], Tensor], float]:
        entry = ZOO[name]
        model = entry.build(0)
        return model, lambda: prediction(model, entry.inputs(model, k=0)), entry.tolerance

    def own(model: nn.Module) -> tuple[nn.Module, Callable[[], Tensor], float]:
        return model, lambda: tiny.call(model, tiny.step(model, 0)), 1e-5

    others = {"UViT": lambda: own(tiny.uvit()), "STDiT3": _stdit3, "UNet2DConditionModel": _unet}
    return dict(sorted({**{name: functools.partial(of_zoo, name) for name in ZOO}, **others}.items()))


def _unet() -> tuple[nn.Module, Callable[[], Tensor], float]:
    """Stable Diffusion's kind of U-Net: three levels, two of them with attention."""
    import tiny

    model: Any = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    tiny.randomize(model)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 12, generator=generator)
    return model, lambda: model(x, torch.tensor(500), text, return_dict=False)[0], 1e-5


def _stdit3() -> tuple[nn.Module, Callable[[], Tensor], float]:
    """Open-Sora's network: three pairs of blocks, two frames of eight tokens, seven tokens of text."""
    import tiny

    model = STDiT3(depth=3, hidden_size=32, num_heads=2, caption_channels=12, model_max_length=7)
    tiny.randomize(model)
    generator = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(2, 4, 2, 4, 8, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
        "y": torch.randn(2, 1, 7, 12, generator=generator),
        "mask": torch.ones(2, 7, dtype=torch.int64),
        "fps": torch.tensor([24.0, 24.0]),
        "height": torch.tensor([256.0, 256.0]),
        "width": torch.tensor([256.0, 256.0]),
    }
    return model, lambda: model(**given), 1e-5


def row(name: str) -> dict[str, dict[str, Any]]:
    """All cells of a model."""
    model, predict, tolerance = models()[name]()
    return {column: measure(model, predict, column, tolerance) for column in METHODS}


def page(cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The page in Markdown: what works by method, by model, and why the rest is refused."""
    kinds: dict[str, int] = {}  # of refusals: without names and numbers, these say the same
    texts: dict[int, str] = {}
    refusing: dict[int, dict[str, None]] = {}
    rows, refused = [], {column: dict[int, int]() for column in METHODS}
    for name, found in cells.items():
        shown = []
        for column in METHODS:
            cell = found[column]
            if "computed" in cell:
                shown.append(f"{100 * cell['computed']:.0f}")
                continue
            reason = cell["refused"].replace(name, "MODEL").replace("|", "/")
            words = (word for word in reason.split() if "'" not in word and not any(map(str.isdigit, word)))
            n = kinds.setdefault(" ".join(words), len(kinds) + 1)
            texts.setdefault(n, reason)
            refusing.setdefault(n, {})[name] = None
            refused[column][n] = refused[column].get(n, 0) + 1
            shown.append(f"[{n}]")
        rows.append(f"| {name} | {' | '.join(shown)} |")
    methods = []
    for column, (method, _) in METHODS.items():
        works = len(cells) - sum(refused[column].values())
        why = ", ".join(f"[{n}] {count}" for n, count in refused[column].items())
        methods.append(f"| [{column}](methods/{method}.md) | {works} of {len(cells)} | {why} |")
    reasons = []
    for n, text in texts.items():
        where = ", ".join(refusing[n]) if len(refusing[n]) < len(cells) / 2 else f"{len(refusing[n])} models"
        reasons.append(f"{n}. `{text}`: {where}")
    lines = [
        "# Compatibility",
        "",
        "<!-- written by `make compat`; do not edit -->",
        "",
        f"Every method on a tiny random model of every class, {len(cells)} in all. It *works* if, on inputs that never",
        "change, every step equals the uncached output (1e-5 relative, or what the class in `tests/zoo` is allowed)",
        "and compute was really skipped. Otherwise it is *refused*: one line, and nothing is changed.",
        "",
        "## By method",
        "",
        "| method | works on | refused |",
        "|---|---|---|",
        *methods,
        "",
        "## By model",
        "",
        "A number is the percentage of FLOPs computed in these five steps; it says that something is skipped, not how",
        "much a real run saves. [n] is a refusal.",
        "",
        f"| model | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
        *rows,
        "",
        "## Refusals",
        "",
        "As the first of the models says it; others name other modules and sizes.",
        "",
        *reasons,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure methods on models.")
    parser.add_argument("names", nargs="*", help="classes; all without any")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} and {CELLS.name}")
    arguments = parser.parse_args()
    known = models()
    cells: dict[str, Any] = {}
    for name in arguments.names or known:
        try:
            cells[name] = row(name)
            print(name, json.dumps(cells[name]), flush=True)
        except AssertionError as error:
            print(name, "DEFECT", error, flush=True)
            if arguments.write:
                raise SystemExit(1) from None
    if arguments.write:
        CELLS.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
