"""Console output: tables or JSON on standard output; progress, notes and errors on the other."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from tokenprune.report.table import Table

__all__ = [
    "Step",
    "bar",
    "is_main_process",
    "progress",
    "report",
    "say",
    "show",
    "show_error",
    "warn",
    "working",
]

# Columns where the terminal gives no width: wide enough that no table is cut.
PIPE_WIDTH = 140
EVERY = 5.0
"""Seconds between two lines about something that takes long, where there is no terminal."""

Step = Callable[[int, int, Mapping[str, Any]], None]


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if known else PIPE_WIDTH, highlight=False)


def say(*lines: str) -> None:
    """Print lines without wrapping."""
    for line in lines:
        _console().print(Text(line), soft_wrap=True)


def report(as_json: bool, data: Any, *parts: Table | str) -> None:
    """Print what a command found: as one line of JSON, or as tables and lines.

    `data` is plain, but for paths and tuples.
    """
    if as_json:
        sys.stdout.write(json.dumps(data, default=str) + "\n")
        return
    for part in parts:
        if isinstance(part, Table):
            show(part)
        else:
            say(part)


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


def show_error(error: object) -> None:
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
    """Progress on standard error: a bar on a terminal, elsewhere a line every few seconds.

    Yields a function of (done, total, latest figures: a `loss`, or a `text`).
    """
    if not is_main_process():
        yield lambda done, total, figures: None
        return
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as drawn:
        task = drawn.add_task(title, total=1, unit=unit, figures="")

        def step(done: int, total: int, figures: Mapping[str, Any]) -> None:
            drawn.update(task, completed=done, total=total, figures=_said(figures))

        yield step


def _lines(title: str, unit: str) -> Step:
    started = latest = time.monotonic()

    def step(done: int, total: int, figures: Mapping[str, Any]) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest >= EVERY:
            latest = now
            parts = [f"{title}: {done}/{total} {unit}", _said(figures), f"{now - started:.0f} s"]
            _line(", ".join(part for part in parts if part))

    return step


def _said(figures: Mapping[str, Any]) -> str:
    loss = figures.get("loss")
    return f"loss {loss:.3f}" if isinstance(loss, int | float) else str(figures.get("text", ""))


def _line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def progress(title: str, unit: str = "steps") -> Iterator[Callable[[int, int, str], None]]:
    """`bar`, for functions of the library: yields what they take as `progress`."""
    with bar(title, unit) as step:
        yield lambda done, total, text: step(done, total, {"text": text})


@contextmanager
def working(what: str) -> Iterator[None]:
    """Work whose steps are not counted: a spinner on a terminal, elsewhere a line every few
    seconds."""
    console = _console(stderr=True)
    if console.is_terminal:
        with console.status(Text(what)):
            yield
        return
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(EVERY):
            _line(f"{what}: {time.monotonic() - started:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    if is_main_process():
        teller.start()
    try:
        yield
    finally:
        done.set()
        if teller.is_alive():
            teller.join()
