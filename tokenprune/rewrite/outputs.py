"""Outputs that hold tokens, given back on the original grid: a dropped token keeps its last value.

A token that a stage drops skips the blocks behind it. What comes after the last block (a final
norm) acts on each token alone, so it runs once more, on the restored tokens.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.selection import scatter_tokens
from tokenprune.rewrite.rewrite import Pass, Rewrite
from tokenprune.rewrite.rules import mixes
from tokenprune.rewrite.stages import policy_of

__all__ = ["RestoreOutputs", "put_back", "put_back_masked"]


def put_back(full: Tensor, tokens: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """[B, P + N, D]: `full` with prefix and kept tokens replaced by `tokens` [B, P + K, D]."""
    patches = scatter_tokens(full[:, num_prefix:], tokens[:, num_prefix:], kept)
    return torch.cat([tokens[:, :num_prefix].to(patches.dtype), patches], dim=1)


def put_back_masked(full: Tensor, tokens: Tensor, decision: Tensor, num_prefix: int) -> Tensor:
    """The mask path's `put_back`: `tokens` where kept, `full` where dropped."""
    kept = policy_of(decision, num_prefix).unsqueeze(-1) > 0.5
    return torch.where(kept, tokens, full)


class RestoreOutputs(Pass):
    """Replace each output that holds tokens by its restored version.

    Args:
        put: `put_back` or `put_back_masked`, to match what the stages recorded.
    """

    def __init__(self, put: Any) -> None:
        self.put = put

    def apply(self, rewrite: Rewrite) -> None:
        site = rewrite.output_site()
        streams = {rewrite.copy_of(node) for node in self._residual_stream(rewrite)}
        full = self._before_each_drop(rewrite, site)
        done: dict[fx.Node, fx.Node] = {}

        def restored(node: fx.Node) -> fx.Node:
            dims = rewrite.dims(node)
            if isinstance(node.target, type) and node not in done:  # an output inside another
                with rewrite.graph.inserting_before(site):
                    done[node] = rewrite.graph.node_copy(node, restored)
            if not dims:
                return done.get(node, node)
            if node not in done:
                if node in streams:
                    (dim,) = dims.values()
                    before, chosen = full[dim.stage], rewrite.records[dim.stage][1]
                    done[node] = rewrite.insert(
                        site, self.put, before, node, chosen, rewrite.plan.num_prefix_tokens
                    )
                else:
                    done[node] = self._again(rewrite, site, node, restored)
            return done[node]

        site.args = map_arg(site.args, restored)
        site.kwargs = map_arg(site.kwargs, restored)

    def _residual_stream(self, rewrite: Rewrite) -> list[fx.Node]:
        """Where tokens stand between blocks, in a layout that can be put back: [B, P + K, D]."""
        traced, prefix = rewrite.traced, rewrite.plan.num_prefix_tokens
        found = [traced.module_outputs[path] for path in traced.blocks]
        return [
            node
            for node in (*found, *traced.markers.values())
            if [(d, dim.prefix) for d, dim in rewrite.axes.dims.get(node, {}).items()]
            == [(1, prefix)]
        ]

    def _before_each_drop(self, rewrite: Rewrite, site: fx.Node) -> list[fx.Node]:
        """Per stage, all tokens as they entered it, those dropped before at their last value."""
        full: list[fx.Node] = []
        for stage, entering in enumerate(rewrite.entering):
            if stage:
                chosen = rewrite.records[stage - 1][1]
                entering = rewrite.insert(
                    site, self.put, full[-1], entering, chosen, rewrite.plan.num_prefix_tokens
                )
            full.append(entering)
        return full

    def _again(self, rewrite: Rewrite, site: fx.Node, node: fx.Node, restored: Any) -> fx.Node:
        origin = rewrite.origin(node)
        if origin is None or mixes(rewrite.root, origin) or origin in rewrite.axes.aligned:
            raise UnsupportedHostError(
                f"An output holds tokens that {rewrite.where(node)} has mixed, so they cannot be "
                "given back in place. Wrap with restore=False to get the kept tokens only."
            )
        with rewrite.graph.inserting_before(site):
            return rewrite.graph.node_copy(node, restored)
