"""A progress bar where there is a terminal to draw it on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ShowProgress", "steps"]

ShowProgress = bool | Callable[[int, int, str], Any]
"""True draws a bar if rich is installed and standard error is a terminal; a function is called with
the number of steps done, of all steps, and a text."""


@contextmanager
def steps(what: str, total: int, show: ShowProgress) -> Iterator[Callable[[str], None]]:
    """A function to call after each step, with a text."""
    done = 0
    if callable(show):

        def report(text: str) -> None:
            nonlocal done
            done += 1
            show(done, total, text)

        yield report
        return
    if not show or not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda text: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda text: bar.update(task, advance=1, description=f"{what}: {text}")
