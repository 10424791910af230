"""Console output: tables, progress bars, notes and errors."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from tokenprune.report.table import Table

__all__ = ["bar", "is_main_process", "say", "show", "show_error", "warn", "working"]

# Columns where the terminal gives no width: wide enough that no table is cut.
PIPE_WIDTH = 140

Step = Callable[[int, int, Mapping[str, Any]], None]


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if known else PIPE_WIDTH, highlight=False)


def say(*lines: str) -> None:
    """Print lines without wrapping."""
    for line in lines:
        _console().print(Text(line), soft_wrap=True)


def show(table: Table) -> None:
    """Print a table."""
    title = Text(table.title, style="bold")
    drawn = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    first, *others = map(Text, table.columns)
    drawn.add_column(first, overflow="fold", no_wrap=True)  # names that users copy never wrap
    for column in others:
        drawn.add_column(column, justify="right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    _console().print(drawn)
    if table.note:
        say(*table.note.splitlines(), "")


def show_error(error: Exception) -> None:
    """Print an error without its traceback."""
    text = Text.assemble(("error: ", "bold red"), str(error))
    _console(stderr=True).print(text, soft_wrap=True)


def warn(message: str) -> None:
    """Print a note on standard error."""
    _console(stderr=True).print(Text.assemble(("note: ", "bold"), message), soft_wrap=True)


def is_main_process() -> bool:
    """Whether this process is rank 0, which alone writes and prints under `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bar(title: str, unit: str = "steps") -> Iterator[Step]:
    """A progress bar on standard error; yields a function of (done, total, latest figures)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = _console(stderr=True)
    with Progress(*columns, console=console, disable=not is_main_process()) as progress:
        task = progress.add_task(title, total=1, unit=unit, figures="")

        def step(done: int, total: int, figures: Mapping[str, Any]) -> None:
            loss = figures.get("loss")
            shown = f"loss {loss:.3f}" if isinstance(loss, int | float) else ""
            progress.update(task, completed=done, total=total, figures=shown)

        yield step


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error for work whose steps are not counted."""
    with _console(stderr=True).status(Text(what)):
        yield
