"""The seam of paths: how one of them says which tokens are left after a stage.

A stage records one node, `kept`: a decision [B, N], or the original numbers of the tokens that are
left. Only the path's kept set knows which, and what else follows from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from tokenprune.analysis.facts import Aligned
from tokenprune.ops.selection import one_hot
from tokenprune.rewrite.kept.pruning_trace import StageTrace
from tokenprune.rewrite.kept.token_ops import TokenOps
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.stages import last_stay, score

__all__ = ["KeptSet", "Selecting", "StagePoint"]


class StagePoint(NamedTuple):
    """One stage in a graph.

    Attributes:
        number: Of the stage.
        at: Where nodes are put in.
        tokens: [B, P + N', D] that come in.
        previous: `kept` of the stage before, if it bounds what this one can choose.
        scorer: The module that is asked.
        needed: What it reads beside the tokens.
    """

    number: int
    at: fx.Node
    tokens: fx.Node
    previous: fx.Node | None
    scorer: fx.Node
    needed: Mapping[str, fx.Node]


class KeptSet(ABC):
    """One path's way.

    Attributes:
        name: Of the path.
        removes: Dropped tokens are no longer in the tensors.
        ops: What replaces operators that mix tokens; None if all that are there count once.
        table_gather: (table, kept, dims, prefix, rank, rows_per_image) -> the table for the tokens
            that are there.
        restore: (full, tokens, kept, num_prefix) -> `full` with the kept tokens replaced.
    """

    name: ClassVar[PathName]
    removes: ClassVar[bool] = True
    ops: ClassVar[TokenOps | None] = None
    table_gather: ClassVar[Callable[..., Tensor]]
    restore: ClassVar[Callable[..., Tensor]]

    @abstractmethod
    def choose(self, rw: Rewrite, stage: StagePoint) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The tokens that go on, the scores of those that came in, and `kept`."""

    def numbers(self, rw: Rewrite, stage: int) -> fx.Node:
        """A node with as many columns as patches are left after a stage."""
        return rw.records[stage].kept

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """[B * rows, L]: 1 at prefix tokens and tokens that are kept, 0 at hidden ones."""
        raise RuntimeError(f"the {self.name} path hides no token")

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        """A tensor made for all tokens, for those that are there."""
        dims = tuple(aligned.dims)
        prefix = tuple(dim.prefix for dim in aligned.dims.values())
        kept = rw.records[next(iter(aligned.dims.values())).stage].kept
        how = (kept, dims, prefix, aligned.rank, aligned.rows_per_image)
        return rw.insert(at, type(self).table_gather, table, *how)

    def put_back(
        self, rw: Rewrite, at: fx.Node, full: fx.Node, tokens: fx.Node, stage: int
    ) -> fx.Node:
        """`full` [B, P + N, D], with the tokens that `stage` kept replaced by `tokens`."""
        how = (rw.records[stage].kept, rw.num_prefix)
        return rw.insert(at, type(self).restore, full, tokens, *how)

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        """An output of the kept tokens alone, with 0 in rows that hold none."""
        return tokens

    def stage_traces(
        self, records: Sequence[Any], num_patches: Sequence[int], starts: Collection[int]
    ) -> list[StageTrace]:
        """The (keep_logits, kept) of each stage in terms of the original patch tokens.

        Args:
            num_patches: N of each stage.
            starts: The stages that see all tokens; others see only what the one before kept.
        """
        stages, before = [], None
        pairs = enumerate(zip(records, num_patches, strict=True))
        for stage, ((logits, kept), patches) in pairs:
            if before is not None and stage not in starts:
                logits = _spread(logits, before, patches)
            decision = one_hot(kept, logits.new_zeros(logits.shape[0], patches))
            same = self.ops is None  # else images keep different numbers of tokens
            count = kept.shape[1] if same else decision.sum(dim=1).mean()
            stages.append(StageTrace(logits, decision, kept, count))
            before = kept
        return stages


def _spread(logits: Tensor, kept: Tensor, num_patches: int) -> Tensor:
    """[B, N, 2] of [B, K, 2]: removed tokens have no logits of their own any more."""
    gone = torch.tensor([float("-inf"), 0.0], device=logits.device, dtype=logits.dtype)
    everyone = gone.expand(logits.shape[0], num_patches + 1, 2)
    places = torch.where(kept < 0, num_patches, kept)  # padding goes to one more place
    spread = everyone.scatter(1, places.unsqueeze(-1).expand(-1, -1, 2), logits)
    return spread[:, :num_patches]


class Selecting(KeptSet):
    """One that keeps the tokens with the best scores.

    Attributes:
        seen: (previous, real, tokens) -> what the scorer may see; see `present`.
    """

    seen: ClassVar[Callable[..., Tensor | None]]

    def choose(self, rw: Rewrite, stage: StagePoint) -> tuple[fx.Node, fx.Node, fx.Node]:
        given = (stage.scorer, stage.tokens, self.present(rw, stage), rw.num_prefix)
        keep_logits = rw.insert(stage.at, score, *given, **stage.needed)
        if rw.num_suffix:
            keep_logits = rw.insert(stage.at, last_stay, keep_logits, rw.num_suffix)
        left, kept = self.select(rw, stage, keep_logits)
        return left, keep_logits, kept

    def present(self, rw: Rewrite, stage: StagePoint) -> fx.Node | None:
        """What the scorer may see: [B, N'] 1 or 0; None for all tokens."""
        hidden = stage.previous if self.ops is not None else None
        real = rw.real_patches()
        if hidden is None and real is None:
            return None
        return rw.insert(stage.at, type(self).seen, stage.previous, real, stage.tokens)

    @abstractmethod
    def select(self, rw: Rewrite, stage: StagePoint, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The tokens that go on, and `kept`."""
