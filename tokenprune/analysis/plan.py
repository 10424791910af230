"""A recipe bound to one host: pure numbers, no modules, no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe
from tokenprune.recipe.counting import Rounding, num_keep

__all__ = ["Plan", "bind"]


@dataclass(frozen=True)
class Plan:
    """Where a host is pruned, and how much is kept there.

    Attributes:
        mode: `remove` or `bypass`.
        blocks: The block before which each stage stands.
        keep_ratios: Kept share of the original patch tokens, for each stage.
        num_prefix_tokens: P.
        rounding: How a share of N becomes a count.
        threshold: Keep probability above which a token stays in eval, whatever the ratios say; None
            keeps the best tokens of each image, as many as the ratios say.
        buckets: With a threshold, into how many groups of like length a batch is sorted at most.
    """

    mode: Literal["remove", "bypass"]
    blocks: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    num_prefix_tokens: int
    rounding: Rounding
    threshold: float | None = None
    buckets: int = 4

    def counts(self, num_patches: Sequence[int]) -> tuple[int, ...]:
        """K of each stage, out of the N patches that each sees."""
        pairs = zip(num_patches, self.keep_ratios, strict=True)
        return tuple(num_keep(patches, ratio, self.rounding) for patches, ratio in pairs)

    def with_keep_ratio(self, keep_ratio: float | Sequence[float]) -> "Plan":
        """The same stages with other ratios.

        Args:
            keep_ratio: One ratio r for the base of r, r^2, r^3, ..., or one for each stage.

        Raises:
            PlanError: A ratio is out of (0, 1], they grow, or their number is wrong.
        """
        stages = len(self.blocks)
        asked = f"asked for keep_ratio={keep_ratio!r}"
        if isinstance(keep_ratio, int | float):
            ratios = tuple(float(f"{float(keep_ratio) ** (s + 1):.12g}") for s in range(stages))
        else:
            try:
                ratios = tuple(float(ratio) for ratio in keep_ratio)
            except (TypeError, ValueError):
                raise PlanError(
                    f"{asked}: give one number r for r, r^2, ..., or one number per stage."
                ) from None
        if len(ratios) != stages:
            raise PlanError(
                f"{asked}: {len(ratios)} ratios, but the plan has {stages} stages, before blocks "
                f"{list(self.blocks)}. Give one ratio per stage, or one number r for r, r^2, ..."
            )
        if not all(0.0 < ratio <= 1.0 for ratio in ratios):
            raise PlanError(f"{asked}: every ratio must lie in (0, 1].")
        if any(later > earlier for earlier, later in pairwise(ratios)):
            raise PlanError(
                f"{asked}: ratios must not grow from stage to stage, since a dropped token stays "
                "dropped."
            )
        return replace(self, keep_ratios=ratios)

    def with_threshold(self, threshold: float | None) -> "Plan":
        """The same stages, where tokens stay by their keep probability.

        Raises:
            PlanError: The threshold does not lie in (0, 1).
        """
        number = isinstance(threshold, int | float)
        if threshold is not None and not (number and 0.0 < threshold < 1.0):
            raise PlanError(
                f"asked for threshold={threshold!r}: give a keep probability between 0 and 1, such "
                "as 0.5, or None for the counts of the keep ratios."
            )
        return replace(self, threshold=threshold)


def bind(recipe: Recipe, spec: ArchSpec) -> Plan:
    """Fit a recipe to a host.

    Raises:
        PlanError: The host has no such block, or needs the other mode.
    """
    stages = recipe.resolved_stages
    blocks = tuple(stage.block for stage in stages)
    outside = [block for block in blocks if block >= len(spec.blocks)]
    named = f"recipe {recipe.name!r}" if recipe.name else "the recipe"
    if outside:
        raise PlanError(
            f"{named} prunes before blocks {outside}, but the host has {len(spec.blocks)} blocks "
            f"(0 to {len(spec.blocks) - 1}), found by adapter {spec.adapter!r}. Name blocks that "
            "exist."
        )
    if (recipe.mode, spec.mode) == ("remove", "bypass"):
        raise PlanError(
            f"{named} has `mode: remove`, but this host (adapter {spec.adapter!r}) needs "
            "`mode: bypass`: it keeps a grid of tokens, from which none can be removed. Change the "
            "recipe's mode or pick another recipe."
        )
    return Plan(
        mode=recipe.mode,
        blocks=blocks,
        keep_ratios=tuple(stage.keep_ratio for stage in stages),
        num_prefix_tokens=spec.num_prefix_tokens,
        rounding=recipe.sampling.rounding,
        threshold=recipe.sampling.threshold if recipe.sampling.selection == "threshold" else None,
        buckets=recipe.sampling.buckets,
    )
