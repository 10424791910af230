"""The source of a graph whose nodes run in modes of their own, or are recomputed in backward.

torch.fx writes one statement a node. Neighbours in the same modes are put in a `with` block, those
of one checkpointed call in a function that `torch.utils.checkpoint` calls. A call that rewriting
has split (a stage draws noise, which must not be drawn twice) becomes several such functions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from tokenprune.private import exporting
from tokenprune.tracing.checkpoints import CHECKPOINT
from tokenprune.tracing.modes import MODES, NAMES_IN_SOURCE

__all__ = ["source_of"]

INDENT = "    "


class _Statement(NamedTuple):
    node: fx.Node
    lines: Sequence[str]


def source_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """Python source of a function `forward(self, ...)`, and the names that it reads."""
    if not any(MODES in node.meta or CHECKPOINT in node.meta for node in graph.nodes):
        code = graph.python_code(root_module="self")
        return code.src, dict(code.globals)
    head, statements, names = _statements(graph)
    last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}
    lines = list(head)
    for called, group in groupby(statements, lambda each: each.node.meta.get(CHECKPOINT)):
        run = list(group)
        if called is None:
            lines += _in_modes(run)
            continue
        options = f"tokenprune_options_{called.number}"  # no node has such a name
        names[options] = dict(called.options)
        lines += _function(run, f"tokenprune_part_{called.number}", options, last_use)
    return "\n".join(lines), names | NAMES_IN_SOURCE | {"tokenprune_checkpointed": checkpointed}


def checkpointed(part: Any, options: Mapping[str, Any], *values: Any) -> Any:
    """Run a part of a program; where gradients are recorded, so that backward computes its insides
    again. An exported program has no backward."""
    if not torch.is_grad_enabled() or exporting():
        return part(*values)
    return checkpoint(part, *values, use_reentrant=False, **options)


def _begin(number: int) -> None:
    """Marks in a graph's source where a node's statement begins."""


def _statements(graph: fx.Graph) -> tuple[list[str], list[_Statement], dict[str, Any]]:
    """The source's first lines; each node with its own; and the names that they read."""
    marked, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    returned = marked.graph_copy(graph, copies)
    marked.output(returned)
    order = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    order.append(graph.output_node())
    copies[order[-1]] = marked.output_node()
    for number, node in enumerate(order):
        with marked.inserting_before(copies[node]):
            marked.call_function(_begin, (number,))
    code = marked.python_code(root_module="self")
    names = dict(code.globals)
    begins = next(name for name, value in names.items() if value is _begin)
    pieces = re.split(rf"^ *\w+ = {begins}\((\d+)\).*\n", code.src, flags=re.MULTILINE)
    del names[begins]
    head, rest = pieces[0].splitlines(), iter(pieces[1:])
    made = [
        _Statement(order[int(number)], [line.removeprefix(INDENT) for line in text.splitlines()])
        for number, text in zip(rest, rest, strict=True)
    ]
    return head, made, names


def _in_modes(run: Sequence[_Statement]) -> Iterator[str]:
    for modes, group in groupby(run, lambda each: each.node.meta.get(MODES, ())):
        if modes:
            yield f"{INDENT}with {', '.join(mode.source for mode in modes)}:"
        inner = INDENT * 2 if modes else INDENT
        yield from (f"{inner}{line}" for each in group for line in each.lines)


def _function(
    run: Sequence[_Statement], name: str, options: str, last_use: Mapping[fx.Node, fx.Node]
) -> Iterator[str]:
    """A function of what the statements read, and its call."""
    nodes = dict.fromkeys(each.node for each in run)
    read = dict.fromkeys(used for node in nodes for used in node.all_input_nodes)
    given = [used for used in read if used not in nodes]
    made = [node.name for node in nodes if any(user not in nodes for user in node.users)]
    parameters = ", ".join(used.name for used in given)
    yield f"{INDENT}def {name}({parameters}):"
    yield from (f"{INDENT}{line}" for line in _in_modes(run))
    yield f"{INDENT * 2}return {', '.join(made) or None}"
    call = f"tokenprune_checkpointed({', '.join([name, options, *(used.name for used in given)])})"
    done = [used.name for used in given if last_use[used] in nodes]
    free = f";  {' = '.join([*done, 'None'])}" if done else ""
    yield f"{INDENT}{', '.join(made)}{' = ' if made else ''}{call}{free}"
