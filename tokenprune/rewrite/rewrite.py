"""The contract of a pass, and the working copy of a graph that passes edit."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from tokenprune.analysis.padding import real_patches
from tokenprune.analysis.plan import Plan
from tokenprune.analysis.token_probe import Aligned, TokenAxes, TokenDim
from tokenprune.errors import LeakError, UnsupportedHostError
from tokenprune.tracing.host_graph import Traced

__all__ = ["CONTEXT", "PREDICTORS", "Pass", "Rewrite", "run_passes"]

PREDICTORS = "token_predictors"
CONTEXT = "tokenprune_context"  # a name that no host gives an argument


class Rewrite:
    """A copy of a traced graph under rewriting. The traced graph itself never changes.

    Attributes:
        graph: The copy.
        context: Placeholder that carries the call's `StageContext`.
        records: Per stage, what the emitted graph returns beside the host's output.
        entering: Per stage, the tokens as they come in.
        real: What `real_patches` made.
    """

    def __init__(self, root: nn.Module, traced: Traced, axes: TokenAxes, plan: Plan) -> None:
        self.root, self.traced, self.axes, self.plan = root, traced, axes, plan
        self.graph = fx.Graph()
        self.context = self.graph.placeholder(CONTEXT)
        self._copies: dict[fx.Node, fx.Node] = {}
        output = self.graph.graph_copy(traced.graph, self._copies)
        self._origins = {copy: node for node, copy in self._copies.items()}
        self.output = self.graph.output(output)
        self.output.meta = dict(traced.graph.output_node().meta)
        self.records: list[tuple[fx.Node, ...]] = []
        self.entering: list[fx.Node] = []
        self.real: fx.Node | None = None

    def copy_of(self, node: fx.Node) -> fx.Node:
        """The copy of a traced node."""
        return self._copies[node]

    def origin(self, node: fx.Node) -> fx.Node | None:
        """The traced node behind `node`; None for what a pass put in."""
        return self._origins.get(node)

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` stand for `old` everywhere, facts about its dims included."""
        origin = self._origins.pop(old, None)
        if origin is not None:
            self._origins[new] = origin
            self._copies[origin] = new

    def nodes(self) -> list[fx.Node]:
        """The nodes that come from the host, in order, as they are now."""
        return [node for node in self.graph.nodes if node in self._origins]

    def dims(self, node: Any) -> dict[int, TokenDim]:
        """Token dims of a node of the copy; empty if it holds no tokens."""
        origin = self._origins.get(node) if isinstance(node, fx.Node) else None
        return self.axes.dims.get(origin, {}) if origin is not None else {}

    def dims_read(self, consumer: fx.Node, node: Any) -> dict[int, TokenDim]:
        """Token dims of `node` as `consumer` reads it: those it is gathered along count too."""
        aligned = self.axes.aligned.get(self._origins[consumer], {})
        found = aligned.get(self._origins[node]) if node in self._origins else None
        return self.dims(node) or dict(found.dims if found else {})

    def rank(self, node: Any) -> int:
        """Rank of the tensor that `node` held when it was traced."""
        return int(self._origins[node].meta["val"].ndim)

    def traced_module(self, node: fx.Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        return self.root.get_submodule(str(node.target))

    def fold(self, node: fx.Node) -> int | None:
        """How many rows of dim 0 are one image; None if dim 0 does not count images alone."""
        origin = self._origins.get(node)
        if origin in self.axes.batch_first:
            return 1
        return self.axes.batch_fold.get(origin) if origin is not None else None

    def where(self, node: fx.Node) -> str:
        """The node and its place in the host, for messages."""
        return f"'{node.name}' ({node.target}) at {node.meta.get('where')}"

    def marker(self, stage: int) -> fx.Node:
        return self.copy_of(self.traced.markers[stage])

    def real_patches(self) -> fx.Node | None:
        """A node with [B, N], True where a patch is no padding; None if the host was not told."""
        if self.axes.real is None:
            return None
        if self.real is None:
            mask = self.copy_of(self.axes.real)
            tokens = self.traced.markers[0].meta["val"]
            patches = int(tokens.shape[1]) - self.plan.num_prefix_tokens
            self.real = self.insert_after(mask, real_patches, mask, patches)
        return self.real

    def insert(
        self, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Put a call of `target` before a node; it inherits that node's place in the host."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["where"] = before.meta.get("where")
        return node

    def insert_after(
        self, after: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Put a call of `target` after a node."""
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["where"] = after.meta.get("where")
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
        named = [(f"{p[0].key}{keystr(p[1:])}", leaf) for p, leaf in leaves]  # type: ignore[attr-defined]
        return [
            (field, node)
            for field, leaf in named
            if isinstance(leaf, fx.Node)
            for node in _made_of(leaf)
            if self.dims(node)
        ]

    def predictor(self, before: fx.Node, stage: int) -> fx.Node:
        """A node that holds the predictor module of `stage`."""
        with self.graph.inserting_before(before):
            return self.graph.get_attr(f"{PREDICTORS}.{stage}")

    def alignments(self) -> list[tuple[fx.Node, fx.Node, Aligned]]:
        """(consumer, argument, how to gather it), in the order of the graph."""
        return [
            (node, self.copy_of(source), aligned)
            for node in self.nodes()
            for source, aligned in self.axes.aligned.get(self._origins[node], {}).items()
        ]


def _made_of(node: fx.Node) -> list[fx.Node]:
    """A node, or what went into it if it makes an output object."""
    if not isinstance(node.target, type):
        return [node]
    return [inner for used in node.all_input_nodes for inner in _made_of(used)]


class Pass(ABC):
    """One edit of a graph.

    `requires` looks at what comes in and raises before anything is changed; `apply` edits;
    `ensures` looks at the result.
    """

    def requires(self, rewrite: Rewrite) -> None:  # noqa: B027 - most passes need nothing
        """Raise if this graph cannot be edited."""

    @abstractmethod
    def apply(self, rewrite: Rewrite) -> None:
        """Edit the copy."""

    def ensures(self, rewrite: Rewrite) -> None:  # noqa: B027 - lint has seen the graph
        """Raise if the result is not what the pass promises."""


def run_passes(rewrite: Rewrite, passes: Sequence[Pass]) -> fx.Graph:
    """Run `passes` in order, each checked before and after.

    Raises:
        LeakError: A node mixes tokens in a way no rule can mask.
        UnsupportedHostError: Anything else that stands in the way; the pass is named.
    """
    for each in passes:
        each.requires(rewrite)
        try:
            each.apply(rewrite)
            rewrite.graph.lint()
        except LeakError:
            raise
        except (RuntimeError, LookupError, TypeError) as error:
            raise UnsupportedHostError(
                f"{type(each).__name__} failed on this host: {type(error).__name__}: {error}"
            ) from error
        each.ensures(rewrite)
    return rewrite.graph
