"""One choice at each seam. The only file that asks which reduction or scorer it is."""

from dataclasses import dataclass

from torch import nn

from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.grids import grid_of
from tokenprune.analysis.leaving import costliest_stretch, default_sites
from tokenprune.errors import KeepIndicesError, PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe
from tokenprune.recipe.schema import ScheduleSection
from tokenprune.reductions import MODES, Reduction
from tokenprune.rewrite.settings import Path
from tokenprune.scorers import SCORERS, Need, Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Choice", "choice_of", "with_default_stages"]

KEEP_RATIO = 0.7


@dataclass(frozen=True)
class Choice:
    """What a recipe prunes with: what says which tokens stay, and what becomes of the others."""

    scorer: type[Scorer]
    reduction: type[Reduction]

    def path(self, training: bool) -> Path:
        """The path that runs: scores that are probabilities are learned on the mask path; others
        have nothing to learn, so training gathers too, which costs less than dense training."""
        return "mask" if training and self.scorer.probabilistic else "gather"

    def check_prunes(self, asked: str) -> None:
        """Raise PlanError if there is nothing that could be `asked`: nothing is pruned."""
        if not self.reduction.prunes:
            raise PlanError(
                f"asked for {asked}, but `mode: {self.reduction.name}` prunes nothing. Wrap the "
                "host with a method that does, such as merge-k0.7; `unread_rows: true` in its "
                "recipe leaves out unread rows as well."
            )

    def check_keep_indices(self) -> None:
        """Raise KeepIndicesError if no tokens can be named that are to stay."""
        self.check_prunes("keep_indices")
        if not self.reduction.hides:
            raise KeepIndicesError(
                f"`mode: {self.reduction.name}` keeps no tokens that could be named: each that is "
                "left is the mean of several. Leave `keep_indices` out."
            )

    def check_threshold(self, threshold: float | None) -> None:
        """Raise PlanError if a threshold has nothing to be compared with."""
        if threshold is not None and not self.scorer.probabilistic:
            raise PlanError(
                f"asked for threshold={threshold}, but the scores of {self.scorer.__name__} are no "
                "probabilities. Use keep ratios, or `scorer: learned`."
            )
        if threshold is not None and "jagged" not in self.reduction.kept_sets:
            raise PlanError(
                f"asked for threshold={threshold}, but with `mode: {self.reduction.name}` every "
                "image keeps the same number. Use keep ratios, or another mode."
            )


def choice_of(recipe: Recipe, spec: ArchSpec) -> Choice:
    """What a recipe chooses, for one host.

    Raises:
        PlanError: It does not serve this host, or its parts do not fit each other.
    """
    choice = Choice(SCORERS[recipe.scorer], MODES[_mode(recipe, spec)])
    named = f"recipe {recipe.name!r}" if recipe.name else "the recipe"
    if not choice.reduction.prunes and not _keeps_all(recipe):
        raise PlanError(
            f"{named} has `mode: {recipe.mode}`, which prunes nothing, but asks for less than that "
            "or for fewer tokens. Give it `unread_rows: true` and `keep_ratio: 1`, or change the "
            "mode."
        )
    if spec.num_suffix_tokens and not choice.reduction.keeps_last:
        raise PlanError(
            f"{named} has `mode: {recipe.mode}`, which may join the last {spec.num_suffix_tokens} "
            "tokens of this host, which are no patches (detection tokens), with patches. Use a "
            "method that removes tokens, such as learned-k0.7 or token-norm-k0.7: these stay then."
        )
    if recipe.place not in choice.reduction.places:
        raise PlanError(
            f"{named} has `place: {recipe.place}`, but stages of `mode: {recipe.mode}` can be at "
            f"{' or '.join(sorted(choice.reduction.places))} only. Change the one or the other."
        )
    if not issubclass(choice.scorer, choice.reduction.scorers):
        fitting = [n for n in SCORERS if issubclass(SCORERS[n], choice.reduction.scorers)]
        raise PlanError(
            f"{named} has `scorer: {recipe.scorer}`, which says too little for `mode: "
            f"{recipe.mode}`; that takes {', '.join(fitting)}. Change the one or the other."
        )
    if Need.CLASS_LOGITS in choice.scorer.needs and not spec.has_class_token:
        raise PlanError(
            f"{named} has `scorer: {recipe.scorer}`, which asks what the class token attends to, "
            f"but this host has none (adapter {spec.adapter!r} found {spec.prefix} "
            "prefix tokens, no class token among them). Use a method that needs none, such as "
            "merge-k0.7 or token-norm-k0.7."
        )
    if recipe.sampling.noise == "spread" and not choice.scorer.probabilistic:
        raise PlanError(
            f"{named} has `sampling.noise: spread`, but the scores of {choice.scorer.__name__} are "
            "no probabilities, whose margins noise could be added to. Leave it out, or use "
            "`scorer: learned`."
        )
    if recipe.sampling.selection == "threshold":
        choice.check_threshold(recipe.sampling.threshold)
    return choice


