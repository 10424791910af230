"""Behaviours over the hosts of the zoo.

The certificate proves theorems 1 to 4, 6 and 7 on every row. Tests that go further, to any kept
set and through the pixels, run on the core rows here, and on the toys in `tests/theorems`.
"""

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.theorems.case import difference, same_bits, tensors
from tests.zoo.hosts import ZOO
from tests.zoo.rows import Row, over, restored
from tokenprune.analysis.residual import find_stretches
from tokenprune.errors import UnsupportedHostError
from tokenprune.recipe.counting import num_keep

BOUND = 1e-4  # of the output's scale, in fp32
BOUND_64 = 1e-9
FACTORS = (1.0, 50.0)

RUN = [row for row in ZOO if not row.refused]
REFUSED = [row for row in ZOO if row.refused]
CORE = [row for row in RUN if row.core]
STAGE_FIRST = [
    row for row in CORE if row.one_patch_one_token and row.recipe["schedule"]["blocks"][0] == 0
]
RESIZED = [row for row in RUN if len(row.sizes) > 1]
# Blocks that add attention and feed-forward to the same stream, so there is nothing in between.
PARALLEL = {"parallel_scaling", "differential"}


class Case(NamedTuple):
    """A wrapped host, and what the host said before it was wrapped."""

    host: nn.Module
    model: Any
    dense: list[Tensor]
    keys: list[str]


@lru_cache(maxsize=2)
def case_of(row: Row) -> Case:
    host = row.build(FACTORS[0])
    keys = list(host.state_dict())
    dense = outputs(host, row.inputs())
    model = tokenprune.wrap(host, row.recipe, example_inputs=row.inputs(), verify=False)
    return Case(host, model, dense, keys)


OTHER_BLOCKS = {
    "hiera": "two blocks pool their queries, so what is added to the stream is another tensor",
    "levit": "its adapter counts an attention and a feed-forward part as a block each",
    "mobilevitv2": "its attention is a weighted sum, and multiplies no tokens by tokens",
    "focalnet": "it mixes tokens by convolutions, and does not attend",
    "conformer": "half of the feed-forward part stands before the attention",
    "wav2vec2_bert": "half of the feed-forward part stands before the attention",
    "timesformer": "attention along time and in space are added to parts of the stream",
    "vjepa2": "the blocks of its predictor are found as well",
    "videoprism": "the blocks along time are found as well",
}
"""Rows in which the graph shows other blocks than the adapter names, each with the reason."""


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def nested_sets(stages: int, patches: int, batch: int, seed: int) -> list[Tensor]:
    """Kept sets of random sizes, each inside the one before, from one patch to all."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.arange(patches).expand(batch, -1)
    sets = []
    for _ in range(stages):
        count = int(torch.randint(1, kept.shape[1] + 1, (), generator=generator))
        order = torch.rand(kept.shape, generator=generator).argsort(dim=1)[:, :count]
        kept = kept.gather(1, order)
        sets.append(kept)
    return sets


@over(RUN)
def test_the_certificate_holds(row: Row) -> None:
    case = case_of(row)
    for factor in FACTORS if row.core else FACTORS[:1]:
        with restored(case.model, factor):
            certificate = tokenprune.verify(case.model, row.inputs())
            assert certificate.checks
            assert all(check.passed for check in certificate.checks), str(certificate)
            assert certificate.mask_vs_gather < BOUND
    assert certificate.adapter == row.family
    assert certificate.num_prefix_tokens == row.num_prefix
    assert certificate.num_patches == row.num_patches()


@over(RUN)
def test_the_graph_shows_the_blocks_that_the_adapter_names(row: Row) -> None:
    analysis = next(iter(case_of(row).model._pruning.cache)).analysis
    found = [call.inputs[0] for call in find_stretches(case_of(row).host, analysis.traced)]
    named = [block.entry for block in analysis.blocks.values()]
    assert (found == named) == (row.name not in OTHER_BLOCKS), OTHER_BLOCKS.get(row.name)


@over([row for row in RUN if row.mode == "remove"])
def test_each_block_has_keys_of_every_token_and_a_middle(row: Row) -> None:
    """What scorers without parameters read, and where stages may be."""
    programs = next(iter(case_of(row).model._pruning.cache))
    blocks, length = programs.analysis.blocks, programs.analysis.grids[0].length
    assert list(blocks) == list(range(row.num_blocks))
    for block in blocks.values():
        assert block.attention is not None
        assert block.attention.key.meta["val"].shape[block.attention.key_dim] == length
        assert (block.middle is None) == (row.name in PARALLEL)


@over(CORE)
def test_keeping_every_token_is_the_host_bit_for_bit(row: Row) -> None:
    case = case_of(row)
    model = case.model
    try:
        model.set_keep_ratio(1.0)
        for factor in FACTORS:
            with restored(model, factor), torch.no_grad():
                dense = outputs(case.host, row.inputs(3))
                # with a trace the pruned graph runs, without it the host's own forward
                traced, trace = model(**row.inputs(3), return_trace=True)
                assert same_bits(tensors(traced), dense)
                assert same_bits(outputs(model, row.inputs(3)), dense)
            assert {stage.num_tokens for stage in trace.stages} == {row.num_patches()}
    finally:
        model.set_keep_ratio(row.recipe["schedule"]["keep_ratio"])


@over(CORE)
def test_unwrap_gives_the_host_back_bit_for_bit(row: Row) -> None:
    case = case_of(row)
    pruned = outputs(case.model, row.inputs())
    assert not same_bits(pruned, case.dense)
    host = tokenprune.unwrap(case.model)
    assert host is case.host
    assert same_bits(outputs(host, row.inputs()), case.dense)
    with case.model.using("dense"):
        assert same_bits(outputs(case.model, row.inputs()), case.dense)


@over(CORE)
def test_mask_path_is_gather_path(row: Row) -> None:
    """For any kept sets. Where sharp attention blows fp32's rounding up, fp64 must tell."""
    model = case_of(row).model

    def error(model: Any, inputs: dict[str, Tensor], sets: list[Tensor]) -> float:
        with model.using("gather", keep_indices=sets):
            gather = outputs(model, inputs)
        with model.using("mask", keep_indices=sets):
            return difference(outputs(model, inputs), gather)

    @settings(max_examples=5)
    @given(seed=st.integers(0, 2**32 - 1), batch=st.sampled_from([1, 2, 3]))
    def agree(seed: int, batch: int) -> None:
        sets = nested_sets(row.stages, row.num_patches(), batch, seed)
        inputs = row.inputs(batch)
        if error(model, inputs, sets) < BOUND:
            return
        exact = copy.deepcopy(model).double()
        inputs = {
            name: value.double() if value.is_floating_point() else value
            for name, value in inputs.items()
        }
        assert error(exact, inputs, sets) < (BOUND_64 if row.exact_in_double else BOUND)

    for factor in FACTORS:
        with restored(model, factor):
            agree()


