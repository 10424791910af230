"""Outputs that hold tokens: given back on the original grid, or left as the kept tokens alone.

A token that a stage drops skips the blocks after it, so it keeps its last value. What comes after
the last block (a final norm) acts on each token alone, so it runs once more, on restored tokens.
"""

from dataclasses import dataclass

from torch import fx
from torch.fx.node import map_arg

from tokenprune.analysis.operators import mixes
from tokenprune.errors import UnsupportedHostError
from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite

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
    """Replace each output that holds tokens by its restored version."""

    kept: KeptSet

    def apply(self, rewrite: Rewrite) -> None:
        site = rewrite.output_site()
        streams = {rewrite.copy_of(node) for node in self._residual_stream(rewrite)}
        full = self._before_each_drop(rewrite, site)
        done: dict[fx.Node, fx.Node] = {}

        def restored(node: fx.Node) -> fx.Node:
            dims, inner = rewrite.facts(node).dims, isinstance(node.target, type)
            if node in done or not (dims or inner):
                return done.get(node, node)
            if node in streams:
                (dim,) = dims.values()
                done[node] = self.kept.put_back(rewrite, site, full[dim.stage], node, dim.stage)
            else:
                if not inner:  # an output inside another mixes nothing
                    _check_unmixed(rewrite, node)
                done[node] = rewrite.copy_again(site, node, restored)
            return done[node]

        site.args, site.kwargs = map_arg((site.args, site.kwargs), restored)

    def _residual_stream(self, rewrite: Rewrite) -> list[fx.Node]:
        """Where tokens are between blocks, in a layout that can be put back: [B, P + K, D]."""
        analysis = rewrite.analysis
        found = [block.call.output for block in analysis.blocks.values()]
        return [
            node
            for node in (*found, *analysis.markers)
            if node is not None
            and [(d, dim.prefix) for d, dim in analysis.facts[node].dims.items()]
            == [(1, rewrite.num_prefix)]
        ]

    def _before_each_drop(self, rewrite: Rewrite, site: fx.Node) -> list[fx.Node]:
        """Per stage, all tokens as they entered it, those dropped before at their last value."""
        full: list[fx.Node] = []
        for stage, record in enumerate(rewrite.records):
            entering = record.entering
            if stage:
                entering = self.kept.put_back(rewrite, site, full[-1], entering, stage - 1)
            full.append(entering)
        return full


def _check_unmixed(rewrite: Rewrite, node: fx.Node) -> None:
    origin = rewrite.origin(node)
    if origin is None or mixes(rewrite.root, origin) or rewrite.facts(node).gathers:
        raise UnsupportedHostError(
            f"An output holds tokens that {rewrite.where(node)} has mixed, so they cannot be "
            "given back in place. Wrap with restore=False to get the kept tokens only."
        )