def _keeps_all(recipe: Recipe) -> bool:
    """Whether a recipe prunes nothing, and leaves out unread rows."""
    given = [recipe.schedule] if recipe.schedule else recipe.stages or ()
    return recipe.unread_rows and {part.keep_ratio for part in given} == {1.0}


def _mode(recipe: Recipe, spec: ArchSpec) -> str:
    """Of the recipe; the host's own where the recipe fits any host and gives none."""
    given = recipe.resolved_stages or "mode" in recipe.model_fields_set
    return recipe.mode if given else spec.mode


def with_default_stages(
    recipe: Recipe | None, host: nn.Module, spec: ArchSpec, traced: HostGraph, blocks: Blocks
) -> Recipe:
    """A recipe that leaves its stages to the host, with them: by its rule (`ScheduleSection`), or
    where the reduction puts them (`default_sites` where tokens leave in stretches). None keeps 0.7
    of the tokens at each stage, in the mode that fits the host.

    Raises:
        PlanError: There are too few blocks, or more tokens are to leave than can.
    """
    if recipe is not None and recipe.resolved_stages:
        return recipe
    recipe = recipe or Recipe.parse({"version": 1, "schedule": {"keep_ratio": KEEP_RATIO}})
    schedule = recipe.schedule or ScheduleSection(keep_ratio=KEEP_RATIO)
    mode = _mode(recipe, spec)
    reduction: type[Reduction] = MODES[mode]
    candidates, needed = reduction.candidates(host, traced, blocks, spec)
    leave = reduction.removes and reduction.prunes
    grid = leave and not spec.tokens_leave  # tokens leave in stretches of it
    if not candidates or (not grid and len(candidates) <= reduction.skipped):
        raise PlanError(
            f"A host needs at least {needed} to be pruned, but among the {len(spec.blocks)} blocks "
            f"that adapter {spec.adapter!r} found in {type(host).__name__} there are "
            f"{len(candidates)}. Use a host with more blocks."
        )
    first, found = blocks[candidates[0]], (host, traced, blocks, spec.prefix, candidates)
    patches = grid_of(host, traced.batch_size, first, spec.prefix).num_patches
    if schedule.r is None and not schedule.falling:
        ratio = schedule.keep_ratio or 1.0
        if grid:
            chosen = default_sites(*found, reduction.ratios(ratio, 3, patches))
        else:
            chosen = reduction.places_by_default(candidates)
        shares = reduction.ratios(ratio, len(chosen), patches)
        ratios = [float(f"{share:.12g}") for share in shares]
    else:
        every = candidates
        if schedule.falling:
            every = reduction.at_every_block(host, traced, blocks, spec)
        chosen = list(schedule.blocks or (costliest_stretch(*found) if grid else every))
        try:
            ratios = list(schedule.ratios(len(chosen), patches))
        except ValueError as error:
            raise PlanError(
                f"{recipe.name or 'the recipe'}: {error}. Change the recipe."
            ) from error
    stages = [{"block": b, "keep_ratio": r} for b, r in zip(chosen, ratios, strict=True)]
    mapping = recipe.model_dump(mode="json", exclude_none=True, exclude={"schedule"})
    place = reduction.place(recipe.place, [blocks[number] for number in chosen])
    return Recipe.parse({**mapping, "mode": mode, "place": place, "stages": stages})
