"""`bind`: a recipe on a host's facts, as pure numbers."""

from typing import Any, Literal

import pytest

from tokenprune.analysis.plan import Budget, Plan, bind
from tokenprune.analysis.sites import Site
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe
from tokenprune.reductions import Bypass, Remove
from tokenprune.reductions.choice import choice_of


def spec(blocks: int = 4, mode: Literal["remove", "bypass"] = "remove") -> ArchSpec:
    paths = tuple(f"blocks.{i}" for i in range(blocks))
    return ArchSpec(adapter="by hand", blocks=paths, num_prefix_tokens=2, mode=mode)


def recipe(**changes: Any) -> Recipe:
    given = {"version": 1, "schedule": {"blocks": [1, 3], "keep_ratio": 0.7}, **changes}
    return Recipe.parse({key: value for key, value in given.items() if value is not None})


def test_a_plan_holds_the_recipe_and_the_facts() -> None:
    plan, budget = bind(recipe(sampling={"rounding": "ceil"}), spec())
    assert plan == Plan((Site(1, "entry"), Site(3, "entry")), 2)
    assert budget == Budget((0.7, 0.49), "ceil")


@pytest.mark.parametrize(
    ("rounding", "counts"), [("floor", (10, 7)), ("ceil", (11, 8)), ("round", (11, 7))]
)
def test_counts_are_shares_of_the_patches_before_any_stage(
    rounding: str, counts: tuple[int, ...]
) -> None:
    _, budget = bind(recipe(sampling={"rounding": rounding}), spec())
    assert budget.counts((15, 15)) == budget.counts([15, 15]) == counts
    assert budget.counts((1, 1)) == (1, 1)


def test_ratios_in_powers_are_free_of_the_noise_of_floating_point() -> None:
    plan, budget = bind(recipe(), spec())
    assert budget.with_keep_ratio(0.7, plan).keep_ratios == (0.7, 0.49)
    assert budget.with_keep_ratio([0.9, 0.9], plan).keep_ratios == (0.9, 0.9)
    assert budget.with_keep_ratio(1, plan).keep_ratios == (1.0, 1.0)


def test_blocks_that_the_host_does_not_have() -> None:
    says = r"^recipe 'mine' prunes at blocks \[3\], but the host has 2 blocks \(0 to 1\), found"
    with pytest.raises(PlanError, match=says):
        bind(recipe(name="mine"), spec(blocks=2))
    with pytest.raises(PlanError, match=r"^the recipe prunes at blocks \[1, 3\]"):
        bind(recipe(), spec(blocks=1))


def test_what_an_adapter_says_of_the_mode_forbids_no_other() -> None:
    for mode, reduction in (("remove", Remove), ("bypass", Bypass)):
        for hint in ("remove", "bypass"):
            assert choice_of(recipe(mode=mode), spec(mode=hint)).reduction is reduction  # type: ignore[arg-type]