@over(STAGE_FIRST)
def test_pixels_of_dropped_patches_do_not_matter(row: Row) -> None:
    model = case_of(row).model
    sets = nested_sets(row.stages, row.num_patches(), 2, seed=5)
    inputs = row.inputs()
    (name, pixels), side = next(iter(inputs.items())), row.sizes[0] // row.patch
    dropped = torch.ones(2, side * side, dtype=torch.bool).scatter(1, sets[0], False)
    assert dropped.any()
    assert not dropped.all()
    grid = dropped.view(2, 1, side, side)
    grid = grid.repeat_interleave(row.patch, 2).repeat_interleave(row.patch, 3).expand_as(pixels)
    for factor in FACTORS:
        with restored(model, factor):
            for path in ("mask", "gather"):
                with model.using(path, keep_indices=sets):
                    plain = outputs(model, inputs)
                    for filling in (float("nan"), float("inf"), 1e3):
                        other = {**inputs, name: pixels.masked_fill(grid, filling)}
                        assert difference(outputs(model, other), plain) < BOUND


@over(CORE)
def test_an_image_does_not_depend_on_its_neighbours(row: Row) -> None:
    model = case_of(row).model
    inputs = row.inputs(3)
    together = outputs(model, inputs)
    for image in range(3):
        alone = outputs(model, {name: value[image : image + 1] for name, value in inputs.items()})
        assert difference(alone, [t[image : image + 1] for t in together]) < BOUND


@over(RESIZED)
def test_another_image_size(row: Row) -> None:
    case = case_of(row)
    for size in row.sizes[1:]:
        inputs = row.inputs(2, size)
        with restored(case.model, FACTORS[1]):
            certificate = tokenprune.verify(case.model, inputs)
        assert certificate.num_patches == row.num_patches(size)
        assert certificate.mask_vs_gather < BOUND
        with case.model.using("dense"):
            assert same_bits(outputs(case.model, inputs), outputs(case.host, inputs))


