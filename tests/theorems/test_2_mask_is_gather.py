"""Theorem 2 of docs/theorems.md: for any kept sets, the mask path is the gather path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.theorems.case import (
    BATCH,
    FACTORS,
    SEED,
    Case,
    difference,
    few,
    fewer,
    nested_sets,
    run,
    sizes,
    tensors,
)
from tests.toys.table import TOYS, Toy


@settings(max_examples=5)
@given(data=st.data(), seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_2_mask_path_is_gather_path(
    case: Case, data: st.DataObject, seed: int, batch: int, factor: float
) -> None:
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
    for stage, kept in enumerate(sets):
        assert torch.equal(removed.stages[stage].keep_indices, kept.sort(dim=1).values)
        assert torch.equal(masked.stages[stage].decision, removed.stages[stage].decision)
        scores = [trace.stages[stage].keep_logits for trace in (masked, removed)]
        if stage:  # only what was still there was scored by both
            before = sets[stage - 1].unsqueeze(-1).expand(-1, -1, 2)
            scores = [s.gather(1, before) for s in scores]
        assert difference(scores[:1], scores[1:]) < case.bound


@fewer
@given(data=st.data(), seed=SEED)
def test_2_the_mask_path_of_training_is_the_gather_path_of_eval(
    case: Case, data: st.DataObject, seed: int
) -> None:
    if case.toy.noisy:
        return
    case.start(seed)
    inputs = case.toy.inputs(3, seed=seed)
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], 3))
    case.model.eval()
    gather, _ = run(case, inputs, "gather", sets)
    case.model.train()
    mask, _ = run(case, inputs, "mask", sets)
    assert difference(tensors(mask), tensors(gather)) < case.bound


DOUBLE = ("prefix_0", "prefix_9", "eager", "rope", "relative_bias", "mean_and_max")
DOUBLE += ("class_attention", "bool_mask", "timm_vit", "timm_eva")


@pytest.mark.parametrize("toy", [TOYS[name] for name in DOUBLE], ids=DOUBLE)
def test_2_in_float64_with_weights_x50(toy: Toy) -> None:
    host = toy.build(0, 50.0).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in toy.inputs(3).items()}
    double = Case(toy, host, toy.wrap(host, example_inputs=inputs, verify=False, train=False), [])
    largest = 0.0

    @few
    @given(data=st.data(), seed=SEED)
    def agree(data: st.DataObject, seed: int) -> None:
        nonlocal largest
        double.start(seed, 50.0)
        sets = data.draw(nested_sets(2, toy.sizes[0], 3))
        gather, mask = (tensors(run(double, inputs, path, sets)[0]) for path in ("gather", "mask"))
        largest = max(largest, difference(mask, gather))

    agree()
    assert largest < 1e-9
