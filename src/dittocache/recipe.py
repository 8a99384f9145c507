"""Recipes: where + when + which + fill + fix, and the registry of the published methods."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from . import __version__, origin, saved
from . import card as cards
from .fill import Chosen, Fill, Hold, Linear
from .fix import Fix
from .parameters import Parameter, parameter
from .parts import Part, answers, check_bool, check_choice, jsonable, plain, show
from .plan import COMPUTE, REUSE, Plan
from .tensors import Tensors
from .when import Table, When
from .which import Which

FORMAT = "dittocache-recipe-1"
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

    @property
    def num_steps(self) -> int | None:
        """T of the runs that the recipe was made for; None if it does not say."""
        setup = self.provenance.get("setup")
        found = [
            len(self.made_for.get("timesteps", ())),
            len(self.when.plan.steps) if isinstance(self.when, Table) else None,
            len(self.fill.chosen) if isinstance(self.fill, Chosen) else None,
            len(self.fill.coefficients) if isinstance(self.fill, Linear) else None,
            self.params.get("num_steps"),
            setup.get("num_steps") if isinstance(setup, Mapping) else None,
        ]
        return next((steps for steps in found if isinstance(steps, int) and steps > 0), None)

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
        self,
        folder: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        *,
        card: bool = True,
        grid: Any = None,
        **kwargs: Any,
    ) -> None:
        """Writes the recipe into a folder (created if missing), and uploads it if asked to.

        Args:
            folder: the recipe that is in it is replaced when all of the new files are complete.
            push_to_hub: upload it.
            repo_id: where to; by default the folder's name.
            card: write a model card, README.md, too; one that was not written by dittocache is left alone.
            grid: pictures for the card, in pairs, uncached and cached: uint8 [2 n, height, width, 1 or 3]; or the path
                of a picture.
            kwargs: for `huggingface_hub.create_repo` (private, token, ...).

        Raises:
            OSError: a file could not be written; then none was changed.
            ValueError: a grid of another form, or without a card.
            TypeError: keyword arguments without an upload.
        """
        check_bool("card", card)
        if kwargs and not push_to_hub:
            raise TypeError(f"{next(iter(kwargs))!r} is none of its arguments, and goes with push_to_hub=True only")
        if grid is not None and not card:
            raise ValueError("grid is a picture for the card, so it goes with card=True; got card=False")
        folder, name = Path(folder), repo_id or Path(folder).resolve().name
        made = dataclasses.replace(self, provenance={**_versions(), **self.provenance})
        files = saved.encoded(made._laid_out)

        def write(name: str) -> None:
            of_card = cards.files(made, _methods.get(cards.method_of(made)), name, grid) if card else {}
            saved.replace(folder, files | of_card)

        write(name)
        if push_to_hub:
            repository = saved.repository(name, **kwargs)
            if repository != name:  # now with its owner
                write(repository)
            saved.upload(folder, repository, kwargs.get("token"))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Uploads the recipe and its card to the Hub; keyword arguments go to `save_pretrained`."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Recipe:
        """Reads a saved recipe from a folder or the Hub; keyword arguments go to `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: nothing there, or a damaged or foreign file.
        """
        return cls.from_dict(saved.read(name, PARTS, **kwargs))


def _held(recipe: Recipe, path: str) -> Tensors | None:
    """The tensors at a place of a recipe; None if that part has no such field."""
    part, _, name = path.partition(".")
    found = getattr(getattr(recipe, part), name, None)
    return found if isinstance(found, Tensors) else None


def _versions() -> dict[str, str]:
    """What a saved recipe was made with."""
    return {"dittocache": __version__, "diffusers": diffusers.__version__, "torch": str(torch.__version__)}


# ---- the registry of methods ----------------------------------------------------------------------------------------
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
