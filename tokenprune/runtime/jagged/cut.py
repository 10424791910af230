"""A jagged graph, cut after each stage's selection into segments that run bucket by bucket.

Between segments every value holds the whole batch; inside one, some images. What a segment needs
of an earlier one is handed on, but for what is cheap to compute again (sizes, parameters,
policies), which each segment computes for itself: a size that counts images is its bucket's.
What mixes images (a loss) waits for the last segment, which sees the whole batch again.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.fx.node import map_arg

from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.ops.jagged import kept_policy, take_chosen
from tokenprune.ops.moving import length_after
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.runtime.function import as_function
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.interpret import tensors_in

__all__ = ["Segment", "Segments", "cut"]

_FACTORIES = (Kind.FACTORY, Kind.ONES)


class Segment(NamedTuple):
    """One piece of a cut graph: `run`, a function of (model, *values).

    Attributes:
        takes: Names of the values that it reads.
        shapes: Those of them whose shape alone it reads.
        gives: Names of the values that it returns; empty for the last, which returns the result.
        chosen: Name of the value that says which tokens the images have in it; None where all
            images run together.
        numbers: Name of the value that says the same in original numbering.
        done: Names that no later segment reads.
    """

    takes: tuple[str, ...]
    shapes: frozenset[str]
    gives: tuple[str, ...]
    chosen: str | None
    numbers: str | None
    done: tuple[str, ...]
    run: Callable[..., Any]


class Segments(NamedTuple):
    """A cut graph.

    Attributes:
        pieces: In the order in which they run.
        rows_per_image: Of dim 0 of each value that is handed on; None if it belongs to no image, -1
            if that shows when it is computed.
        split: Images can run apart; else all run together, on rows as long as the longest.
    """

    pieces: tuple[Segment, ...]
    rows_per_image: dict[str, int | None]
    split: bool


def cut(rewrite: Rewrite) -> Segments:
    """Cut a rewritten jagged graph, after its last pass."""
    return _Cut(rewrite).segments()


class _Cut:
    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self.nodes: list[fx.Node] = list(rewrite.graph.nodes)
        self.stages = [node for node in self.nodes if node.target is take_chosen]
        self.mixed = self._mixing_images()
        self.number = self._numbered()

    def segments(self) -> Segments:
        count = max(self.number.values()) + 1
        pieces = [[n for n in self.nodes if self.number[n] == i] for i in range(count)]
        reads = [self._reads(piece) for piece in pieces]
        chosen = [None, *(str(node.args[1]) for node in self.stages), None]
        numbers = [None, *(record.kept.name for record in self.rewrite.records), None]
        made = []
        for i, piece in enumerate(pieces):
            later = [value for others in reads[i + 1 :] for value in others]
            gives = [value for value in dict.fromkeys(later) if self._changes(i, piece, value)]
            takes = list(reads[i])
            made.append(
                Segment(
                    takes=tuple(node.name for node in takes),
                    shapes=frozenset(n.name for n, whole in reads[i].items() if not whole),
                    gives=tuple(node.name for node in gives),
                    chosen=chosen[i],
                    numbers=numbers[i],
                    done=tuple(node.name for node in takes if node not in set(later)),
                    run=as_function(self._graph(piece, takes, gives)),
                )
            )
        handed_on = dict.fromkeys(value for found in reads for value in found)
        rows = {node.name: self._rows(node) for node in handed_on}
        return Segments(tuple(made), rows, self._splits(handed_on))

    def _numbered(self) -> dict[fx.Node, int]:
        """Node -> segment: how many stages come before it; the last is for the whole batch."""
        number: dict[fx.Node, int] = {}
        current, last = 0, len(self.stages)
        for node in self.nodes:
            current += node.target is take_chosen
            whole = self._whole(node)  # a part is made where the whole is
            number[node] = current if whole is None else number[whole]
            if number[node] != last or self._cheap(node):
                continue
            makes_output = node.op == "output" or isinstance(node.target, type)
            late = any(number[used] > last for used in node.all_input_nodes)
            if makes_output or late or node in self.mixed:
                number[node] = last + 1
        return number

    def _mixing_images(self) -> set[fx.Node]:
        """Tensors that belong to no image, made of what images hold."""
        found, holds = set[fx.Node](), set[fx.Node]()  # what holds anything of images
        for node in self.nodes:
            made_of = [used for used in node.all_input_nodes if used in holds]
            given = node.op == "placeholder" and self._rows(node) is not None
            factory = kind_of(self.rewrite.root, node) in _FACTORIES
            if not (given or made_of) or self._plain(node) or factory:
                continue
            holds.add(node)
            own = self.rewrite.origin(node) is None
            batched = own or self.rewrite.facts(node).batched
            if made_of and not batched and self._is_tensor(node):
                found.add(node)
        return found

    def _reads(self, piece: Sequence[fx.Node]) -> dict[fx.Node, bool]:
        """The values that a segment takes; True if it reads more of one than the shape."""
        own, found, seen = set(piece), dict[fx.Node, bool](), set[fx.Node]()

        def visit(node: fx.Node) -> None:
            for used in node.all_input_nodes:
                if self._cheap(used) and used not in seen:
                    seen.add(used)
                    visit(used)
                elif used not in own and not self._cheap(used):
                    found[used] = found.get(used, False) or not self._plain(node)

        for node in piece:
            if not self._cheap(node):
                visit(node)
        return {node: True for node in piece if node.op == "placeholder"} | found

    def _changes(self, segment: int, piece: Sequence[fx.Node], value: fx.Node) -> bool:
        """Whether a value is new or other after a segment."""
        written = (value in node.args[:1] for node in piece if has_effect(node))
        return value.op != "placeholder" and (self.number[value] == segment or any(written))

    def _graph(
        self, piece: Sequence[fx.Node], takes: Sequence[fx.Node], gives: Sequence[fx.Node]
    ) -> fx.Graph:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in takes}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:  # cheap, else it is copied already
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        for node in piece:
            if node.op == "output":
                graph.output(map_arg(node.args[0], copied))
            elif node not in copies and not self._cheap(node):
                copied(node)
        if gives or not any(node.op == "output" for node in piece):
            graph.output(tuple(map(copied, gives)))
        return graph

    def _cheap(self, node: fx.Node) -> bool:
        """True if cheap enough to compute again in every segment."""
        return node.op == "get_attr" or node.target is kept_policy or self._plain(node)

    def _plain(self, node: fx.Node) -> bool:
        """Whether a node is numbers, made of the shapes of tensors."""
        if node.op not in ("call_function", "call_method") or has_effect(node):
            return False
        origin = self.rewrite.origin(node)
        if origin is None:
            source = node.args[0] if node.target is operator.getitem else None
            of_size = isinstance(source, fx.Node) and self._plain(source)
            return of_size or node.target is length_after
        return not tensors_in(origin.meta.get("val"))

    def _is_tensor(self, node: fx.Node) -> bool:
        origin = self.rewrite.origin(node)
        return origin is None or isinstance(origin.meta.get("val"), Tensor)

    def _whole(self, node: fx.Node) -> fx.Node | None:
        """What holds several tensors, if a node takes one of them."""
        source: Any = node.args[0] if node.target is operator.getitem else None
        origin = self.rewrite.origin(source)
        several = origin is not None and isinstance(origin.meta.get("val"), tuple | list)
        return source if several else None

    def _rows(self, node: fx.Node) -> int | None:
        """See `Segments.rows_per_image`."""
        own = self.rewrite.origin(node) is None and node is not self.rewrite.settings
        return -1 if own else self.rewrite.facts(node).rows_per_image

    def _splits(self, handed_on: Iterable[fx.Node]) -> bool:
        """Whether images can be told apart in all that happens between two stages."""
        between = range(1, len(self.stages) + 1)
        mixed = any(self.number[node] in between for node in self.mixed)
        if any(map(is_hook_node, self.nodes)):  # they run once a call, on the whole batch
            return False
        return not (mixed or self.rewrite.analysis.batch_bound) and all(
            self._is_tensor(node) and not self.rewrite.facts(node).batched
            for node in handed_on
            if self._rows(node) is None
        )
