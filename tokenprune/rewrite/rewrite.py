"""The working copy of a graph that passes edit."""

import operator
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import fx, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.facts import NO_FACTS, Aligned, NodeFacts, TokenDim
from tokenprune.ops.selection import real_patches
from tokenprune.private import keystr, tree_flatten_with_path
from tokenprune.rewrite.settings import SETTINGS
from tokenprune.tracing.checkpoints import CHECKPOINT
from tokenprune.tracing.modes import MODES

__all__ = ["FACTS", "INHERITED", "ORIGIN", "POLICY", "Rewrite", "StageRecord"]

FACTS, ORIGIN = "tokens", "origin"
"""Keys in the `meta` of a copied node: its `NodeFacts`, and the traced node it is a copy of."""
INHERITED = ("where", MODES, CHECKPOINT)
POLICY = "policy"
"""Key in the `meta` of a node that holds a policy [B * rows, L]: the stage that decided it."""


class StageRecord(NamedTuple):
    """The nodes of one stage.

    Attributes:
        given: The tensor that comes in.
        entering: Its tokens, [B, P + N', D].
        keep_logits: Their scores.
        kept: Which of them are kept, as the path's kept set says it.
    """

    given: fx.Node
    entering: fx.Node
    keep_logits: fx.Node
    kept: fx.Node


