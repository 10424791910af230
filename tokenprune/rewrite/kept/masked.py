"""The mask path: every token stays, and nothing reads a dropped one."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tokenprune.analysis.facts import Aligned
from tokenprune.ops.align import policy_of
from tokenprune.ops.attention import masked_attention
from tokenprune.ops.moving import put_back_masked
from tokenprune.rewrite.kept.pruning_trace import StageTrace
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.stages import decide, fill_dropped, present_masked

__all__ = ["Masked"]


class Masked:
    """`kept` is the decision [B, N], with its straight-through gradient."""

    name: PathName = "mask"
    removes = False
    attention = staticmethod(masked_attention)

    def present(
        self, rw: Rewrite, at: fx.Node, tokens: fx.Node, previous: fx.Node | None
    ) -> fx.Node | None:
        """See `KeptSet.present`."""
        real = rw.real_patches()
        return previous if real is None else rw.insert(at, present_masked, previous, real, tokens)

    def select(
        self,
        rw: Rewrite,
        at: fx.Node,
        tokens: fx.Node,
        keep_logits: fx.Node,
        previous: fx.Node | None,
        stage: int,
    ) -> tuple[fx.Node, fx.Node]:
        """See `KeptSet.select`."""
        real = rw.real_patches()
        decision = rw.insert(at, decide, keep_logits, previous, rw.settings, stage, real)
        filled = rw.insert(at, fill_dropped, tokens, decision, rw.settings, rw.num_prefix)
        return filled, decision

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """See `KeptSet.policy`."""
        decision = rw.records[stage].kept
        policy = rw.once(
            ("policy", stage, prefix),
            lambda: rw.insert_after(decision, policy_of, decision, prefix),
        )
        if rows_per_image == 1:
            return policy
        return rw.once(
            ("policy", stage, prefix, rows_per_image),
            lambda: rw.insert_after(policy, torch.repeat_interleave, policy, rows_per_image, 0),
        )

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        """See `KeptSet.gather`; every token is there."""
        return table

    def put_back(
        self, rw: Rewrite, at: fx.Node, full: fx.Node, tokens: fx.Node, stage: int
    ) -> fx.Node:
        """See `KeptSet.put_back`."""
        kept = rw.records[stage].kept
        return rw.insert(at, put_back_masked, full, tokens, kept, rw.num_prefix)

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        """See `KeptSet.blank`; every row holds a token."""
        return tokens

    def stage_traces(
        self, records: Sequence[tuple[Tensor, Tensor]], num_patches: Sequence[int], nested: bool
    ) -> list[StageTrace]:
        """See `KeptSet.stage_traces`."""
        return [
            StageTrace(logits, decision, None, decision.detach().sum(dim=1).mean())
            for logits, decision in records
        ]
