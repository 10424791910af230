"""Theorem 5 of docs/theorems.md: kept sets are nested, sorted and of the right size."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.theorems.case import BATCH, SEED, Case, few, no_fast_path, patches, run, same_bits, sizes
from tokenprune.recipe.counting import num_keep


@few
@given(data=st.data(), seed=SEED, batch=BATCH)
def test_5_kept_sets_are_nested_sorted_and_counted(
    case: Case, data: st.DataObject, seed: int, batch: int
) -> None:
    case.start(seed)
    size = data.draw(sizes(case))
    inputs, total = case.toy.inputs(batch, size, seed), patches(size)
    ratio = st.floats(1e-3, 1.0) | st.sampled_from([1e-3, 1 / total, 1.0])
    ratios = sorted((data.draw(ratio) for _ in range(case.stages)), reverse=True)
    case.model.set_keep_ratio(ratios)
    output, removed = run(case, inputs, "gather")
    _, masked = run(case, inputs, "mask")
    with torch.no_grad(), no_fast_path():
        assert same_bits(case.model(**inputs), output)  # a trace changes nothing
    for image in range(batch):
        before = set(range(total))
        for stage, wanted in zip(removed.stages, ratios, strict=True):
            kept = stage.keep_indices[image].tolist()
            assert kept == sorted(set(kept))
            assert set(kept) <= before
            assert len(kept) == stage.num_tokens == num_keep(total, wanted)
            assert 1 <= len(kept) <= total
            assert stage.decision[image].nonzero().flatten().tolist() == kept
            before = set(kept)
    for stage in removed.stages:  # the best stay; what is gone scores -inf
        scores, stays = stage.keep_logits[..., 0], stage.decision > 0
        worst_kept = scores.masked_fill(~stays, float("inf")).amin(dim=1)
        assert (worst_kept >= scores.masked_fill(stays, -float("inf")).amax(dim=1)).all()
    for stage, wanted in zip(masked.stages, ratios, strict=True):
        assert set(stage.decision.unique().tolist()) <= {0.0, 1.0}
        assert stage.decision.sum(1).tolist() == [num_keep(total, wanted)] * batch
    assert (masked.stages[1].decision <= masked.stages[0].decision).all()
    # the first stage sees the same tokens on both paths, so it must choose the same
    assert torch.equal(masked.stages[0].decision, removed.stages[0].decision)


@few
@given(seed=SEED, batch=BATCH)
def test_5_sampled_decisions_are_nested(case: Case, seed: int, batch: int) -> None:
    case.start(seed)
    case.model.train()
    with torch.no_grad(), case.model.using(generator=torch.Generator().manual_seed(seed)):
        _, trace = case.model(**case.toy.inputs(batch, seed=seed), return_trace=True)
    first, second = (stage.decision for stage in trace.stages)
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert (second <= first).all()
