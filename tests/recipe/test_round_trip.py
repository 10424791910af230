"""Recipes survive the way through YAML; counts stay in range and follow the ratio."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import RecipeError
from tokenprune.recipe import Recipe
from tokenprune.recipe.counting import num_keep
from tokenprune.recipe.yaml import dump_yaml, load_yaml

ROUNDINGS = st.sampled_from(["floor", "ceil", "round"])
RATIO = st.floats(1e-6, 1.0)
WEIGHT = st.floats(0.0, 1e6)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
FINITE = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text()


def section(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """A valid recipe as plain data, with any of its optional keys."""
    blocks = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=4)))
    mapping: dict[str, Any] = {"version": 1}
    if draw(st.booleans()):
        mapping["schedule"] = {"blocks": blocks, "keep_ratio": draw(RATIO)}
    else:
        ratios = sorted((draw(RATIO) for _ in blocks), reverse=True)
        mapping["stages"] = [
            {"block": block, "keep_ratio": ratio}
            for block, ratio in zip(blocks, ratios, strict=True)
        ]
    return mapping | draw(
        section(
            name=st.text(),
            description=st.text(),
            source=st.text(),
            mode=st.sampled_from(["remove", "bypass"]),
            predictor=section(activation=st.sampled_from(["gelu", "relu", "silu"])),
            sampling=section(
                temperature=st.floats(1e-3, 1e3), hard=st.booleans(), rounding=ROUNDINGS
            ),
            loss=section(
                classification=WEIGHT,
                ratio=WEIGHT,
                ratio_per_image=st.booleans(),
                token_distance=st.sampled_from(["mse", "kl"]),
            ),
            train=section(
                epochs=st.integers(1, 10**6),
                learning_rate=st.floats(1e-12, 1e3),
                frozen_parameters=st.lists(st.text(), max_size=3),
                ema_decay=st.none() | st.floats(0.1, 0.99999),
                mixed_precision=st.sampled_from(["no", "bf16", "fp16"]),
                rand_augment=st.none() | st.just("rand-m9-mstd0.5-inc1"),
                seed=st.integers(0, 2**63 - 1),
            ),
            host=st.fixed_dictionaries(
                {
                    "library": st.sampled_from(["timm", "transformers"]),
                    "model": st.text(min_size=1),
                },
                optional={
                    "kwargs": st.dictionaries(
                        st.text(), FINITE | st.lists(FINITE, max_size=3), max_size=3
                    )
                },
            ),
        )
    )


@given(mappings())
def test_recipe_round_trips_through_yaml(mapping: dict[str, Any]) -> None:
    recipe = Recipe.parse(mapping)
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.from_text(dump_yaml(mapping)) == recipe


@given(mappings())
def test_stages_are_ordered_and_never_grow(mapping: dict[str, Any]) -> None:
    stages = Recipe.parse(mapping).resolved_stages
    blocks = [stage.block for stage in stages]
    ratios = [stage.keep_ratio for stage in stages]
    assert blocks == sorted(set(blocks))
    assert ratios == sorted(ratios, reverse=True)
    assert all(0 < ratio <= 1 for ratio in ratios)


@given(mappings(), st.text(min_size=1), st.data())
def test_an_unknown_key_is_reported_wherever_it_stands(
    mapping: dict[str, Any], key: str, data: st.DataObject
) -> None:
    places = {"": mapping} | {
        f"{name}.": value
        for name, value in mapping.items()
        if name in {"schedule", "predictor", "sampling", "loss", "train", "host"}
    }
    path, section_of = data.draw(st.sampled_from(sorted(places.items(), key=lambda item: item[0])))
    section_of[f"{key}?"] = 1
    with pytest.raises(RecipeError, match="unknown key") as caught:
        Recipe.parse(mapping)
    assert [problem.split(": unknown key")[0] for problem in caught.value.problems] == [
        f"{path}{key}?"
    ]


@given(
    st.recursive(
        SCALAR,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALAR, inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_plain_data_is_read_back_and_never_taken_for_a_recipe(value: Any) -> None:
    text = dump_yaml(value)
    assert load_yaml(text) == value
    with pytest.raises(RecipeError, match=r"must be a mapping|reads `version: 1` only"):
        Recipe.from_text(text)


@given(st.text() | st.text(alphabet="[]{}:-!&*?|>'\"#%@, \n\tab1.~"))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.from_text(text)


@given(st.integers(1, 5000), RATIO, RATIO, ROUNDINGS)
def test_num_keep_is_in_range_and_follows_the_ratio(
    num_patches: int, one: float, other: float, rounding: Any
) -> None:
    small, large = sorted((one, other))
    few, many = (num_keep(num_patches, ratio, rounding) for ratio in (small, large))
    assert 1 <= few <= many <= num_patches
    assert num_keep(num_patches, 1.0, rounding) == num_patches


@given(st.integers(1, 5000), st.data(), ROUNDINGS)
def test_num_keep_gives_the_count_that_a_ratio_was_made_from(
    num_patches: int, data: st.DataObject, rounding: Any
) -> None:
    count = data.draw(st.integers(1, num_patches))
    assert num_keep(num_patches, count / num_patches, rounding) == count


@given(st.integers(1, 5000), RATIO)
def test_roundings_are_at_most_one_token_apart(num_patches: int, keep_ratio: float) -> None:
    floor, middle, ceil = (
        num_keep(num_patches, keep_ratio, rounding) for rounding in ("floor", "round", "ceil")
    )
    assert floor <= middle <= ceil <= floor + 1
