"""A rewritten graph as a Python function."""

import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch import fx

from tokenprune.runtime.regions import source_of

__all__ = ["as_function"]

_numbers = itertools.count()


def as_function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the model and its placeholders; its source shows in tracebacks."""
    source, names = source_of(graph)
    file = f"<tokenprune program {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    made: Callable[..., Any] = names["forward"]
    return made
