"""A recipe bound to one host: its structure, and apart from it the numbers of a call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tokenprune.analysis.sites import Site
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe
from tokenprune.recipe.counting import Rounding, num_keep

__all__ = ["Budget", "Plan", "bind"]


@dataclass(frozen=True)
class Plan:
    """Where a host is pruned: what programs depend on. Never changes after `wrap`.

    Attributes:
        sites: The place of each stage.
        num_prefix: P.
        num_suffix: How many patch tokens at the end always stay.
    """

    sites: tuple[Site, ...]
    num_prefix: int
    num_suffix: int = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block of each stage."""
        return tuple(site.block for site in self.sites)


@dataclass(frozen=True)
class Budget:
    """How much is kept: what a call depends on.

    Attributes:
        keep_ratios: Kept share of the original patch tokens, for each stage.
        rounding: How a share of N becomes a count.
        threshold: Keep probability above which a token stays in eval, whatever the ratios say; None
            keeps the best tokens of each image, as many as the ratios say.
    """

    keep_ratios: tuple[float, ...]
    rounding: Rounding = "floor"
    threshold: float | None = None

    @property
    def keeps_all(self) -> bool:
        """Nothing is pruned, in any image."""
        return self.threshold is None and min(self.keep_ratios) == 1.0

    def counts(self, num_patches: Sequence[int], staying: int = 0) -> tuple[int, ...]:
        """K of each stage, out of the N patches that each sees, of which the last `staying` always
        stay: PlanError if none could leave."""
        pairs = zip(num_patches, self.keep_ratios, strict=True)
        counts = tuple(num_keep(patches, ratio, self.rounding) for patches, ratio in pairs)
        if staying and min(counts) <= staying:
            raise PlanError(
                f"The last {staying} tokens always stay (they are no patches), but stages are to "
                f"keep {list(counts)} tokens, these included. Keep more: model.set_keep_ratio(...)."
            )
        return counts

    def with_keep_ratio(self, keep_ratio: float | Sequence[float], plan: Plan) -> "Budget":
        """The same with other ratios: r, r^2, r^3, ... of one number r, or one for each stage.

        Raises:
            PlanError: A ratio is out of (0, 1], they grow, or their number is wrong.
        """
        stages = len(plan.sites)
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
                f"{asked}: {len(ratios)} ratios, but the plan has {stages} stages, at blocks "
                f"{list(plan.blocks)}. Give one ratio per stage, or one number r for r, r^2, ..."
            )
        if not all(0.0 < ratio <= 1.0 for ratio in ratios):
            raise PlanError(f"{asked}: every ratio must lie in (0, 1].")
        if any(later > earlier for earlier, later in pairwise(ratios)):
            raise PlanError(
                f"{asked}: ratios must not grow from stage to stage, since a dropped token stays "
                "dropped."
            )
        return replace(self, keep_ratios=ratios)

    def with_threshold(self, threshold: float | None) -> "Budget":
        """The same, where tokens stay by their keep probability: PlanError if out of (0, 1)."""
        number = isinstance(threshold, int | float)
        if threshold is not None and not (number and 0.0 < threshold < 1.0):
            raise PlanError(
                f"asked for threshold={threshold!r}: give a keep probability between 0 and 1, such "
                "as 0.5, or None for the counts of the keep ratios."
            )
        return replace(self, threshold=threshold)


def bind(recipe: Recipe, spec: ArchSpec) -> tuple[Plan, Budget]:
    """Fit a recipe with stages to a host: PlanError if it has no such block."""
    stages, sampling = recipe.resolved_stages, recipe.sampling
    outside = [stage.block for stage in stages if stage.block >= len(spec.blocks)]
    if outside:
        named = f"recipe {recipe.name!r}" if recipe.name else "the recipe"
        raise PlanError(
            f"{named} prunes at blocks {outside}, but the host has {len(spec.blocks)} blocks "
            f"(0 to {len(spec.blocks) - 1}), found by adapter {spec.adapter!r}. Name blocks that "
            "exist."
        )
    sites = tuple(Site(stage.block, recipe.place) for stage in stages)
    plan = Plan(sites, spec.prefix, spec.num_suffix_tokens)
    ratios = tuple(stage.keep_ratio for stage in stages)
    threshold = sampling.threshold if sampling.selection == "threshold" else None
    return plan, Budget(ratios, sampling.rounding, threshold)
