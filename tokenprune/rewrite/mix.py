"""The mask path (training): every token stays, and nothing reads a dropped one."""

import operator
from collections.abc import Callable

import torch
from torch import fx

from tokenprune.rewrite.rewrite import Pass, Rewrite
from tokenprune.rewrite.rules import Mixing, rule_for
from tokenprune.rewrite.stages import mask_stage, policy_of

__all__ = ["MaskMixers", "MaskStages", "Policies"]


class MaskStages(Pass):
    """Put predictor and decision where each stage stands; tokens go on as they are."""

    def apply(self, rewrite: Rewrite) -> None:
        prefix, previous, real = rewrite.plan.num_prefix_tokens, None, rewrite.real_patches()
        for stage in rewrite.traced.markers:
            marker = rewrite.marker(stage)
            rewrite.entering.append(marker.all_input_nodes[0])
            predictor = rewrite.predictor(marker, stage)
            result = rewrite.insert(
                marker,
                mask_stage,
                predictor,
                marker.args[0],
                previous,
                rewrite.context,
                stage,
                prefix,
                real,
            )
            logits, decision, tokens = (
                rewrite.insert(marker, operator.getitem, result, i) for i in range(3)
            )
            marker.replace_all_uses_with(tokens)
            rewrite.replaced(marker, tokens)
            rewrite.graph.erase_node(marker)
            rewrite.records.append((logits, decision))
            previous = decision


class MaskMixers(Pass):
    """Replace every node that mixes tokens by its masked version (`mixers`).

    Args:
        policies: Makes what says which tokens of a stage are there.
    """

    def __init__(self, policies: "Callable[[Rewrite], Policies] | None" = None) -> None:
        self.policies = policies or Policies

    def apply(self, rewrite: Rewrite) -> None:
        mixing = Mixing(rewrite, self.policies(rewrite))
        for node in rewrite.nodes():
            rule = rule_for(rewrite.root, node)
            if rule is not None:
                rule(mixing, node)


class Policies:
    """The policy of each (stage, prefix count), made once, right behind the stage's decision; and
    with each row repeated, where several rows of a tensor are one image."""

    def __init__(self, rewrite: Rewrite) -> None:
        self._rewrite = rewrite
        self._made: dict[tuple[int, int, int], fx.Node] = {}

    def __call__(self, stage: int, prefix: int, fold: int = 1) -> fx.Node:
        key = (stage, prefix, fold)
        if key not in self._made:
            self._made[key] = self._make(stage, prefix, fold)
        return self._made[key]

    def _make(self, stage: int, prefix: int, fold: int) -> fx.Node:
        if fold > 1:
            policy = self(stage, prefix)
            return self._rewrite.insert_after(policy, torch.repeat_interleave, policy, fold, 0)
        decision = self._rewrite.records[stage][1]
        return self._rewrite.insert_after(decision, policy_of, decision, prefix)
