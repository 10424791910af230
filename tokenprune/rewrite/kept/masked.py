"""The mask path: every token stays, and nothing reads a dropped one."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from tokenprune.ops.align import policy_of
from tokenprune.ops.moving import put_back_masked
from tokenprune.rewrite.kept.protocol import Selecting, StagePoint
from tokenprune.rewrite.kept.pruning_trace import StageTrace
from tokenprune.rewrite.kept.token_ops import MASKED
from tokenprune.rewrite.rewrite import POLICY, Rewrite
from tokenprune.rewrite.stages import decide, fill_dropped, present_masked

__all__ = ["Masked"]


class Masked(Selecting):
    """`kept` is the decision [B, N], with its straight-through gradient."""

    name = "mask"
    removes = False
    seen = staticmethod(present_masked)
    ops = MASKED
    restore = staticmethod(put_back_masked)

    def select(self, rw: Rewrite, stage: StagePoint, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
        how = (stage.previous, rw.settings, stage.number, rw.real_patches())
        decision = rw.insert(stage.at, decide, logits, *how)
        left = self.left(rw, stage, logits, decision)
        filler = (decision, rw.settings, rw.num_prefix)
        return rw.insert(stage.at, fill_dropped, left, *filler), decision

    def left(self, rw: Rewrite, stage: StagePoint, logits: fx.Node, decision: fx.Node) -> fx.Node:
        """The tokens that go on, dropped ones among them."""
        return stage.tokens

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        decision, key = rw.records[stage].kept, ("policy", stage, prefix)
        policy = rw.once(key, rw.insert_after, decision, policy_of, decision, prefix)
        policy.meta[POLICY] = stage
        if rows_per_image == 1:
            return policy
        repeat = (torch.repeat_interleave, policy, rows_per_image, 0)
        repeated = rw.once((*key, rows_per_image), rw.insert_after, policy, *repeat)
        repeated.meta[POLICY] = stage
        return repeated

    def stage_traces(
        self, records: Sequence[Any], num_patches: Sequence[int], starts: Collection[int]
    ) -> list[StageTrace]:
        return [StageTrace(logits, d, None, d.detach().sum(dim=1).mean()) for logits, d in records]
