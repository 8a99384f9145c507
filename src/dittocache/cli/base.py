"""What all verbs share: the app, refusals in one line with exit code 2, options, pipelines and parameters by name."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from ..evaluate.task import Asked
    from ..parameters import Parameter
    from ..recipe import Method

# typer ships its own copy of click, or uses click, depending on its version
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]
MODEL = "glyphs"
# of the help, whichever file a command stands in
ORDER = (
    *("demo", "report", "bench", "sample", "eval", "tune", "calibrate", "train"),
    *("methods", "describe", "doctor"),
)


class _OneLine(TyperGroup):
    """A group of commands whose usage errors are one line on stderr and exit code 2."""

    def list_commands(self, context: Any) -> list[str]:
        return sorted(super().list_commands(context), key=ORDER.index)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standalone_mode = kwargs.pop("standalone_mode", True)
        try:
            code = super().main(*args, **(kwargs | {"standalone_mode": False}))
        except ClickException as error:
            if not standalone_mode:
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            typer.echo(f"Error: {' '.join(error.format_message().split()).rstrip('.')}{hint}", err=True)
            sys.exit(2)
        except typer.Abort:
            sys.exit(130)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=_OneLine,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of the command `dittocache`."""
    app(prog_name="dittocache")


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns what a bad argument raises into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from None


def examples(*lines: str) -> str:
    return "\n\n".join(("Examples:", *lines))


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ... By default a GPU if there is one.")]
Model = Annotated[str, typer.Option(help="A bundled model: glyphs (characters) or emoji (from texts).")]
Pipe = Annotated[
    str, typer.Argument(metavar="PIPE", help="A bundled model, the folder of a saved pipeline, or a name on the Hub.")
]
Guidance = Annotated[
    float | None, typer.Option(help="Strength of classifier-free guidance.", show_default="the pipeline's own")
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(help="A class number or prompt; may be given several times.", show_default="all that it knows"),
]
Prompts = Annotated[Path | None, typer.Option(help="A text file with a prompt in every line.")]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter of the method; may be given several times."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Diffusion transformers that sample faster by reusing features between denoising steps.

    Start with `dittocache demo`: it draws pictures with and without caching and writes one page that shows
    how much faster, and how close.
    """
    if version:
        from .. import __version__

        typer.echo(f"dittocache {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


# ---- what several commands need -------------------------------------------------------------------------------------
def need_extras() -> None:
    """Raises an ImportError now rather than after minutes of drawing."""
    from ..evaluate.doctor import missing_extras

    if missing_extras():
        raise ImportError(missing_extras())


def device_named(name: str) -> str:
    """A device that is there; `auto` is the GPU, else the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}: {str(error).splitlines()[0]}") from None
    return name


def load(device: str, model: str = MODEL) -> Any:
    """A bundled pipeline, or one that was saved in a folder, quiet.

    Raises:
        ValueError: there is no such model, or the folder holds no pipeline.
    """
    from .. import bundled
    from ..evaluate import pipelines

    pipe = pipelines.load(model, device_named(device))
    if model in bundled.names() and pipe.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _fit_threads(pipe, bundled.questions(model, 12).conditions)
    return pipe


def _fit_threads(pipe: Any, conditions: Any) -> None:
    """Sets as many threads as are fastest right now: 1, 2, 4, ... while each doubling gains a tenth.

    A small network gains little from many threads, and beside another busy process threads that wait for each other
    can make it ten times slower.
    """
    import torch

    best, threads, most = float("inf"), 1, torch.get_num_threads()
    while threads <= most:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        pipe(conditions, num_inference_steps=2, output_type="np")
        seconds = time.perf_counter() - began
        if seconds > 0.9 * best:
            break
        best, threads = seconds, 2 * threads
    torch.set_num_threads(max(1, threads // 2))


def asked(model: str, conditions: list[str], prompts: Path | None) -> Asked:
    """What is asked of a model: some conditions, or the lines of a file, or else everything that it knows.

    Raises:
        ValueError: both, an empty file, a text for a model of classes, or nothing for one that draws from prompts.
    """
    from ..evaluate import pipelines
    from ..evaluate.task import Asked, asked_of

    if conditions and prompts:
        raise ValueError("of --condition and --prompts give one")
    if prompts is not None:
        conditions = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not conditions:
            raise ValueError(f"{prompts} holds no prompts: one in every line")
    if not conditions:
        return asked_of(model)
    numbered = pipelines.classes(model) > 0
    wrong = next((text for text in conditions if numbered and not text.isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"{model} draws classes: give their numbers, not {wrong!r}")
    chosen = tuple(int(text) if numbered else text for text in conditions)
    return Asked(chosen, tuple(conditions))


def method_named(name: str) -> Method:
    from .. import methods

    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return known[name]


def parse(method: str | None, texts: list[str] | None) -> dict[str, Any]:
    """`name=value` texts as parameters: Python literals, or else text.

    Raises:
        ValueError: not of that form, or the method does not take it.
    """
    params = values_of(texts)
    if params and method is None:
        raise ValueError("--param needs --method")
    if method is not None and (params or not Path(method).is_dir()):
        method_named(method)(**params)
    return params


def values_of(texts: list[str] | None) -> dict[str, Any]:
    """`name=value` texts as Python literals, or else text; a ValueError for what is not of that form."""
    values: dict[str, Any] = {}
    spelled = {"true": "True", "false": "False", "none": "None"}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"a parameter is NAME=VALUE, not {text!r}")
        try:
            values[name] = ast.literal_eval(spelled.get(value.lower(), value))
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def show_parameters(parameters: dict[str, Parameter]) -> None:
    from rich.markup import escape

    from ..evaluate.console import new_table, show

    table = new_table("parameter", "default", "valid", "what it is")
    for p in parameters.values():
        table.add_row(f"[bold]{p.name}[/bold]", str(p.default), p.valid, escape(p.help))
    show(table)


def parameters_dict(parameters: dict[str, Parameter]) -> dict[str, Any]:
    return {
        p.name: {"type": p.type, "default": p.default, "valid": p.valid, "help": p.help} for p in parameters.values()
    }
