"""Put scorer and selection at each stage."""

from dataclasses import dataclass

from torch import fx

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.sites import PLACES
from tokenprune.errors import PlanError
from tokenprune.ops.layout import flat_tokens
from tokenprune.rewrite.kept import KeptSet, StagePoint
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite, StageRecord
from tokenprune.rewrite.stages import patch_keys
from tokenprune.scorers import Need, Scorer
from tokenprune.scorers.protocol import PREDICTORS

__all__ = ["SelectAtSites", "nearest_keys"]


@dataclass
class SelectAtSites(Pass):
    """Score the tokens of each stage, and choose.

    Attributes:
        kept: The kept set of the path.
        scorer: What the stages ask.
        tokens_leave: The chosen tokens go on instead of all of them, and bound what later stages
            can choose. Otherwise the graph is left as it is, and the choice is only recorded.
    """

    kept: KeptSet
    scorer: type[Scorer]
    tokens_leave: bool

    def apply(self, rewrite: Rewrite) -> None:
        for stage, marker in enumerate(rewrite.markers()):
            tokens = marker.all_input_nodes[0]
            if not self.tokens_leave:
                layout = rewrite.analysis.grids[stage].layout
                tokens = rewrite.insert(marker, flat_tokens, tokens, layout)
            bound = rewrite.records[-1].kept if self.tokens_leave and rewrite.records else None
            scorer = rewrite.module(marker, f"{PREDICTORS}.{stage}")
            needed = self._needed(rewrite, stage, marker)
            point = StagePoint(stage, marker, tokens, bound, scorer, needed)
            left, keep_logits, kept = self.kept.choose(rewrite, point)
            rewrite.records.append(StageRecord(tokens, keep_logits, kept))
            if self.tokens_leave:
                rewrite.replace(marker, left)

    def _needed(self, rewrite: Rewrite, stage: int, at: fx.Node) -> dict[str, fx.Node]:
        """What the scorer reads beside the tokens."""
        needed = {}
        if Need.NOISE in self.scorer.needs:
            needed["generator"] = rewrite.insert(at, getattr, rewrite.settings, "generator")
        if Need.KEYS in self.scorer.needs:
            key, *how = nearest_keys(rewrite.analysis, stage)
            needed["keys"] = rewrite.insert(at, patch_keys, rewrite.copy_of(key), *how)
        return needed


def nearest_keys(analysis: Analysis, stage: int) -> tuple[fx.Node, int, int, int]:
    """The keys of the attention nearest before a stage: node, dim of the tokens, P, rows an image.
    PlanError if there is none, or if its keys are not of the tokens that enter the stage."""
    site, grid = analysis.plan.sites[stage], analysis.grids[stage]
    block = analysis.blocks[site.block]
    attention, where = PLACES[site.place].attention(analysis.blocks, block)
    found = "no attention"
    if attention is not None:
        shape = tuple(attention.key.meta["val"].shape)
        rows, rest = divmod(shape[0], analysis.traced.batch_size)
        if shape[attention.key_dim] == grid.length and not rest:
            return attention.key, attention.key_dim, analysis.plan.num_prefix, rows
        found = f"keys of shape {shape}"
    raise PlanError(
        f"Stage {stage} (block {site.block}) reads the keys of its {grid.length} tokens in the "
        f"nearest attention, in {where}, but found {found} there. Use stages at later blocks, "
        "`place: middle`, or a scorer that reads tokens only, such as token-norm."
    )
