"""`selection: threshold`: images keep different numbers of tokens, each what it keeps alone."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune
from tests.theorems.case import BOUNDS, SEED, difference, tensors
from tests.toys.table import TOYS, Toy
from tests.toys.vit import randomize_weights
from tokenprune.ops.selection import above_threshold, in_order, kept_first, one_hot

NAMES = (
    *("prefix_2", "rope_by_length", "relative_bias", "causal", "additive_mask"),
    *("mean_and_max", "class_attention", "long_skip"),
)
toys = pytest.mark.parametrize("toy", [TOYS[name] for name in NAMES], ids=NAMES)


@lru_cache
def wrapped(toy: Toy) -> Any:
    recipe = {**toy.recipe, "sampling": {"selection": "threshold"}}
    return tokenprune.wrap(
        toy.build(), recipe, adapter=toy.facts, example_inputs=toy.inputs(), verify=False
    ).eval()


def started(toy: Toy, seed: int, place: float, inputs: dict[str, Tensor]) -> Any:
    """New weights, and a threshold that cuts the batch's keep scores at a share `place` of them.

    Rounding must not decide: it lies in the middle of the largest gap around there.
    """
    model = wrapped(toy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomize_weights(model, 3.0)
    with torch.no_grad(), model.using("mask"):
        _, trace = model(**inputs, return_trace=True)
    scores = trace.stages[0].keep_logits[..., 0].double().exp().flatten().sort().values
    gaps = scores.diff()
    at = int(place * (len(gaps) - 8))
    at += int(gaps[at : at + 8].argmax())
    model.set_threshold(float(scores[at : at + 2].mean()))
    return model


def run(model: Any, inputs: dict[str, Tensor], path: Any = None) -> tuple[list[Tensor], Any]:
    with torch.no_grad(), model.using(path):
        output, trace = model(**inputs, return_trace=True)
    return tensors(output), trace


def _clear(model: Any, trace: Any) -> bool:
    """Whether no score of a later stage is so near the threshold that rounding could decide."""
    scores = torch.cat([s.keep_logits[..., 0].exp().flatten() for s in trace.stages])
    return float((scores - model._pruning.budget.threshold).abs().min()) > 1e-6


def counts(trace: Any) -> list[list[int]]:
    return [stage.decision.sum(1).int().tolist() for stage in trace.stages]


@toys
@settings(max_examples=2)
@given(seed=SEED, place=st.floats(0.1, 0.9), batch=st.integers(3, 6))
def test_a_batch_is_each_image_alone_and_what_the_mask_path_says(
    toy: Toy, seed: int, place: float, batch: int
) -> None:
    inputs = toy.inputs(batch, seed=seed)
    model = started(toy, seed, place, inputs)
    output, trace = run(model, inputs)
    masked, mask_trace = run(model, inputs, "mask")
    assume(_clear(model, mask_trace))
    assert difference(masked, output) < BOUNDS[toy.dtype]
    for ours, theirs in zip(trace.stages, mask_trace.stages, strict=True):
        assert torch.equal(ours.decision, theirs.decision)
    for image in range(batch):
        one = {key: value[image : image + 1] for key, value in inputs.items()}
        alone, alone_trace = run(model, one)
        assert difference(alone, [t[image : image + 1] for t in output]) < BOUNDS[toy.dtype]
        for both, own in zip(trace.stages, alone_trace.stages, strict=True):
            assert torch.equal(both.decision[image], own.decision[0])


@toys
def test_images_do_differ_and_the_trace_can_be_forced_again(toy: Toy) -> None:
    inputs = toy.inputs(6, seed=3)
    model = started(toy, 3, 0.5, inputs)
    output, trace = run(model, inputs)
    first, last = counts(trace)
    assert len(set(first)) > 1
    for stage, kept in zip(trace.stages, (first, last), strict=True):
        assert ((stage.keep_indices >= 0).sum(1)).tolist() == kept
        assert torch.equal(one_hot(stage.keep_indices, stage.decision), stage.decision)
        assert float(stage.num_tokens) == pytest.approx(sum(kept) / 6)
    with torch.no_grad(), model.using(keep_indices=[s.keep_indices.flip(1) for s in trace.stages]):
        assert difference(tensors(model(**inputs)), output) < BOUNDS[toy.dtype]


@given(st.integers(0, 2**16), st.floats(0.01, 0.99))
def test_what_is_above_the_threshold_stays_and_one_token_in_any_case(
    seed: int, threshold: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 7, 2, generator=generator).log_softmax(-1)
    there = torch.rand(4, 7, generator=generator) > 0.4
    there[:, 0] = True
    wanted = above_threshold(logits, threshold, there)
    assert not (wanted & ~there).any()
    above = (logits[..., 0].exp() > threshold) & there
    for image in range(4):
        if above[image].any():
            assert torch.equal(wanted[image], above[image])
        else:
            scores = logits[image, :, 0].where(there[image], -torch.inf)
            assert wanted[image].nonzero().flatten().tolist() == [int(scores.argmax())]
    places = kept_first(wanted)
    assert torch.equal(one_hot(places, wanted), wanted)
    assert torch.equal(in_order(places.flip(1)), places)
