"""The model card of a saved recipe: what it is, how to use it, what it was made for, and what was measured.

A card is Markdown with a head that the Hugging Face Hub reads. Text that comes from outside is shown as text.
"""

from __future__ import annotations

import dataclasses
import io
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import ModelCardData
from PIL import Image

from . import bundled
from .fill import Chosen, Fill
from .parts import show
from .plan import COMPUTE, Plan, Site
from .saved import CARD, FILE, GRID, MARK, PLAN
from .when import Every, PowerSteps, RatioBudget, ReuseSteps, Table, Warmup

if TYPE_CHECKING:
    from .recipe import Method, Recipe

BY_STEP = (Every, PowerSteps, RatioBudget, ReuseSteps, Warmup)  # all sites alike, known from the number of steps
ABOUT = (
    "It says at which steps of a diffusion model's sampling run features are computed, and what stands in for them at "
    "the others. It holds no weights of a model."
)
LONGEST = 1000  # steps of a plan that is shown
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def files(recipe: Recipe, method: Method | None, name: str, grid: Any = None) -> dict[str, bytes]:
    """The card and its pictures, by file name.

    Args:
        recipe: with its provenance.
        method: the published method that it is of, if any.
        name: what it is loaded by: a Hub id or a folder.
        grid: pictures in pairs, uncached and cached, uint8 [2 n, height, width, 1 or 3]; or the path of a picture.

    Raises:
        ValueError: a grid of another form, or a file that is no picture.
    """
    found: dict[str, bytes] = {}
    if isinstance(recipe.when, Table) and recipe.when.plan.table.size and find_spec("matplotlib"):
        found[PLAN] = _drawn(recipe.when.plan)
    if grid is not None:
        found[GRID] = _png(_opened(grid) if isinstance(grid, (str, Path)) else _laid_out(grid))
    sections = [
        _head(recipe, method),
        _what(recipe, method),
        _use(recipe, name),
        _made_for(recipe),
        _measured(recipe.provenance.get("measured")),
        _pictures(grid),
        _plan(recipe, PLAN in found),
        _provenance(recipe),
        _citation(method),
    ]
    return {CARD: ("\n\n".join(filter(None, sections)) + "\n").encode(), **found}


# ---- sections -------------------------------------------------------------------------------------------------------
def _head(recipe: Recipe, method: Method | None) -> str:
    tags = ["dittocache", "diffusion", "feature-caching", *([method.name] if method else [])]
    data = ModelCardData(library_name="dittocache", tags=tags, base_model=_hub_id(recipe))
    return f"---\n{data.to_yaml()}\n---\n{MARK}"


def _what(recipe: Recipe, method: Method | None) -> str:
    model = f" for {text(recipe.made_for['model'])}" if "model" in recipe.made_for else ""
    line = text(recipe.describe())
    if method is not None:
        paper = f" ([arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv}))" if method.arxiv else ""
        line += f": {text(method.title)}{paper}"
    if isinstance(recipe.provenance.get("resampled"), Mapping):
        line += "\n\nIts plan was resampled from another number of steps, and was not measured since."
    return f"# {text(recipe.method or 'A caching recipe')}{model}\n\n{line}\n\n{ABOUT}"


def _use(recipe: Recipe, name: str) -> str:
    setup, model = _setup(recipe), recipe.provenance.get("model")
    imports = ["import dittocache"]
    if model in bundled.names():
        pipe = f"dittocache.bundled.load({model!r})"
    else:
        imports.append("from diffusers import DiffusionPipeline")
        pipe = f"DiffusionPipeline.from_pretrained({_hub_id(recipe) or 'your/pipeline'!r})"
    by_class = recipe.made_for.get("model") == "DiTTransformer2DModel"
    conditions = setup.get("conditions")
    listed = conditions if isinstance(conditions, (list, tuple)) else ()
    condition = next(iter(listed), 0 if by_class else "a cat")
    arguments = {"num_inference_steps": recipe.num_steps, "guidance_scale": setup.get("guidance_scale")}
    called = "".join(f", {key}={value!r}" for key, value in arguments.items() if value is not None)
    code = [
        *imports,
        "",
        f"pipe = {pipe}",
        f"recipe = dittocache.Recipe.from_pretrained({name!r})",
        "with dittocache.enable(pipe, recipe) as cache:",
        f"    images = pipe([{condition!r}]{called}).images",
        "print(cache.report())",
    ]
    return f"## Use\n\n{fenced('pip install dittocache', 'bash')}\n\n{fenced(chr(10).join(code), 'python')}"


def _made_for(recipe: Recipe) -> str:
    made = recipe.made_for
    rows = {
        "model": made.get("model"),
        "pipeline": recipe.provenance.get("model"),
        "scheduler": made.get("scheduler"),
        "steps": recipe.num_steps,
        "guidance": _setup(recipe).get("guidance_scale"),
    }
    rows = {name: value for name, value in rows.items() if value is not None}
    held = {"model": "model", "scheduler": "scheduler", "timesteps": "number of steps"}
    refused = " or ".join(word for name, word in held.items() if name in made)
    note = f"\n\nAnother {refused} is refused." if refused else ""
    return f"## Made for\n\n{table(['', ''], rows.items())}{note}" if rows else ""


