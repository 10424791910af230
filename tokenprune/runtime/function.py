"""A rewritten graph as a Python function."""

import itertools
import linecache
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx

from tokenprune.runtime.regions import source_of
from tokenprune.tracing.effects import Store

__all__ = ["as_function"]

_numbers = itertools.count()


def as_function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the model and its placeholders; its source shows in tracebacks."""
    source, names = source_of(graph)
    if not any(isinstance(node.target, Store) for node in graph.nodes):  # it may set a module
        source = _looked_up_once(source, graph)
    file = f"<tokenprune program {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    made: Callable[..., Any] = names["forward"]
    return made


def _looked_up_once(source: str, graph: fx.Graph) -> str:
    """The source with the modules that hold others in local variables: `nn.Module` looks up each
    step of a path in Python, which shows where the arithmetic is small."""
    owners: Counter[tuple[str, ...]] = Counter()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = node.target.split(".")
            owners.update(tuple(path[:length]) for length in range(1, len(path)))
    body = source.index("\n", source.index("def forward(")) + 1
    head, rest = source[:body], source[body:]
    names: dict[tuple[str, ...], str] = {(): "self"}
    for path in sorted(path for path, uses in owners.items() if uses > 1):
        (*before, step), name = path, f"tokenprune_at_{len(names)}"
        owner = names[tuple(before)]
        found = f"{owner}.{step}" if step.isidentifier() else f'getattr({owner}, "{step}")'
        rest = re.sub(rf"(?<!\w){re.escape(found)}(?!\w)", name, rest)
        head += f"    {name} = {found}\n"
        names[path] = name
    return head + rest
