"""Skip: a token that is not kept keeps its value, while all others still read it.

Everything that a block does to each token alone, at the end of its residual branches, runs for the
kept tokens only: the MLP, the projection after an attention. What mixes tokens sees them all, so
any host that keeps a grid can be served, on each of its grids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.analysis.plan import Budget
from tokenprune.analysis.tails import BlockSearch, Tail, prunable_blocks
from tokenprune.errors import UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe.schema import falling_shares
from tokenprune.reductions.bypass import SPLITS, SplitTails
from tokenprune.reductions.protocol import MODES, Reduction
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.kept import KEPT_SETS, KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.select import SelectAtSites
from tokenprune.rewrite.settings import PathName
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Skip"]


@MODES.register("skip")
class Skip(Reduction):
    """Needs no training: nothing is added to the host.

    A decision holds from its stage on for the tokens of that grid, up to the next stage there. By
    default there is a stage in every block, and fewer tokens drop out at each than at the one
    before.
    """

    name: ClassVar[str] = "skip"
    places: ClassVar[frozenset[str]] = frozenset({"entry", "middle"})
    nested: ClassVar[bool] = False
    removes: ClassVar[bool] = False
    in_words: ClassVar[str] = "tokens that matter little keep their value through parts of blocks"
    defaults: ClassVar[Mapping[str, Any]] = {"scorer": "token-norm", "place": "middle"}
    kept_sets: ClassVar[Mapping[PathName, KeptSet]] = {
        "mask": KEPT_SETS["mask"],
        "gather": KEPT_SETS["gather"],
    }

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        super().__init__(root, analysis)
        traced, blocks = analysis.traced, analysis.blocks
        order = {node: place for place, node in enumerate(traced.graph.nodes)}
        self.parts: list[tuple[int, Tail]] = []
        for number, block in blocks.items():
            search = BlockSearch(root, traced, block, analysis.plan.num_prefix)
            for part in reversed(search.ends()):
                first = min(order[node] for node in part.inside)
                before = (s for s, mark in enumerate(analysis.markers) if order[mark] < first)
                same = [stage for stage in before if analysis.grids[stage] == search.grid]
                if same:
                    self.parts.append((number, replace(part, stage=same[-1])))
        for stage, start in enumerate(analysis.plan.blocks):
            if all(part.stage != stage for _, part in self.parts):
                raise UnsupportedHostError(
                    f"A stage at block {start} was asked for with `mode: skip`, but between it and "
                    "the next stage on the same grid no residual branch ends in a part that acts "
                    "on each token alone (an MLP). Leave the stage out. Found at "
                    f"{blocks[start].entry.meta['where']}."
                )

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        """See `Reduction.candidates`. Where blocks have no middle, those whose tokens a block has
        seen and no norm has just made equally large."""
        able = sorted(chain(*prunable_blocks(root, traced, blocks, spec.prefix).values()))
        if cls.place("middle", [blocks[number] for number in able]) == "entry":
            fresh = (number for number in able if not _is_normed(root, blocks[number].entry))
            able = [number for number in fresh if number != min(blocks)]
        return able, "a block with a branch that tokens can go around"

    @classmethod
    def place(cls, asked: str, blocks: Sequence[Block]) -> str:
        return asked if all(block.middle is not None for block in blocks) else "entry"

    @classmethod
    def places_by_default(cls, candidates: Sequence[int]) -> list[int]:
        """All of them."""
        return list(candidates)

    @classmethod
    def ratios(cls, keep_ratio: float, stages: int, patches: int) -> list[float]:
        """As with `falling`: r^3 in the end."""
        return list(falling_shares(keep_ratio, stages))

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        """See `Reduction.passes`; every token stays in the outputs."""
        emit = Emit(tokens_allowed=True, layout=self.final_layout)
        if path == "dense":
            return [emit]
        select = SelectAtSites(KEPT_SETS[path], scorer, tokens_leave=False)
        return [select, SplitTails([(None, part) for _, part in self.parts], SPLITS[path]), emit]

    def tokens_in(self, budget: Budget) -> Mapping[int, int]:
        counts = budget.counts(self.analysis.num_patches)
        return {block: counts[part.stage] for block, part in self.parts}


def _is_normed(root: nn.Module, node: fx.Node) -> bool:
    """Whether a tensor of tokens comes straight out of a norm over their channels."""
    size = node.meta["val"].numel()
    while node.op != "placeholder":
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return True
        if node.target in (nn.functional.layer_norm, nn.functional.rms_norm):
            return True
        moves = module is None or kind_of(root, node) is Kind.PASSES_ZEROS
        before = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
        if not moves or len(before) != 1 or before[0].meta["val"].numel() != size:
            return False
        node = before[0]
    return False
