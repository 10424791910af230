"""Outputs that hold tokens: given back on the original grid, or left as the kept tokens alone.

A token that a stage drops skips the blocks after it, so it keeps its last value. What comes after
the last block (a final norm) acts on each token alone, so it runs on restored tokens.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from tokenprune.analysis.facts import Aligned
from tokenprune.analysis.operators import mixes, reduces
from tokenprune.errors import UnsupportedHostError
from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.tracing.hook_nodes import is_hook_node, passed

__all__ = ["BlankPadding", "RestoreOutputs"]


@dataclass
class BlankPadding(Pass):
    """Rows of an output that hold no token are 0 (`restore=False`)."""

    kept: KeptSet

    def apply(self, rewrite: Rewrite) -> None:
        site = rewrite.output_site()
        for _, node in rewrite.token_outputs():
            if rewrite.facts(node).rows_per_image == 1:
                for user in [u for u in node.users if u is site or isinstance(u.target, type)]:
                    user.replace_input_with(node, self.kept.blank(rewrite, user, node))


@dataclass
class RestoreOutputs(Pass):
    """Give dropped tokens back in each output that holds tokens.

    What makes such an output of the residual stream runs on all tokens, once; what else reads it
    gets the kept ones.
    """

    kept: KeptSet

    def apply(self, rewrite: Rewrite) -> None:
        streams = {rewrite.copy_of(node) for node in self._residual_stream(rewrite)}
        full = self._before_each_drop(rewrite)
        reads = _whole_reads(rewrite, streams)
        order = {node: number for number, node in enumerate(rewrite.graph.nodes)}
        made = {n for _, n in reads if n not in streams and not isinstance(n.target, type)}
        between = sorted(made, key=order.__getitem__)
        for node in between:
            _check_unmixed(rewrite, node)
        for node, used in sorted(reads, key=lambda read: order[read[0]]):
            if used in streams:
                (dim,) = rewrite.facts(used).dims.values()
                given = (full[dim.stage], used, dim.stage)
                whole = rewrite.once(("whole", used), self.kept.put_back, rewrite, node, *given)
                node.replace_input_with(used, whole)
        if self.kept.removes:
            for node in between:
                rewrite.narrow(node, self._kept_rows(rewrite, node), reads)

    def _kept_rows(self, rewrite: Rewrite, node: fx.Node) -> fx.Node:
        """The kept tokens of a node that holds all."""
        facts = rewrite.facts(node)
        aligned = Aligned(facts.dims, rewrite.rank(node), facts.rows_per_image or 1)
        return self.kept.gather(rewrite, node.next, node, aligned)

    def _residual_stream(self, rewrite: Rewrite) -> list[fx.Node]:
        """Where tokens are between blocks, in a layout that can be put back: [B, P + K, D]."""
        analysis = rewrite.analysis
        found = [block.call.output for block in analysis.blocks.values()]
        hooked = [node for node in found if node is not None and node.target is passed]
        found += [node.all_input_nodes[0] for node in hooked]  # before its hooks
        return [
            node
            for node in (*found, *analysis.markers)
            if node is not None
            and [(d, dim.prefix) for d, dim in analysis.facts[node].dims.items()]
            == [(1, rewrite.num_prefix)]
        ]

    def _before_each_drop(self, rewrite: Rewrite) -> list[fx.Node]:
        """Per stage, all tokens as they entered it, those dropped before at their last value."""
        full: list[fx.Node] = []
        for stage, record in enumerate(rewrite.records):
            at, entering = record.keep_logits, record.entering
            if not self.kept.removes:  # what follows, or a hook, may write into the same tensor
                entering = rewrite.insert(at, torch.clone, entering)
            if stage:
                entering = self.kept.put_back(rewrite, at, full[-1], entering, stage - 1)
            full.append(entering)
        return full


def _whole_reads(rewrite: Rewrite, streams: Container[fx.Node]) -> set[tuple[fx.Node, fx.Node]]:
    """(reader, what it reads) where all tokens are needed, from the outputs back to `streams`."""
    site = rewrite.output_site()
    found, queue = set[tuple[fx.Node, fx.Node]](), [site]
    for reader in queue:
        hooked = reader.target is passed
        for used in reader.all_input_nodes:
            holds = rewrite.facts(used).dims or isinstance(used.target, type)
            if holds and (reader, used) not in found and not is_hook_node(reader):
                found.add((reader, used))
                if used not in streams and used not in queue:
                    queue.append(used)
            if hooked and is_hook_node(used):  # hooks see what they hand on
                found.add((used, reader.all_input_nodes[0]))
    return found


def _check_unmixed(rewrite: Rewrite, node: fx.Node) -> None:
    origin, facts = rewrite.origin(node), rewrite.facts(node)
    mixed = origin is None or mixes(rewrite.root, origin)
    if origin is not None and reduces(rewrite.root, origin):  # over channels, as an RMS norm does
        sources = (rewrite.facts(source) for source in node.all_input_nodes)
        mixed = any(len(source.dims) > len(facts.dims) for source in sources)
    if mixed or facts.gathers:
        raise UnsupportedHostError(
            f"An output holds tokens that {rewrite.where(node)} has mixed, so they cannot be "
            "given back in place. Wrap with restore=False to get the kept tokens only."
        )
