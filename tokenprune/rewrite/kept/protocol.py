"""The seam of paths: how one of them says which tokens are left after a stage.

A stage records one node, `kept`: a decision [B, N], or the original numbers of the tokens that are
left. Only the path's kept set knows which, and what else follows from it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, fx

from tokenprune.analysis.facts import Aligned
from tokenprune.rewrite.kept.pruning_trace import StageTrace
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName

__all__ = ["KeptSet"]


class KeptSet(Protocol):
    """One path's way."""

    @property
    def name(self) -> PathName:
        """Of the path."""
        ...

    @property
    def removes(self) -> bool:
        """Dropped tokens are no longer in the tensors."""
        ...

    @property
    def attention(self) -> Callable[..., Tensor] | None:
        """What attends to tokens some of which are hidden; None if all that are there are seen."""
        ...

    def present(
        self, rw: Rewrite, at: fx.Node, tokens: fx.Node, previous: fx.Node | None
    ) -> fx.Node | None:
        """What the scorer may see of `tokens` [B, P + N', D]: [B, N'] 1 or 0; None for all.

        Args:
            at: Where nodes are put in.
            previous: `kept` of the stage before, if its set bounds this one's.
        """
        ...

    def select(
        self,
        rw: Rewrite,
        at: fx.Node,
        tokens: fx.Node,
        keep_logits: fx.Node,
        previous: fx.Node | None,
        stage: int,
    ) -> tuple[fx.Node, fx.Node]:
        """The tokens that go on, and `kept`."""
        ...

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """[B * rows, L]: 1 at prefix tokens and tokens that are kept, 0 at hidden ones."""
        ...

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        """A tensor made for all tokens, for those that are there."""
        ...

    def put_back(
        self, rw: Rewrite, at: fx.Node, full: fx.Node, tokens: fx.Node, stage: int
    ) -> fx.Node:
        """`full` [B, P + N, D], with the tokens that `stage` kept replaced by `tokens`."""
        ...

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        """An output of the kept tokens alone, with 0 in rows that hold none."""
        ...

    def stage_traces(
        self, records: Sequence[tuple[Tensor, Tensor]], num_patches: Sequence[int], nested: bool
    ) -> list[StageTrace]:
        """The (keep_logits, kept) of each stage in terms of the original patch tokens.

        Args:
            num_patches: N of each stage.
            nested: A stage sees only what the one before kept.
        """
        ...
