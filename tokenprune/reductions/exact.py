"""Exact: nothing is pruned; rows that no output reads are not computed."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from tokenprune.analysis.blocks import Blocks
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.reductions.protocol import MODES, Proof, Reduction
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.kept import KEPT_SETS, KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.settings import PathName
from tokenprune.scorers import Scorer
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Exact"]


@MODES.register("exact")
class Exact(Reduction):
    """Its one stage, before the last block, keeps every token: it says which tokens are meant."""

    name: ClassVar[str] = "exact"
    nested: ClassVar[bool] = True
    removes: ClassVar[bool] = True  # the tokens must be one sequence; none is removed
    prunes: ClassVar[bool] = False
    hides: ClassVar[bool] = False
    in_words: ClassVar[str] = "rows that no output reads are not computed"
    tag: ClassVar[str] = "exact"
    defaults: ClassVar[Mapping[str, Any]] = {"scorer": "token-norm", "unread_rows": True}
    kept_sets: ClassVar[Mapping[PathName, KeptSet]] = {"gather": KEPT_SETS["gather"]}
    proofs: ClassVar[tuple[Proof, ...]] = ()

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        return [max(blocks)], "one block"

    @classmethod
    def places_by_default(cls, candidates: Sequence[int]) -> list[int]:
        return list(candidates)

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        return [Emit(tokens_allowed=True)]

    def check_use(self, root: nn.Module) -> None:
        """See `Reduction.check_use`."""
        unread = self.unread(root)
        if unread.costly:
            return
        node = unread.reader
        reader = "the output, which holds tokens,"
        if node is not None and is_hook_node(node):
            reader = f"a hook at {node.meta['where']}"
        elif node is not None and node.op != "output":
            reader = f"'{node.name}' ({node.target}) at {node.meta['where']}"
        raise PlanError(
            f"`mode: exact` leaves out rows that no output reads, but in this host {reader} reads "
            "those of all tokens, so there is nothing to leave out. Use a method that prunes, such "
            "as merge-k0.7, or ask for an output of the class token alone."
        )
