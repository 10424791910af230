"""Hide tokens that must not be read, and count those that stand for several."""

from dataclasses import dataclass

from torch import fx

from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.rules import Hiding, rule_for

__all__ = ["HideDropped"]


@dataclass
class HideDropped(Pass):
    """Apply the rule of every operator that mixes tokens; nothing to do where each counts once, nor
    outside of stretches, where all tokens are there."""

    kept: KeptSet

    def apply(self, rewrite: Rewrite) -> None:
        if self.kept.ops is None:
            return
        hiding = Hiding(rewrite, self.kept, self.kept.ops)
        stretches = rewrite.analysis.stretches
        inside = frozenset[fx.Node]().union(*(stretch.inside for stretch in stretches))
        for node in rewrite.nodes():
            if stretches and rewrite.origin(node) not in inside:
                continue
            rule = rule_for(rewrite.root, node)
            if rule is not None:
                rule.hide(hiding, node)
