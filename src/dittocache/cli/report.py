"""The page of saved comparisons: report."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from .base import Json, app, examples, print_json, usage_errors


@app.command(
    epilog=examples(
        "dittocache report dittocache-demo --open",
        "dittocache report dittocache-demo --out page.html",
        "dittocache report published tuned --out both.html",
    )
)
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="Folders that dittocache demo, eval or tune wrote.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page's file.", show_default="FOLDER/index.html, of several: report.html")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write the HTML page of a saved comparison again, and print its table.

    Several folders stand side by side in one page if they drew the same samples: same labels, same seeds, and the same
    pictures of the uncached row.
    """
    from ..evaluate import Comparison, write_page
    from ..evaluate.comparison import side_by_side
    from ..evaluate.console import show_comparison

    with usage_errors():
        comparison = side_by_side([Comparison.load(folder) for folder in folders], [f.name or str(f) for f in folders])
        out = out or (folders[0] / "index.html" if len(folders) == 1 else Path("report.html"))
        page = write_page(comparison, out)
        if open_page and not webbrowser.open(page.resolve().as_uri()):
            raise ValueError(f"no browser was found; the page is {page}")
    if as_json:
        print_json(comparison.to_dict() | {"page": str(page)})
        return
    show_comparison(comparison)
    typer.echo(f"\nThe page: {page}")
