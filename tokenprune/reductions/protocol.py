"""The seam of reductions: what becomes of the tokens that a stage does not keep.

One is made for each trace (`Reduction(root, analysis)`): what it finds in the graph it keeps.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.plan import Budget
from tokenprune.analysis.unread import Unread, find_unread
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops.layout import Layout
from tokenprune.recipe.names import MODES
from tokenprune.rewrite.kept import KEPT_SETS, KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.settings import PathName
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["MODES", "Proof", "Reduction"]


class Proof(NamedTuple):
    """Two paths that must compute the same on the same kept sets."""

    name: str
    left: PathName
    right: PathName


class Reduction(ABC):
    """What becomes of dropped tokens, in one traced graph.

    Attributes:
        name: As recipes (`mode`), certificates and profiles write it.
        places: Where in a block its stages can stand.
        nested: A stage chooses among what the stage before kept (in its stretch, if the host keeps
            a grid); otherwise tokens may come back.
        removes: Tensors have fewer tokens after a stage. Where not, every host can be served.
        prunes: Fewer tokens are left after a stage, or skip something. Where not, its programs run
            though the budget keeps every token.
        skipped: How many of its `candidates` a default recipe leaves out at the front.
        added: State-dict prefixes of the modules it adds beside the scorers.
        defaults: What a recipe means that names the reduction alone: `scorer`, `place`.
        scorers: What it can ask.
        kept_sets: How each of its paths says which tokens are left.
        hides: There is a mask path, on which dropped tokens are hidden.
        keeps_last: Tokens at the end that are no patches stay as they are.
        in_words: What becomes of tokens, in a model card.
        tag: Of the card.
        proofs: Paths that must agree.
    """

    name: ClassVar[str]
    places: ClassVar[frozenset[str]] = frozenset({"entry"})
    nested: ClassVar[bool]
    removes: ClassVar[bool]
    prunes: ClassVar[bool] = True
    skipped: ClassVar[int] = 0
    added: ClassVar[tuple[str, ...]] = ()
    scorers: ClassVar[tuple[type, ...]] = (Scorer,)
    kept_sets: ClassVar[Mapping[PathName, KeptSet]] = KEPT_SETS
    defaults: ClassVar[Mapping[str, Any]] = {}
    hides: ClassVar[bool] = True
    keeps_last: ClassVar[bool] = True
    in_words: ClassVar[str] = "tokens that matter little are dropped"
    tag: ClassVar[str] = "token-pruning"
    proofs: ClassVar[tuple[Proof, ...]] = (
        Proof("mask = gather on random kept sets", "mask", "gather"),
    )

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        """Look for what it needs.

        Raises:
            PlanError: A stage where it can do nothing.
            UnsupportedHostError: A host that it cannot serve.
        """
        self.analysis = analysis
        self._unread: Unread | None = None

    def unread(self, root: nn.Module) -> Unread:
        """Which rows of the graph nobody reads."""
        if self._unread is None:
            self._unread = find_unread(root, self.analysis)
        return self._unread

    def check_use(self, root: nn.Module) -> None:  # noqa: B027 - most are of use everywhere
        """Raise PlanError if it gains nothing on the call that a host is wrapped with."""

    @property
    def final_layout(self) -> Layout | None:
        """How the final tokens lie, if the host keeps a grid; None where they are a sequence."""
        return None if self.removes and not self.analysis.stretches else self.analysis.final_layout

    @classmethod
    @abstractmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        """Blocks at which a default recipe may put stages; and what a host needs to have one.

        Raises:
            PlanError: There is none, for a reason that can be named.
        """

    @classmethod
    def places_by_default(cls, candidates: Sequence[int]) -> list[int]:
        """Of the `candidates`, those at which a default recipe puts stages: at a quarter, a half
        and three quarters."""
        places = (max(cls.skipped, len(candidates) * part // 4) for part in (1, 2, 3))
        return sorted({candidates[place] for place in places})

    @classmethod
    def at_every_block(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> Sequence[int]:
        """The blocks of a schedule with `falling`."""
        return cls.candidates(root, traced, blocks, spec)[0]

    @classmethod
    def ratios(cls, keep_ratio: float, stages: int, patches: int) -> list[float]:
        """Keep ratios of the stages of a default recipe, of N patches: r, r^2, r^3, ..."""
        return [keep_ratio ** (stage + 1) for stage in range(stages)]

    @classmethod
    def place(cls, asked: str, blocks: Sequence[Block]) -> str:
        """Where in `blocks` the stages of a default recipe are."""
        return asked

    @abstractmethod
    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        """The edits that make a path's graph of the host's.

        Args:
            restore: Outputs that hold tokens come back in place (True), or hold the kept ones only
                (False); None refuses them.
        """

    def forced(self, sets: Sequence[Tensor], num_patches: Sequence[int]) -> Mapping[str, Any]:
        """Fields of `CallSettings` that force a choice which keeps these sets, [B, K] a stage."""
        return {"keep_indices": tuple(sets)}

    def modules(self, **like: Any) -> Mapping[str, nn.Module]:
        """The modules that it adds to the host, by name.

        Args:
            like: Device and dtype of their parameters.
        """
        return {}

    def tokens_in(self, budget: Budget) -> Mapping[int, int]:
        """Block -> patch tokens that its MLP runs on, where no shape tells (for `profile`)."""
        return {}
