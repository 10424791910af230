"""Theorem 2 of docs/theorems.md where dropped tokens go on as one: for any kept sets, the mask path
is the gather path, the fused token included."""

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.theorems.case import (
    BATCH,
    FACTORS,
    SEED,
    Case,
    difference,
    fewer,
    nested_sets,
    run,
    sizes,
    tensors,
)
from tests.toys.table import TOYS, Toy

NAMES = (
    *("prefix_2", "rope_by_length", "talking_heads", "additive_mask", "bool_mask"),
    *("eager", "one_key_head", "float64", "long_skip", "timm_eva"),
)


@lru_cache
def case_of(toy: Toy) -> Case:
    recipe = {
        "version": 1, "mode": "fuse", "place": "middle",
        "schedule": {"blocks": toy.blocks, "keep_ratio": 0.6},
    }  # fmt: skip
    host = toy.build()
    options: Any = {"adapter": toy.facts, "example_inputs": toy.inputs()}
    model = tokenprune.wrap(host, recipe, **options, verify=False, train=False)
    return Case(toy, host, model, [])


@pytest.mark.parametrize("name", NAMES)
@fewer
@given(data=st.data(), seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_2_mask_path_is_gather_path_with_a_fused_token(
    name: str, data: st.DataObject, seed: int, batch: int, factor: float
) -> None:
    case = case_of(TOYS[name])
    case.start(seed, factor)
    size = data.draw(sizes(case))
    inputs = case.toy.inputs(batch, size, seed)
    sets = data.draw(nested_sets(case.stages, size, batch))
    gather, removed = run(case, inputs, "gather", sets)
    mask, masked = run(case, inputs, "mask", sets)
    assert difference(tensors(mask), tensors(gather)) < case.bound
    last = sets[-1].sort(dim=1).values.unsqueeze(-1).expand_as(removed.patch_tokens)
    rows = masked.patch_tokens.gather(1, last)
    assert difference([rows], [removed.patch_tokens]) < case.bound
    chosen, own = run(case, inputs, "gather"), run(case, inputs, "mask")
    assert difference(tensors(own[0]), tensors(chosen[0])) < case.bound
