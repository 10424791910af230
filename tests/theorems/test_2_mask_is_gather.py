"""Theorems 1 to 4 of docs/theorems.md over every toy host: the paths agree, nothing leaks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune
from tests.theorems.case import (
    BATCH,
    FACTORS,
    SEED,
    Case,
    difference,
    few,
    fewer,
    nested_sets,
    no_fast_path,
    run,
    same_bits,
    sizes,
    tensors,
)
from tests.toys.table import PREFIXES, TOYS
from tests.toys.vit import PATCH


@few
@given(data=st.data(), seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_1_keeping_every_token_is_the_host_bit_for_bit(
    case: Case, data: st.DataObject, seed: int, batch: int, factor: float
) -> None:
    case.start(seed, factor)
    inputs = case.toy.inputs(batch, data.draw(sizes(case)), seed)
    case.model.set_keep_ratio(1.0)
    with torch.no_grad():
        dense = case.host(**inputs)
        assert same_bits(case.model(**inputs), dense)
        with no_fast_path():
            dense = case.host(**inputs)
    for path in ("gather", "dense"):  # with a trace it is the rewritten graph that runs
        output, trace = run(case, inputs, path)
        assert same_bits(output, dense)
        assert type(output) is type(dense)
        assert len(trace.stages) == (case.stages if path == "gather" else 0)


def test_1_unwrap_is_the_host_bit_for_bit(case: Case) -> None:
    case.start(0)
    fresh = case.toy.build()  # never wrapped
    case.model.load_state_dict(fresh.state_dict())
    for size in case.toy.sizes:
        inputs = case.toy.inputs(3, size)
        with torch.no_grad():
            dense = fresh(**inputs)
            assert not same_bits(case.model(**inputs), dense)  # it does prune
            host = tokenprune.unwrap(case.model)
            assert host is case.host
            assert same_bits(host(**inputs), dense)


@settings(max_examples=8)
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


def of_image(result: tuple[Any, Any], image: int) -> list[Tensor]:
    """The rows of one image: outputs, then what was decided about its tokens."""
    output, trace = result
    decided = [t for stage in trace.stages for t in (stage.keep_logits, stage.decision)]
    return [t[image : image + 1] for t in (*tensors(output), trace.patch_tokens, *decided)]


@few
@given(data=st.data(), seed=SEED)
def test_4_an_image_does_not_depend_on_the_others(
    case: Case, data: st.DataObject, seed: int
) -> None:
    case.start(seed)
    garbage = data.draw(case.garbage)
    inputs = case.toy.inputs(3, seed=seed)
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], 3))
    image = data.draw(st.integers(0, 2))
    only = slice(image, image + 1)
    alone = {name: value[only] for name, value in inputs.items()}
    others = torch.arange(3).view(3, 1, 1, 1) != image
    spoilt = {**inputs, "x": inputs["x"].masked_fill(others, garbage)}
    for path in ("gather", "mask"):
        together = of_image(run(case, inputs, path, sets), image)
        beside = of_image(run(case, spoilt, path, sets), image)
        assert difference(beside, together) < case.bound
        if case.toy.images_alone:
            single = of_image(run(case, alone, path, [kept[only] for kept in sets]), 0)
            assert difference(single, together) < case.bound


@few
@given(data=st.data(), seed=SEED)
def test_4_which_tokens_stay_does_not_depend_on_the_other_images(
    case: Case, data: st.DataObject, seed: int
) -> None:
    case.start(seed)
    inputs = case.toy.inputs(3, seed=seed)
    image = data.draw(st.integers(0, 2))
    others = torch.arange(3).view(3, 1, 1, 1) != image
    spoilt = {**inputs, "x": inputs["x"].masked_fill(others, data.draw(case.garbage))}
    for path in ("gather", "mask"):
        pairs = zip(*(run(case, x, path)[1].stages for x in (inputs, spoilt)), strict=True)
        assert all(torch.equal(a.decision[image], b.decision[image]) for a, b in pairs)


DOUBLE = (
    *(f"prefix_{p}" for p in range(10)),
    "eager",
    "rope",
    "relative_bias",
    "mean_and_max",
    "class_attention",
)
DOUBLE += ("bool_mask", "timm_vit", "timm_eva")


@pytest.mark.parametrize("name", DOUBLE)
def test_2_in_float64_with_weights_x50(name: str) -> None:
    toy = {**TOYS, **PREFIXES}[name]
    host = toy.build(0, 50.0).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in toy.inputs(3).items()}
    double = Case(toy, host, toy.wrap(host, example_inputs=inputs, verify=False), [])
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
