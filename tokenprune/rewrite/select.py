"""Put scorer and selection at each stage."""

from dataclasses import dataclass

from torch import fx

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.blocks import Attention
from tokenprune.analysis.facts import NodeFacts
from tokenprune.analysis.operators import Kind, argument, kind_of
from tokenprune.analysis.sites import PLACES
from tokenprune.errors import PlanError
from tokenprune.ops.class_attention import class_logits, class_row
from tokenprune.ops.layout import flat_tokens, laid_out
from tokenprune.rewrite.kept import KeptSet, StagePoint
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import FACTS, ORIGIN, Rewrite, StageRecord
from tokenprune.rewrite.stages import patch_keys
from tokenprune.scorers import Need, Scorer
from tokenprune.scorers.protocol import PREDICTORS

__all__ = ["SelectAtSites", "nearest_attention"]


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
            given = tokens = marker.all_input_nodes[0]
            layout = rewrite.analysis.grids[stage].layout
            if not self.tokens_leave or rewrite.rank(marker) != 3:
                tokens = rewrite.insert(marker, flat_tokens, given, layout)
            bounded = self.tokens_leave and stage not in rewrite.analysis.starts
            bound = rewrite.records[-1].kept if bounded else None
            scorer = rewrite.module(marker, f"{PREDICTORS}.{stage}")
            needed = self._needed(rewrite, stage, marker)
            point = StagePoint(stage, marker, tokens, bound, scorer, needed)
            left, keep_logits, kept = self.kept.choose(rewrite, point)
            rewrite.records.append(StageRecord(given, tokens, keep_logits, kept))
            if self.tokens_leave:
                if tokens is not given:
                    left = rewrite.insert(marker, laid_out, left, tokens, given, given, layout)
                rewrite.replace(marker, left)

    def _needed(self, rewrite: Rewrite, stage: int, at: fx.Node) -> dict[str, fx.Node]:
        """What the scorer reads beside the tokens."""
        needed = {}
        if Need.NOISE in self.scorer.needs:
            needed["generator"] = rewrite.insert(at, getattr, rewrite.settings, "generator")
        if Need.KEYS in self.scorer.needs:
            attention, rows = nearest_attention(rewrite.analysis, stage)
            how = (attention.key_dim, rewrite.num_prefix, rows)
            needed["keys"] = rewrite.insert(at, patch_keys, rewrite.copy_of(attention.key), *how)
        if Need.CLASS_LOGITS in self.scorer.needs:
            attention, rows = nearest_attention(rewrite.analysis, stage)
            needed["class_logits"] = _class_logits(rewrite, attention, at, rows)
        return needed


def _class_logits(rewrite: Rewrite, attention: Attention, at: fx.Node, rows: int) -> fx.Node:
    node = rewrite.copy_of(attention.node)
    if kind_of(rewrite.root, attention.node) is Kind.SOFTMAX:
        scores = argument(node, 0, "input")
        rows = scores.meta["val"].shape[0] // rewrite.analysis.traced.batch_size
        return rewrite.insert(at, class_row, scores, rows)
    query, key = rewrite.copy_of(attention.query), rewrite.copy_of(attention.key)
    if argument(node, 5, "is_causal", default=False) is not False:
        raise PlanError(
            f"{rewrite.where(node)} is causal: the class token attends to no patch, so its "
            "attention says nothing. Use another scorer, such as token-norm."
        )
    how = (argument(node, 3, "attn_mask"), node.kwargs.get("scale"), rows)
    logits = rewrite.insert(at, class_logits, query, key, *how)
    facts = rewrite.facts(node)  # a bias of all tokens is gathered for this reader too
    logits.meta |= {ORIGIN: attention.node, FACTS: NodeFacts(gathers=facts.gathers)}
    return logits


def nearest_attention(analysis: Analysis, stage: int) -> tuple[Attention, int]:
    """The attention nearest before a stage, and rows of its dim 0 for each image. PlanError if
    there is none, or if its keys are not of the tokens that enter the stage."""
    site, grid = analysis.plan.sites[stage], analysis.grids[stage]
    block = analysis.blocks[site.block]
    attention, where = PLACES[site.place].attention(analysis.blocks, block)
    found = "no attention"
    if attention is not None:
        shape = tuple(attention.key.meta["val"].shape)
        rows, rest = divmod(shape[0], analysis.traced.batch_size)
        if shape[attention.key_dim] == grid.length and not rest:
            return attention, rows
        found = f"keys of shape {shape}"
    raise PlanError(
        f"Stage {stage} (block {site.block}) reads the keys of its {grid.length} tokens in the "
        f"nearest attention, in {where}, but found {found} there. Use stages at later blocks, "
        "`place: middle`, or a scorer that reads tokens only, such as token-norm."
    )