def _measured(measured: Any) -> str:
    rows = [row for row in measured if isinstance(row, Mapping)] if isinstance(measured, (list, tuple)) else []
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    ranges = {f"{key}_{end}" for key in keys for end in ("low", "high")}
    heads = [key for key in keys if key not in ranges]
    if not heads:
        return ""
    cells = [[_with_range(row, key) for key in heads] for row in rows]
    return f"## Measured\n\n{table([key.replace('_', ' ') for key in heads], cells)}"


def _with_range(row: Mapping[str, Any], key: str) -> str:
    low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
    around = "" if low is None or high is None else f" ({_short(low)} to {_short(high)})"
    return "" if row.get(key) is None else f"{_short(row[key])}{around}"


def _pictures(grid: Any) -> str:
    if grid is None:
        return ""
    pairs = (
        "" if isinstance(grid, (str, Path)) else "Above: uncached. Below: with this recipe, from the same noise.\n\n"
    )
    return f"## Pictures\n\n{pairs}![pictures]({GRID})"


def _plan(recipe: Recipe, drawn: bool) -> str:
    steps = recipe.num_steps
    if drawn:
        return f"## Plan\n\n![steps by sites]({PLAN})"
    if not isinstance(recipe.when, BY_STEP) or steps is None or steps > LONGEST:
        return ""
    try:
        computed = recipe.when.table(steps, [Site("all", recipe.where, "", 0, 1, 0)])[:, 0] == COMPUTE
    except ValueError:  # it does not fit the run that the recipe says it was made for: runs tell, saving does not
        return ""
    fills, chosen = (recipe.fill.fills, recipe.fill.chosen) if isinstance(recipe.fill, Chosen) else ((), ())
    filled = [str(chosen[k]) if k < len(chosen) and len(fills) <= 10 else "." for k in range(steps)]
    strip = "".join("#" if on else mark for on, mark in zip(computed, filled, strict=True))
    named = [f"`{n}`: filled by {text(_named(fill))}" for n, fill in enumerate(fills)]
    legend = "; ".join(named) if 0 < len(fills) <= 10 else "`.`: filled"
    count = f"{int(computed.sum())} of {steps} steps are computed (`#`: computed, {legend})"
    return f"## Plan\n\n{count}:\n\n{fenced(strip)}"


def _named(fill: Fill) -> str:
    """Its parameters other than the default ones."""
    fields = {f.name: (getattr(fill, f.name), f.default) for f in dataclasses.fields(fill)}  # type: ignore[arg-type]
    told = ", ".join(f"{name}={show(value)}" for name, (value, default) in fields.items() if value != default)
    return f"{type(fill).__name__}({told})"


def _provenance(recipe: Recipe) -> str:
    entries = {k: v for k, v in recipe.provenance.items() if k != "measured"}
    rows = [(key, value if isinstance(value, str) else show(value)) for key, value in _flat(entries)]
    return f"## Provenance\n\n{table(['', ''], rows)}\n\nAll of it is in `{FILE}`." if rows else ""


def _citation(method: Method | None) -> str:
    return f"## Citation\n\n{fenced(method.bibtex.strip(), 'bibtex')}" if method and method.bibtex else ""


# ---- what a recipe says of its run ----------------------------------------------------------------------------------
def method_of(recipe: Recipe) -> str:
    """Name of the method that it is of, or of that whose plan was resampled; empty for none."""
    resampled = recipe.provenance.get("resampled")
    found = recipe.method or (resampled.get("method") if isinstance(resampled, Mapping) else None)
    return found if isinstance(found, str) else ""


def _setup(recipe: Recipe) -> Mapping[str, Any]:
    found = recipe.provenance.get("setup", {})
    return found if isinstance(found, Mapping) else {}


def _hub_id(recipe: Recipe) -> str | None:
    """The Hub id of the pipeline that it was made with, if that is what its provenance has."""
    found = recipe.provenance.get("model")
    return found if isinstance(found, str) and HUB_ID.fullmatch(found) else None


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


# ---- Markdown -------------------------------------------------------------------------------------------------------
def text(value: Any) -> str:
    """A value as one line of text without a meaning in Markdown or HTML."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#!|~$])", r"\\\1", line)


def fenced(content: str, language: str = "") -> str:
    """A block of code, whatever backticks are in it."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a line for the heads, which may be empty."""
    cells = [[text(cell) for cell in row] for row in (heads, *rows)]
    cells.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- pictures -------------------------------------------------------------------------------------------------------
def _drawn(plan: Plan) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PLAN
        plan.draw(path)
        return path.read_bytes()


def _opened(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:  # Pillow's own errors are such, too
        raise ValueError(f"the grid {str(path)!r} cannot be read: {show(error)}") from None


def _laid_out(pictures: Any) -> Image.Image:
    """The first of every pair above, the second below it."""
    shape, kind = np.shape(pictures), np.asarray(pictures).dtype
    if len(shape) != 4 or not shape[0] or shape[0] % 2 or shape[3] not in (1, 3) or kind != np.uint8 or 0 in shape:
        raise ValueError(f"a grid is pairs of pictures, uint8 [2 n, height, width, 1 or 3]; got {kind} {list(shape)}")
    pairs = np.asarray(pictures).reshape(-1, 2, *shape[1:])
    sheet = pairs.transpose(1, 2, 0, 3, 4).reshape(2 * shape[1], -1, shape[3])
    return Image.fromarray(np.repeat(sheet, 3 // shape[3], axis=2))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
