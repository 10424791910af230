"""The calls of modules in one trace: which nodes each has made."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from torch import Tensor, fx

from tokenprune.tracing.proxy import ValueProxy

__all__ = ["MODULE", "NUMBER", "ModuleCall", "RecordedCall", "calls_of"]

NUMBER = "number"
"""Key in a node's `meta`: nodes are numbered in the order in which the host made them."""

MODULE = "module"
"""Key in the `meta` of a node that is a module's call: the class and the settings of the module."""


class RecordedCall(NamedTuple):
    """One call of a module: its tensor arguments, the first tensor it returned (None if there is
    none), and the numbers of the first node that it made and of the first one made after it."""

    path: str
    inputs: tuple[fx.Node, ...]
    output: fx.Node | None
    start: int
    stop: int

    @classmethod
    def of(cls, path: str, given: Iterable[Any], output: Any, *numbers: int) -> Self:
        """A call that was `given` proxies of tensors, and other values, and returned `output`."""
        first = output[0] if type(output) in (tuple, list) and output else output
        made = first.node if type(first) is ValueProxy else None
        proxies = (v for v in given if type(v) is ValueProxy)
        return cls(
            path, tuple(v.node for v in proxies if isinstance(v.val, Tensor)), made, *numbers
        )


class ModuleCall(NamedTuple):
    """One call of a module.

    Attributes:
        path: Of the module.
        number: Which of its calls it is, from 0.
        inputs: Its tensor arguments, in order; None for one that nobody reads.
        output: The first tensor that it returned; None if there is none, or nobody reads it.
        first: The first node that it made; None if it made none that is left.
        last: The last one.
    """

    path: str
    number: int
    inputs: tuple[fx.Node | None, ...]
    output: fx.Node | None
    first: fx.Node | None
    last: fx.Node | None

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes that it made, in order."""
        node = self.first
        while node is not None:
            yield node
            node = None if node is self.last else node.next


def calls_of(
    graph: fx.Graph, recorded: Iterable[RecordedCall]
) -> dict[str, tuple[ModuleCall, ...]]:
    """The recorded calls, in terms of the nodes that are left."""
    nodes = list(graph.nodes)
    alive, numbers = set(nodes), [node.meta[NUMBER] for node in nodes]
    calls: dict[str, list[ModuleCall]] = {}
    for path, inputs, output, start, stop in sorted(recorded, key=lambda call: call.start):
        made = nodes[bisect_left(numbers, start) : bisect_left(numbers, stop)]
        first, last = (made[0], made[-1]) if made else (None, None)
        given = tuple(node if node in alive else None for node in inputs)
        returned = output if output in alive else None
        known = calls.setdefault(path, [])
        known.append(ModuleCall(path, len(known), given, returned, first, last))
    return {path: tuple(found) for path, found in calls.items()}