class Rewrite:
    """A copy of a traced graph under rewriting. The traced graph itself never changes.

    Attributes:
        root: Holds the modules.
        analysis: What is known about the traced graph.
        graph: The copy.
        settings: Placeholder of the call's `CallSettings`.
        output: The output node of the copy.
        records: Of the stages put in so far.
    """

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        self.root, self.analysis = root, analysis
        self.graph = fx.Graph()
        self.settings = self.graph.placeholder(SETTINGS)
        self._copies: dict[fx.Node, fx.Node] = {}
        traced = analysis.traced.graph
        self.output = self.graph.output(self.graph.graph_copy(traced, self._copies))
        self.output.meta = dict(traced.output_node().meta)
        for origin, copy in self._copies.items():
            copy.meta |= {ORIGIN: origin, FACTS: analysis.facts[origin]}
        self.records: list[StageRecord] = []
        self._made: dict[Hashable, fx.Node] = {}

    @property
    def num_suffix(self) -> int:
        """How many patch tokens at the end always stay."""
        return self.analysis.plan.num_suffix

    @property
    def num_prefix(self) -> int:
        """P."""
        return self.analysis.plan.num_prefix

    def copy_of(self, node: fx.Node) -> fx.Node:
        """The copy of a traced node."""
        return self._copies[node]

    def markers(self) -> list[fx.Node]:
        """The marker of each stage."""
        return [self.copy_of(marker) for marker in self.analysis.markers]

    def origin(self, node: Any) -> fx.Node | None:
        """The traced node that `node` is a copy of; None for what a pass put in."""
        return node.meta.get(ORIGIN) if isinstance(node, fx.Node) else None

    def facts(self, node: Any) -> NodeFacts:
        """What is known about a node of the copy."""
        return node.meta.get(FACTS, NO_FACTS) if isinstance(node, fx.Node) else NO_FACTS

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put `new` in the place of `old`, which goes; facts included."""
        old.replace_all_uses_with(new)
        new.meta |= {key: old.meta[key] for key in (ORIGIN, FACTS, "val") if key in old.meta}
        if ORIGIN in old.meta:
            self._copies[old.meta[ORIGIN]] = new
        self.graph.erase_node(old)

    def dissolve(self, marker: fx.Node) -> None:
        """Take an identity out of the graph."""
        tokens = marker.all_input_nodes[0]
        marker.replace_all_uses_with(tokens)
        self._copies[marker.meta[ORIGIN]] = tokens
        self.graph.erase_node(marker)

    def narrow(self, node: fx.Node, part: fx.Node, whole: Container[tuple[Any, fx.Node]]) -> None:
        """Let all that reads `node` read a part of it, but for the (reader, node) of `whole`; the
        part then stands for the host's node."""
        for reader in list(node.users):
            if reader is not part and (reader, node) not in whole:
                reader.replace_input_with(node, part)
        part.meta |= {key: node.meta.pop(key) for key in (ORIGIN, FACTS) if key in node.meta}
        part.meta["val"] = node.meta["val"]
        self._copies[part.meta[ORIGIN]] = part

    def stand_for(self, node: fx.Node, whole: fx.Node) -> None:
        """Let a node that holds all tokens stand for the host's, in the place of one that holds
        those that are kept."""
        origin, facts = node.meta.pop(ORIGIN), node.meta.pop(FACTS)
        every = replace(facts, dims={}, folded=False)
        whole.meta |= {ORIGIN: origin, FACTS: every, "val": node.meta["val"]}
        self._copies[origin] = whole

    def nodes(self) -> list[fx.Node]:
        """The nodes that come from the host, in order, as they are now."""
        return [node for node in self.graph.nodes if ORIGIN in node.meta]

    def dims_read(self, consumer: fx.Node, node: Any) -> dict[int, TokenDim]:
        """Token dims of `node` as `consumer` reads it: those it is gathered along count too."""
        origin = self.origin(node)
        found = self.facts(consumer).gathers.get(origin) if origin is not None else None
        return dict(self.facts(node).dims or (found.dims if found else {}))

    def rank(self, node: fx.Node) -> int:
        """Rank of the tensor that `node` held when it was traced."""
        return int(node.meta["val"].ndim)

    def traced_module(self, node: fx.Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        return self.root.get_submodule(str(node.target))

    def where(self, node: fx.Node) -> str:
        """The node and its place in the host, for messages."""
        return f"'{node.name}' ({node.target}) at {node.meta.get('where')}"

    def once(self, key: Hashable, make: Callable[..., fx.Node], *args: Any) -> fx.Node:
        """What `make(*args)` returned when it was first asked for under this key."""
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def real_patches(self) -> fx.Node | None:
        """A node with [B, N], True where a patch is no padding; None if the host was not told."""
        if self.analysis.real is None:
            return None
        mask = self.copy_of(self.analysis.real)
        patches = self.analysis.num_patches[0]
        return self.once("real", self.insert_after, mask, real_patches, mask, patches)

    def insert(self, before: fx.Node, target: Callable[..., Any], *args: Any, **kw: Any) -> fx.Node:
        """Put a call of `target` before a node; it inherits that node's place in the host, and the
        modes there."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kw)
        _inherit(node, before)
        return node

    def again(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Put one more node after `node` that makes the same, of other nodes `instead` of traced
        ones."""
        new = {self.copy_of(origin): other for origin, other in instead.items()}
        with self.graph.inserting_after(node):
            return self.graph.node_copy(node, lambda used: new.get(used, used))

    def item(self, before: fx.Node, several: fx.Node, place: int) -> fx.Node:
        """One of several values that a node holds."""
        return self.insert(before, operator.getitem, several, place)

    def insert_after(self, after: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Put a call of `target` after a node."""
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args)
        _inherit(node, after)
        return node

    def map_output(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
        """Let all that reads a node read a call of `target` on it instead."""
        new = self.insert_after(node, target, node, *args)
        node.replace_all_uses_with(new, lambda user: user is not new)

    def module(self, before: fx.Node, path: str) -> fx.Node:
        """A node that holds a module of ours, put before another."""
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(path)
        _inherit(node, before)
        return node

    def output_site(self) -> fx.Node:
        """The node whose arguments are the host's output: the output object's maker, if there is
        one, else the graph's output."""
        returned = self.output.args[0]
        made = isinstance(returned, fx.Node) and isinstance(returned.target, type)
        return cast(fx.Node, returned) if made else self.output

    def token_outputs(self) -> list[tuple[str, fx.Node]]:
        """(field, node) of each output that holds tokens after a stage."""
        site = self.output_site()
        fields = dict(site.kwargs) or {"output": site.args[0]}
        leaves, _ = tree_flatten_with_path(fields)
        return [
            (f"{path[0].key}{keystr(path[1:])}", node)  # type: ignore[attr-defined]
            for path, leaf in leaves
            if isinstance(leaf, fx.Node)
            for node in _made_of(leaf)
            if self.facts(node).dims
        ]

    def alignments(self) -> list[tuple[fx.Node, fx.Node, Aligned]]:
        """(consumer, argument, how to gather it), in the order of the graph."""
        return [
            (node, self.copy_of(source), aligned)
            for node in self.nodes()
            for source, aligned in self.facts(node).gathers.items()
        ]


def _inherit(node: fx.Node, at: fx.Node) -> None:
    node.meta |= {key: at.meta[key] for key in INHERITED if key in at.meta}


def _made_of(node: fx.Node) -> list[fx.Node]:
    """A node, or what went into it if it makes an output object."""
    if not isinstance(node.target, type):
        return [node]
    return [inner for used in node.all_input_nodes for inner in _made_of(used)]
