"""Theorem 3 of docs/theorems.md: what dropped tokens hold does not matter."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.theorems.case import (
    BATCH,
    FACTORS,
    SEED,
    Case,
    difference,
    few,
    nested_sets,
    run,
    tensors,
)
from tests.toys.vit import PATCH


@few
@given(data=st.data(), seed=SEED, batch=BATCH)
def test_3_the_contents_of_dropped_tokens_do_not_matter(
    case: Case, data: st.DataObject, seed: int, batch: int
) -> None:
    if case.toy.blocks[0] != 0:
        return  # blocks before the first stage see every token
    case.start(seed, FACTORS[seed % 2])
    garbage = data.draw(case.garbage)
    inputs = case.toy.inputs(batch, seed=seed)
    side = case.toy.sizes[0] // PATCH
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], batch))
    kept = torch.zeros(batch, side * side, dtype=torch.bool).scatter(1, sets[0], True)
    pixels = kept.view(batch, 1, side, side)
    pixels = pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    other = {**inputs, "x": torch.where(pixels, inputs["x"], garbage)}
    for path in ("mask", "gather"):
        plain, _ = run(case, inputs, path, sets)
        assert difference(tensors(run(case, other, path, sets)[0]), tensors(plain)) < case.bound
