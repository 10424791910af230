"""Tokens put back in place: in outputs that hold tokens, and at the end of a stretch.

A token that a stage drops skips the blocks after it, so it keeps its last value. What comes after
the last block (a final norm) acts on each token alone, so it runs on restored tokens; outside of a
stretch everything does.
"""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tokenprune.analysis.facts import Aligned
from tokenprune.analysis.operators import mixes
from tokenprune.analysis.stretch import Stretch
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.layout import flat_tokens, laid_out
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
    """Give dropped tokens back to what needs all of them: each output that holds tokens, or, of a
    host that keeps a grid, all that is outside of the stretch.

    What makes such an output of the residual stream runs on all tokens, once; what else reads it
    gets the kept ones.

    Attributes:
        outputs: Of outputs that hold tokens from within a stretch too; elsewhere it is only asked
            to for their sake.
    """

    kept: KeptSet
    outputs: bool = True

    def apply(self, rewrite: Rewrite) -> None:
        if rewrite.analysis.stretches:
            for stretch in rewrite.analysis.stretches:
                self._end(rewrite, stretch)
            for _, node in rewrite.token_outputs() if self.outputs else ():
                raise _unrestorable(rewrite, node)
            return
        streams = {rewrite.copy_of(node) for node in self._residual_stream(rewrite)}
        reads = _whole_reads(rewrite, streams)
        order = {node: number for number, node in enumerate(rewrite.graph.nodes)}
        made = {n for _, n in reads if n not in streams and not isinstance(n.target, type)}
        between = sorted(made, key=order.__getitem__)
        for node in between:
            _check_unmixed(rewrite, node)
        stages = {used: dim.stage for used in streams for dim in rewrite.facts(used).dims.values()}
        self._give_all(rewrite, {read for read in reads if read[1] in streams}, stages)
        if self.kept.removes:
            for node in between:
                rewrite.narrow(node, self._kept_rows(rewrite, node), reads)

    def _end(self, rewrite: Rewrite, stretch: Stretch) -> None:
        """Let all that is outside of a stretch read all tokens."""
        order = {node: number for number, node in enumerate(rewrite.analysis.traced.graph.nodes)}
        starts = [order[rewrite.analysis.markers[stage]] for stage in stretch.stages]
        reads, stages = set[tuple[fx.Node, fx.Node]](), dict[fx.Node, int]()
        for stream in (n for n in stretch.streams if order[n] >= starts[0]):
            copy = rewrite.copy_of(stream)
            stages[copy] = stretch.stages[sum(start <= order[stream] for start in starts) - 1]
            for reader in (n for n in stream.users if stretch.gives_all(stream, n)):
                at = rewrite.output if reader.op == "output" else rewrite.copy_of(reader)
                reads.add((at, copy))
        whole = self._give_all(rewrite, reads, stages)
        end = rewrite.copy_of(stretch.end)
        rewrite.stand_for(end, whole[end])

    def _give_all(
        self,
        rewrite: Rewrite,
        reads: Collection[tuple[fx.Node, fx.Node]],
        stages: Mapping[fx.Node, int],
    ) -> Mapping[fx.Node, fx.Node]:
        """Let each (reader, stream) read all tokens of the stream, the last stage before which is
        one of `stages`; stream -> the node that holds all."""
        order = {node: number for number, node in enumerate(rewrite.graph.nodes)}
        full = self._before_each_drop(rewrite)
        whole: dict[fx.Node, fx.Node] = {}
        for reader, used in sorted(reads, key=lambda read: order[read[0]]):
            if used not in whole:
                stage = stages[used]
                whole[used] = self._put_back(rewrite, reader, full[stage], used, stage)
            reader.replace_input_with(used, whole[used])
        return whole

    def _put_back(
        self, rewrite: Rewrite, at: fx.Node, full: fx.Node, used: fx.Node, stage: int
    ) -> fx.Node:
        """All tokens of a stream, in the layout of the host."""
        if rewrite.rank(used) == 3:
            return self.kept.put_back(rewrite, at, full, used, stage)
        first = max(start for start in rewrite.analysis.starts if start <= stage)
        layout, like = rewrite.analysis.grids[stage].layout, rewrite.records[first].given
        flat = rewrite.insert(at, flat_tokens, used, layout)
        tokens = self.kept.put_back(rewrite, at, full, flat, stage)
        return rewrite.insert(at, laid_out, tokens, flat, used, like, layout)

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
            if stage not in rewrite.analysis.starts:
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
    origin = rewrite.origin(node)
    if origin is None or mixes(rewrite.root, origin) or rewrite.facts(node).gathers:
        raise _unrestorable(rewrite, node)


def _unrestorable(rewrite: Rewrite, node: fx.Node) -> UnsupportedHostError:
    return UnsupportedHostError(
        f"An output holds tokens that {rewrite.where(node)} has mixed, so they cannot be "
        "given back in place. Wrap with restore=False to get the kept tokens only."
    )
