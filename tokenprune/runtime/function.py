"""A rewritten graph as a Python function."""

import itertools
import linecache
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from tokenprune.analysis.operators import argument
from tokenprune.runtime.regions import source_of
from tokenprune.tracing.effects import Store
from tokenprune.tracing.hooks import UNHOOKED, would_run_hooks
from tokenprune.tracing.idle import is_idle

__all__ = ["as_function"]

_numbers = itertools.count()
PATH = re.compile(r"""(?<!\w)(?:getattr\()*self(?:\.\w+|, "[^"]*"\))+""")
"""A module or tensor of the model in a source that fx has written."""


def as_function(graph: fx.Graph, host: nn.Module) -> Callable[..., Any]:
    """A graph of `host` as a function of the model and its placeholders; its source shows in
    tracebacks."""
    own = fx.Graph()
    output = own.output(own.graph_copy(graph, {}))
    output.meta = dict(graph.output_node().meta)
    stores = any(isinstance(node.target, Store) for node in graph.nodes)  # it may set a module
    if not stores:
        _leave_out_idle(own, host)
    _without_hooks(own)
    source, names = source_of(own)
    if not stores:
        source = _looked_up_once(source, own)
    file = f"<tokenprune program {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    made: Callable[..., Any] = names["forward"]
    return made


def _leave_out_idle(graph: fx.Graph, host: nn.Module) -> None:
    """Without the calls that return what they are given: as many as a third of a host's modules.

    Guards watch what that depends on; a module with hooks stays, which run when it is called.
    """
    for node in graph.nodes:
        if node.op == "call_module" and UNHOOKED not in node.meta and len(node.args) == 1:
            module = _module_at(host, node.target)
            idle = module is not None and is_idle(module) and not would_run_hooks(module)
        else:
            idle = node.target is F.dropout and argument(node, 2, "training", default=True) is False
        given = argument(node, 0, "input")
        if idle and isinstance(given, fx.Node):
            node.replace_all_uses_with(given)
            graph.erase_node(node)


def _module_at(host: nn.Module, path: Any) -> nn.Module | None:
    """A module of the host; None for what `wrap` added."""
    try:
        return host.get_submodule(path)
    except AttributeError:
        return None


def _without_hooks(graph: fx.Graph) -> None:
    """Call forwards where other nodes run the hooks of a module."""
    for node in [node for node in graph.nodes if UNHOOKED in node.meta]:
        with graph.inserting_before(node):
            module = graph.get_attr(str(node.target))
            called = graph.call_function(_forward, (module, *node.args), dict(node.kwargs))
        module.meta = called.meta = node.meta
        node.replace_all_uses_with(called)
        graph.erase_node(node)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.forward(*args, **kwargs)


def _looked_up_once(source: str, graph: fx.Graph) -> str:
    """The source with the modules that hold others in local variables: `nn.Module` looks up each
    step of a path in Python, which shows where the arithmetic is small."""
    nodes = (node for node in graph.nodes if node.op in ("call_module", "get_attr"))
    targets = [tuple(node.target.split(".")) for node in nodes]
    uses = Counter(path[:length] for path in targets for length in range(1, len(path)))
    names, lines = {(): "self"}, list[str]()
    for path in sorted(path for path, count in uses.items() if count > 1):
        name = f"tokenprune_at_{len(names)}"
        lines.append(f"    {name} = {_step(names[path[:-1]], path[-1])}\n")
        names[path] = name
    written = dict[str, str]()
    for path in targets:
        whole = short = "self"
        for number, step in enumerate(path, start=1):
            whole, short = _step(whole, step), names.get(path[:number], _step(short, step))
        written[whole] = short
    body = source.index("\n", source.index("def forward(")) + 1
    rest = PATH.sub(lambda found: written.get(found[0], found[0]), source[body:])
    return source[:body] + "".join(lines) + rest


def _step(owner: str, name: str) -> str:
    """An attribute as fx writes it."""
    return f"{owner}.{name}" if name.isidentifier() else f'getattr({owner}, "{name}")'
