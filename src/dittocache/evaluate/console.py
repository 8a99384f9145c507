"""What a terminal shows: tables, and progress bars on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .page import number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .compare import Progress
    from .comparison import Comparison


def _console() -> Console:
    """Standard output; what is piped into a file keeps its columns."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 120))


def show(what: Any) -> None:
    """Prints text with rich's markup, or a table."""
    _console().print(what)


def new_table(*columns: str, right: int = 99) -> Table:
    """A plain table; columns from number `right` on hold numbers."""
    from rich import box
    from rich.table import Table

    roomy = _console().width >= 90
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1) if roomy else 0, pad_edge=False)
    for j, column in enumerate(columns):
        justify: Any = "right" if j >= right else "left"
        table.add_column(column, justify=justify, no_wrap=not 0 < j < right, vertical="bottom")
    return table


def table_of(comparison: Comparison, fidelity: bool = True) -> Table:
    """All rows of a comparison; without fidelity only what concerns speed. Fits 80 characters."""
    columns = ["row", "com-\npute", "\nideal", "mea-\nsured", "least-\nlargest", "effi-\nciency"]
    judged = fidelity and comparison.reference.accuracy is not None
    columns += ["PSNR\ndB", "\nSSIM"] * fidelity + ["Fré-\nchet", "read\nright"] * judged + ["cache\nMiB"]
    table = new_table(*columns, right=1)
    previous = ""
    for r in comparison.results:
        if previous and r.method != previous:
            table.add_section()
        previous = r.method
        cells = [r.label, f"{r.compute_fraction:.0%}", f"{r.ideal_speedup:.2f}x", f"[bold]{r.speedup:.2f}x[/bold]"]
        cells += [f"{r.speedup_low:.2f}-{r.speedup_high:.2f}", number(r.efficiency)]
        cells += [number(r.psnr, 1), number(r.ssim, 4)] * fidelity
        cells += [number(r.frechet), "–" if r.accuracy is None else f"{r.accuracy:.0%}"] * judged
        table.add_row(*cells, number(r.bytes_peak / 2**20 if r.recipe else None, 1))
    return table


def show_comparison(comparison: Comparison, note: str = "") -> None:
    """Prints a comparison: its table, its headline, and where it was measured."""
    from .findings import headline

    made = comparison.provenance
    show(table_of(comparison))
    show(f"[bold]{headline(comparison)}[/bold]")
    count = made.get("samples", len(comparison.labels))
    show(
        f"{count} pictures, {made['steps']} steps, guidance {made['guidance_scale']}; "
        f"{made['machine']}, threads: {made['threads']}, load {made['load']}" + (f"; {note}" if note else "")
    )


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A progress bar, moved by calls (done, total, what is running); nothing where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn(title), progress.BarColumn(), progress.MofNCompleteColumn())
    times = (progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn())
    names = progress.TextColumn("{task.description}")
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with progress.Progress(*columns, *times, names, console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)
