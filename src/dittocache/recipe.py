"""Recipes: where + when + which + fill + fix, and the registry of the published methods."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import __version__, origin
from .fill import Fill, Hold
from .fix import Fix
from .parts import Part, answers, check_bool, check_choice, check_int, check_ints, check_number, jsonable, plain, show
from .plan import COMPUTE, REUSE, Plan
from .tensors import Tensors
from .when import Table, When
from .which import Which

FORMAT = "dittocache-recipe-1"
FILE, ARRAYS = "recipe.json", "recipe.safetensors"
WHERE = ("module", "attention", "feed-forward", "linear", "block", "stack", "tail", "model")
SPANS = ("block", "stack", "tail")
PARTS = ("when", "which", "fill", "fix")


@dataclass(frozen=True)
class Recipe:
    """A caching method: the answers to where, when, which, fill and fix.

    Args:
        when: at which steps a site is computed, partly computed, or not.
        where: `module` for attention and feed-forward, or one of the two alone; `linear` for every single linear layer
            inside of them, while attention itself and activations are computed; `block` for every block as a whole,
            `stack` for all blocks together, `tail` for all blocks after the schedule's `head`; `model` for what the
            network returns. Or a pattern of site names, such as `transformer_blocks.[0-9].attn`.
        keeps: of blocks and stacks, their `output`, or the `change` between what enters and what leaves.
        which: which tokens a partial step computes; None: a partial step reuses all.
        fill: what stands in for what was not computed.
        fix: correction outside the network; None for none.
        method: name of the published method, if it is one.
        params: the method's parameters, all of them.
        provenance: where the recipe was made, and how; free JSON.
        made_for: the model, scheduler and run that it was calibrated or trained for (see `origin`); another one is
            refused. Empty for a recipe that goes with anything; `dataclasses.replace(recipe, made_for={})` lifts it.

    Raises:
        ValueError: an answer of the wrong sort, or a mix that cannot work.
    """

    when: When
    where: str = "module"
    which: Which | None = None
    fill: Fill = field(default_factory=Hold)
    fix: Fix | None = None
    keeps: str = "output"
    method: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    made_for: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.where, str) or (self.where not in WHERE and not set(self.where) & set(".*?[")):
            known = ", ".join(WHERE)
            raise ValueError(f"where must be one of {known}, or a pattern of site names; got {show(self.where)}")
        check_choice("keeps", self.keeps, ("output", "change"))
        if self.keeps == "change" and self.where in WHERE and self.where not in SPANS:
            raise ValueError(f"keeps='change' goes with where={', '.join(SPANS)}; got where={self.where!r}")
        if self.where == "tail" and self.keeps != "change":
            raise ValueError("where='tail' goes with keeps='change'; got keeps='output'")
        if self.where == "tail" and isinstance(self.when, When) and not self.when.head:
            raise ValueError(f"where='tail' needs a schedule with a head; {type(self.when).__name__} has none")
        for name, kind, optional in (
            ("when", When, False),
            ("which", Which, True),
            ("fill", Fill, False),
            ("fix", Fix, True),
        ):
            value = getattr(self, name)
            if (not isinstance(value, kind) or type(value) is kind) and not (optional and value is None):
                known = ", ".join(sorted(answers(kind))) or "none yet"
                raise ValueError(f"{name} must be one of {known}; got {show(value)}")
        if not isinstance(self.method, (str, types.NoneType)):
            raise ValueError(f"method must be the name of a method, or None; got {show(self.method)}")
        for name in ("params", "provenance", "made_for"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a dictionary; got {show(getattr(self, name))}")
            object.__setattr__(self, name, copy.deepcopy(dict(getattr(self, name))))
        origin.check(self.made_for)
        if isinstance(self.when, Table):
            table = self.when.plan.table
            partial: Any = ((table > REUSE) & (table < COMPUTE)).any(0)
            spans = [n for n, kind in enumerate(self.when.plan.kinds) if partial[n] and kind in ("stack", "block")]
            if spans:
                raise ValueError(
                    f"the plan computes {self.when.plan.sites[spans[0]]!r} for some samples only: a plan is for all of "
                    "them, so take the trace of a run of one sample, or of one with batch='batch'"
                )
            if partial.any() and self.which is None:
                raise ValueError("the plan computes some tokens only, so the recipe needs `which`, such as ValueNorm()")

    # ---- words ------------------------------------------------------------------------------------------------------
    def describe(self) -> str:
        """One line: the method and the parameters that differ from its defaults, or the parts."""
        if self.method is not None:
            known = methods()[self.method].parameters if self.method in methods() else {}
            changed = {k: v for k, v in self.params.items() if k not in known or v != known[k].default}
            shown = ", ".join(f"{k}={v if isinstance(v, str) else show(v)}" for k, v in changed.items())
            return f"{self.method}({shown})" if changed else self.method
        parts = (type(p).__name__ for p in (self.when, self.which, self.fill, self.fix) if p is not None)
        return f"{self.where}: {' + '.join(parts)}"

    def with_params(self, **params: Any) -> Recipe:
        """The same recipe with other parameters of its method, and with its own calibrated or learned tensors.

        Raises:
            ValueError: it is of no method, or the method has no such parameter or does not take the value.
        """
        if self.method not in methods():
            raise ValueError(f"only a method's recipe has parameters; this one is {self.describe()!r}")
        known = methods()[self.method]
        held = {p.name: _held(self, p.held) for p in known.parameters.values() if p.held}
        data = {name: value for name, value in held.items() if value is not None}
        made = known(**{**self.params, **data, **params})
        return dataclasses.replace(made, provenance=self.provenance, made_for=self.made_for)

    # ---- files ------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return self._laid_out(lambda name, part: part.to_dict())

    def _laid_out(self, write: Callable[[str, Part], Any]) -> dict[str, Any]:
        """The entries of a saved recipe, its parts written by `write(name, part)`."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {
            "format": FORMAT,
            "method": self.method,
            "params": {k: jsonable(v) for k, v in self.params.items()},
            "where": self.where,
            "keeps": self.keeps,
            **{name: None if part is None else write(name, part) for name, part in parts.items()},
            "provenance": copy.deepcopy(self.provenance),
            "made_for": copy.deepcopy(self.made_for),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`.

        Raises:
            ValueError: not a recipe of this format, or a damaged one.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"not a recipe: format is {found!r}, expected {FORMAT!r}")
        names = {"format", *(f.name for f in dataclasses.fields(cls))}
        unknown = sorted(str(name) for name in set(data) - names)
        if unknown:
            raise ValueError(f"damaged recipe: unknown entry {unknown[0]!r}; known: {', '.join(sorted(names))}")
        if data.get("when") is None:
            raise ValueError("damaged recipe: 'when' is missing")
        parts: dict[str, Any] = {}
        for name, kind in (("when", When), ("which", Which), ("fill", Fill), ("fix", Fix)):
            if data.get(name) is not None:
                parts[name] = kind.from_dict(data[name])
        params = data.get("params", {})
        return cls(
            where=data.get("where", "module"),
            keeps=data.get("keeps", "output"),
            method=data.get("method"),
            params={k: plain(v) for k, v in params.items()} if isinstance(params, Mapping) else params,
            provenance=data.get("provenance", {}),
            made_for=data.get("made_for", {}),
            **parts,
        )

    def save_pretrained(
        self, folder: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Writes the recipe into a folder (created if missing), and uploads it if asked to."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, torch.Tensor] = {}
        data = self._laid_out(lambda name, part: _set_aside(part.fields(), name, arrays))
        data["provenance"] = {**_versions(), **self.provenance}
        if arrays:
            save_file(arrays, folder / ARRAYS)
        else:
            (folder / ARRAYS).unlink(missing_ok=True)  # those of a recipe that was here before
        (folder / FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            from huggingface_hub import HfApi

            repo = HfApi().create_repo(repo_id or folder.name, exist_ok=True, **kwargs).repo_id
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Add dittocache recipe")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Uploads the recipe to the Hub; keyword arguments go to `create_repo` (private, token, ...)."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Recipe:
        """Reads a saved recipe from a folder or the Hub; keyword arguments go to `hf_hub_download`.

        Raises:
            ValueError: nothing there, or a damaged or foreign file.
        """
        folder = Path(name)
        if not (folder / FILE).is_file():
            if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
                raise ValueError(f"no saved recipe at {str(name)!r}: {FILE} is missing")
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                folder = Path(snapshot_download(str(name), allow_patterns=[FILE, ARRAYS], **kwargs))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"no saved recipe at {str(name)!r}, neither a folder nor on the Hub: {reason}"
                ) from None
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            arrays = load_file(folder / ARRAYS) if (folder / ARRAYS).is_file() else {}
            if isinstance(data, dict):
                data |= {part: _put_back(data[part], arrays) for part in PARTS if part in data}
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, SafetensorError, OSError) as error:
            raise ValueError(f"damaged recipe in {str(name)!r}: {show(error)}") from None
        return cls.from_dict(data)


def _held(recipe: Recipe, path: str) -> Tensors | None:
    """The tensors at a place of a recipe; None if that part has no such field."""
    part, _, name = path.partition(".")
    found = getattr(getattr(recipe, part), name, None)
    return found if isinstance(found, Tensors) else None


def _versions() -> dict[str, str]:
    """What a saved recipe was made with."""
    return {"dittocache": __version__, "diffusers": diffusers.__version__, "torch": str(torch.__version__)}


def _set_aside(value: Any, path: str, arrays: dict[str, torch.Tensor]) -> Any:
    """JSON data without its tensors and tables of numbers: those go into `arrays`, under their dotted path."""
    if isinstance(value, Tensors):
        arrays |= {f"{path}:{name}": tensor for name, tensor in value.items()}
        return {"tensors": path, "count": len(value)}
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {k: _set_aside(v, f"{path}.{k}" if path else k, arrays) for k, v in value.items()}
    value = jsonable(value)
    if isinstance(value, list) and value and all(isinstance(row, list) and row for row in value):
        arrays[path] = torch.tensor(value, dtype=torch.float64)
        return {"array": path}
    return value


def _put_back(value: Any, arrays: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of `_set_aside`."""
    if isinstance(value, dict):
        if set(value) == {"tensors", "count"}:
            mine = f"{value['tensors']}:"
            found = {name.removeprefix(mine): t for name, t in arrays.items() if name.startswith(mine)}
            if len(found) != value["count"]:
                raise ValueError(f"damaged recipe: tensors {show(value['tensors'])} are missing from {ARRAYS}")
            return Tensors(found)
        if set(value) == {"array"}:
            if not isinstance(value["array"], str) or value["array"] not in arrays:
                raise ValueError(f"damaged recipe: array {show(value['array'])} is missing from {ARRAYS}")
            return arrays[value["array"]].tolist()
        return {k: _put_back(v, arrays) for k, v in value.items()}
    return value


# ---- the registry of methods ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Int:
    """Annotation of a whole-number parameter."""

    low: int
    high: int | None = None
    help: str = ""


@dataclass(frozen=True)
class Number:
    """Annotation of a real parameter."""

    low: float
    high: float = float("inf")
    help: str = ""


@dataclass(frozen=True)
class Steps:
    """Annotation of a list of whole numbers, such as steps."""

    low: int
    high: int | None = None
    help: str = ""


@dataclass(frozen=True)
class PerKind:
    """Annotation of a number that may differ by kind of site or layer: {kind: number}, or one for all.

    `kinds` are those that are known, any if empty; `every` of them must be given, and then one for all is refused.
    """

    each: Int | Number
    kinds: tuple[str, ...] = ()
    help: str = ""
    every: bool = False

    def check(self, name: str, value: Any) -> None:
        if self.every and (not isinstance(value, Mapping) or set(value) != set(self.kinds)):
            raise ValueError(f"{name} must be a number for each of {', '.join(self.kinds)}; got {show(value)}")
        for kind, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
            if kind is not None and self.kinds:
                check_choice(f"a kind in {name}", kind, self.kinds)
            of = name if kind is None else f"{name} of {show(kind)}"
            if isinstance(self.each, Int):
                check_int(of, number, self.each.low, self.each.high)
            else:
                check_number(of, number, self.each.low, self.each.high)


@dataclass(frozen=True)
class Numbers:
    """Annotation of a list of real numbers; `count` of them, if it is fixed."""

    low: float = -float("inf")
    high: float = float("inf")
    count: int | None = None
    help: str = ""

    def check(self, name: str, value: Any) -> None:
        flat = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)
        listed = [*value] if flat else []
        if not listed or self.count not in (None, len(listed)):
            raise ValueError(f"{name} must be a list of {self.count or 'real'} numbers; got {show(value)}")
        for one in listed:
            check_number(f"every entry of {name}", one, self.low, self.high)


@dataclass(frozen=True)
class Data:
    """Annotation of calibrated or learned tensors, or the file that holds them; the method's part checks them.

    `held` is where the recipe holds them, such as `fill.trend`.
    """

    help: str = ""
    held: str = ""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method: its type in words, default, help, and the values it takes."""

    name: str
    type: str
    default: Any
    help: str
    valid: str
    check: Callable[[Any], None] = field(repr=False)
    held: str = ""


@dataclass(frozen=True)
class Method:
    """A published method: what it is, what it needs, its parameters, and how to cite it.

    Attributes:
        needs: `nothing`, `calibration` or `training`.
        settings: recommended parameters per model and sampler.
    """

    name: str
    title: str
    arxiv: str
    bibtex: str
    needs: str
    summary: str
    parameters: dict[str, Parameter]
    settings: dict[str, dict[str, Any]]
    build: Callable[..., Recipe] = field(repr=False)

    def __call__(self, **params: Any) -> Recipe:
        """The recipe with these parameters.

        Raises:
            ValueError: unknown parameter, or a value of the wrong type or range.
        """
        for name, value in params.items():
            if name not in self.parameters:
                raise ValueError(
                    f"{self.name} has no parameter {name!r}; known: {', '.join(self.parameters) or 'none'}"
                )
            self.parameters[name].check(value)
        values = {name: p.default for name, p in self.parameters.items()} | params
        values = {k: v if self.parameters[k].type == "data" else plain(v) for k, v in values.items()}
        # data belong to the part that holds them
        params = {k: v for k, v in values.items() if self.parameters[k].type != "data"}
        return dataclasses.replace(self.build(**values), method=self.name, params=params)


_methods: dict[str, Method] = {}


def method(
    *,
    name: str,
    title: str,
    arxiv: str,
    bibtex: str,
    needs: str = "nothing",
    settings: dict[str, dict[str, Any]] | None = None,
) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Registers a function that builds a recipe; its annotated signature becomes the method's parameters."""

    def register(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        # unlike `get_type_hints`, which makes what defaults to None optional once more in Python 3.10
        signature = inspect.signature(build, eval_str=True).parameters
        parameters = {name: parameter(name, p.annotation, p.default) for name, p in signature.items()}
        summary = inspect.cleandoc(build.__doc__ or "").splitlines()[0]
        _methods[name] = Method(name, title, arxiv, bibtex, needs, summary, parameters, dict(settings or {}), build)
        return build

    return register


def parameter(name: str, hint: Any, default: Any) -> Parameter:
    """Reads `Annotated[type, Int | Number | help text]`; `| None` makes a parameter optional."""
    base, *notes = typing.get_args(hint)
    note = notes[0]
    help_text = note if isinstance(note, str) else note.help
    options = [a for a in typing.get_args(base) if a is not types.NoneType] if _is_union(base) else [base]
    optional, kind = _is_union(base), options[0]
    check: Callable[[Any], None]
    if isinstance(note, PerKind):
        kinds = ", ".join(note.kinds) or "KIND"
        valid = f"{{{kinds}: number}}" + ("" if note.every else ", one number for all") + ", or None"
        check = lambda v: None if v is None else note.check(name, v)  # noqa: E731
        return Parameter(name, "numbers", default, help_text, valid, check)
    if isinstance(note, Data):
        valid = "tensors by name, or a file"
        return Parameter(name, "data", default, help_text, valid, lambda v: None, held=note.held)
    if isinstance(note, Steps):
        valid = f"whole numbers, {note.low} or more" if note.high is None else f"numbers {note.low} to {note.high}"
        type_name, check = "steps", lambda v: check_ints(name, v, note.low, note.high)
    elif isinstance(note, Numbers):
        valid = "real numbers" if note.count is None else f"{note.count} numbers"
        type_name, check = "numbers", lambda v: note.check(name, v)
    elif isinstance(note, Int):
        valid = f"{note.low} or more" if note.high is None else f"{note.low} to {note.high}"
        type_name, check = "int", lambda v: check_int(name, v, note.low, note.high)
    elif isinstance(note, Number):
        valid = f"{note.low:g} or more" if note.high == float("inf") else f"{note.low:g} to {note.high:g}"
        valid = "any finite number" if note.low == -float("inf") else valid
        type_name, check = "float", lambda v: check_number(name, v, note.low, note.high)
    elif typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        type_name, valid, check = "choice", ", ".join(choices), lambda v: check_choice(name, v, choices)
    elif kind is bool:
        type_name, valid, check = "bool", "True, False", lambda v: check_bool(name, v)
    else:
        from .when.soft import check_window

        type_name, valid, check = "pair", "(low, high) within 0 to 1", lambda v: check_window(name, v)
    if optional:
        inner = check
        valid, check = f"{valid}, or None", lambda v: None if v is None else inner(v)
    return Parameter(name, type_name, default, help_text, valid, check)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def methods() -> dict[str, Method]:
    """The published methods by name."""
    return dict(sorted(_methods.items()))


def recipe(name: str, **params: Any) -> Recipe:
    """The recipe of a published method.

    Args:
        name: one of `methods()`.
        params: parameters of the method, by the names of its paper's settings; the rest keep the paper's defaults.

    Raises:
        ValueError: unknown method or parameter, or a value of the wrong type or range; the known ones are listed.
    """
    if not isinstance(name, str) or name not in _methods:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(methods())}")
    return _methods[name](**params)


def resolve(what: Any, **params: Any) -> Recipe:
    """A recipe from a method's name with parameters, a `Recipe`, a `Plan`, or the folder or Hub id of a saved one.

    Raises:
        ValueError, TypeError: none of these, or parameters for something that takes none.
    """
    if isinstance(what, str) and what in _methods:
        return recipe(what, **params)
    if params:
        known = f"only a method takes parameters; known methods: {', '.join(methods())}"
        raise ValueError(f"parameter {next(iter(params))!r} does not go with {what!r:.60}: {known}")
    if isinstance(what, Recipe):
        return what
    if isinstance(what, Plan):
        return Recipe(when=Table(what), **{name: what.meta[name] for name in ("where", "keeps") if name in what.meta})
    if isinstance(what, (str, Path)):
        text = str(what)
        if isinstance(what, Path) or Path(text).exists() or "/" in text:
            return Recipe.from_pretrained(what)
        known = ", ".join(methods())
        raise ValueError(f"unknown method {text!r}; known: {known} (or the folder or Hub id of a saved recipe)")
    raise TypeError(f"a recipe is a method's name, a Recipe, a Plan or a saved one's folder; got {type(what).__name__}")