@over(CORE)
def test_a_training_step_reaches_every_predictor_parameter(row: Row) -> None:
    model = case_of(row).model
    with restored(model):
        model.train()
        generator = torch.Generator().manual_seed(0)
        with model.using(generator=generator):
            output, trace = model(**row.inputs(3), return_trace=True)
        share = torch.stack([stage.decision.mean() for stage in trace.stages])
        loss = sum(t.square().mean() for t in tensors(output)) + (share - 0.3).square().sum()
        loss.backward()
        predictors = list(model.token_predictors.named_parameters())
        assert {name.partition(".")[0] for name, _ in predictors} == {
            str(stage) for stage in range(row.stages)
        }
        for name, parameter in predictors:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        backbone = [p.grad for p in case_of(row).host.parameters() if p.grad is not None]
        assert backbone
        assert all(grad.isfinite().all() for grad in backbone)


@over(CORE)
def test_the_state_holds_the_host_and_the_predictors(row: Row) -> None:
    case = case_of(row)
    model = case.model
    state = model.state_dict()
    own = [key for key in state if key not in case.keys]
    assert [key for key in state if key in case.keys] == case.keys
    assert own
    assert all(key.startswith(("token_predictors.", "token_bypasses.")) for key in own)
    with restored(model):
        other = row.build(FACTORS[0], seed=7)
        model.load_state_dict(other.state_dict())  # a checkpoint of the host alone
        assert same_bits(outputs(case.host, row.inputs()), outputs(other, row.inputs()))
        with model.using("dense"):
            assert same_bits(outputs(model, row.inputs()), outputs(other, row.inputs()))
        pruned = outputs(model, row.inputs())
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(whole)
        assert same_bits(outputs(model, row.inputs()), pruned)


@over(CORE)
def test_the_trace_of_eval(row: Row) -> None:
    model = case_of(row).model
    total = row.num_patches()
    with torch.no_grad():
        output, trace = model(**row.inputs(3), return_trace=True)
    assert same_bits(tensors(output), outputs(model, row.inputs(3)))
    assert len(trace.stages) == row.stages
    before = torch.ones(3, total, dtype=torch.bool)
    for number, stage in enumerate(trace.stages, start=1):
        count = num_keep(total, row.recipe["schedule"]["keep_ratio"] ** number)
        assert stage.num_tokens == count
        assert stage.keep_logits.shape == (3, total, 2)
        assert stage.keep_indices.shape == (3, count)
        assert (stage.keep_indices.diff(dim=1) > 0).all()
        kept = torch.zeros_like(before).scatter(1, stage.keep_indices, True)
        assert torch.equal(stage.decision > 0, kept)
        assert not (kept & ~before).any()
        assert torch.equal(stage.keep_logits[..., 0] == float("-inf"), ~before)
        if row.mode == "remove":  # bypassed tokens may come back
            before = kept
    left = count if row.mode == "remove" else row.final_tokens or total
    assert trace.patch_tokens.shape[:2] == (3, left)


@over(CORE)
def test_the_trace_of_training(row: Row) -> None:
    model = case_of(row).model
    total = row.num_patches()
    with restored(model), torch.no_grad():
        model.train()
        traces = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(3)
            with torch.random.fork_rng(devices=[]), model.using(generator=generator):
                torch.manual_seed(3)  # the host's own noise, such as stochastic depth
                traces.append(model(**row.inputs(3), return_trace=True)[1])
    before = torch.ones(3, total)
    for stage, again in zip(traces[0].stages, traces[1].stages, strict=True):
        assert stage.keep_indices is None
        assert stage.keep_logits.shape == (3, total, 2)
        assert torch.equal(stage.decision, again.decision)
        assert set(stage.decision.unique().tolist()) <= {0.0, 1.0}
        assert (stage.decision <= before).all()
        if row.mode == "remove":  # bypassed tokens may come back
            before = stage.decision
    assert traces[0].patch_tokens.shape[:2] == (3, row.final_tokens or total)


@over(REFUSED)
def test_what_cannot_be_pruned_is_refused_and_left_alone(row: Row) -> None:
    host = row.build(FACTORS[0])
    host.train()
    modes = [module.training for module in host.modules()]
    with pytest.raises(UnsupportedHostError, match=row.refused):
        tokenprune.wrap(host, row.recipe, example_inputs=row.inputs())
    assert modes == [module.training for module in host.modules()]
    fresh = row.build(FACTORS[0])
    assert same_bits(outputs(host.eval(), row.inputs()), outputs(fresh, row.inputs()))
