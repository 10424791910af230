"""A rewritten graph as a Python function."""

import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["as_function"]

_numbers = itertools.count()


def as_function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the model and its placeholders; its source shows in tracebacks."""
    code = graph.python_code(root_module="self")
    file = f"<tokenprune program {next(_numbers)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, file, "exec"), names)
    made: Callable[..., Any] = names["forward"]
    return made
