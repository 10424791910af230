"""Rows that nobody reads are not computed: the last block's queries, projection and MLP."""

from dataclasses import dataclass, replace

from torch import Tensor, fx

from tokenprune.analysis.unread import Unread, token_dims
from tokenprune.ops.moving import first_rows
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import FACTS, INHERITED, Rewrite
from tokenprune.tracing.effects import has_effect

__all__ = ["LeaveUnread"]


@dataclass
class LeaveUnread(Pass):
    """Runs on a finished graph, which then returns no patch tokens: they would be read.

    Rows that are read are prefix tokens, which no path drops or moves. So a query sees its own key
    like any other one, and the operators that hide tokens need not know which key is whose.
    """

    unread: Unread

    def apply(self, rewrite: Rewrite) -> None:
        output, records, _, real = rewrite.output.args[0]
        rewrite.output.args = ((output, records, None, real),)
        rewrite.graph.eliminate_dead_code(has_effect)
        if not self.unread.costly:
            return
        for (node, source), dim in self.unread.slices.items():
            whole = self._read_as(rewrite, node, source)
            rewrite.copy_of(node).replace_input_with(whole, self._rows(rewrite, whole, dim))
        for node, number in self.unread.numbers:
            reader, size = rewrite.copy_of(node), self._read_as(rewrite, node, number)
            reader.replace_input_with(size, self._count(rewrite, number, reader))
        for origin, dim in self.unread.narrowed.items():
            node = rewrite.copy_of(origin)
            node.meta[FACTS] = replace(rewrite.facts(node), dims={}, gathers={})
            if node.kwargs.get("own_key"):
                node.update_kwarg("own_key", False)
            query_dim = node.kwargs.get("query_dim")
            if query_dim is not None and query_dim == dim + rewrite.rank(node):
                node.update_kwarg("query_dim", None)
        rewrite.graph.eliminate_dead_code(has_effect)

    def _rows(self, rewrite: Rewrite, whole: fx.Node, dim: int) -> fx.Node:
        how = (first_rows, whole, dim, self.unread.rows)
        return rewrite.once(("rows", whole, dim), rewrite.insert_after, whole, *how)

    def _read_as(self, rewrite: Rewrite, node: fx.Node, source: fx.Node) -> fx.Node:
        """What the copy of `node` reads of that of `source`: it, or a table that was gathered."""
        copy, reader = rewrite.copy_of(source), rewrite.copy_of(node)
        if copy in reader.all_input_nodes:
            return copy
        made = [n for n in reader.all_input_nodes if copy in n.all_input_nodes]
        ours = [n for n in made if rewrite.origin(n) is None]
        if len(ours) != 1:
            raise RuntimeError(f"{rewrite.where(reader)} does not read {copy.name}")
        return ours[0]

    def _count(self, rewrite: Rewrite, number: fx.Node, at: fx.Node) -> fx.Node:
        """A size that counts the rows that are read, put before `at`."""
        narrow: dict[fx.Node, fx.Node] = {}
        for used in number.all_input_nodes:
            copy = rewrite.copy_of(used)
            if isinstance(used.meta["val"], Tensor):
                whole = used not in self.unread.narrowed
                for dim in token_dims(rewrite.analysis, used) if whole else ():
                    narrow[copy] = self._rows(rewrite, narrow.get(copy, copy), dim)
            elif rewrite.analysis.facts[used].follows_tokens:
                narrow[copy] = self._count(rewrite, used, at)
        with rewrite.graph.inserting_before(at):
            copy = rewrite.graph.node_copy(
                rewrite.copy_of(number), lambda used: narrow.get(used, used)
            )
        copy.meta = {key: copy.meta[key] for key in INHERITED if key in copy.meta}
        return copy
