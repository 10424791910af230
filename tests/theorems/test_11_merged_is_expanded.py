"""Theorem 11 of docs/theorems.md: merged tokens are a group whose members all hold its mean."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune
from tests.theorems.case import BATCH, BOUNDS, FACTORS, SEED, difference, fewer, tensors
from tests.toys.table import TOYS, Toy
from tests.toys.vit import randomize_weights
from tokenprune.errors import LeakError, VerificationError
from tokenprune.rewrite.kept import ExpandedSet, MergedSet
from tokenprune.rewrite.kept.token_ops import WEIGHTED
from tokenprune.rewrite.settings import CallSettings

NAMES = (
    *("prefix_0", "prefix_2", "rope_by_length", "relative_bias", "talking_heads", "additive_mask"),
    *("bool_mask", "mean_and_max", "mean_of_patches", "attention_pooled", "class_attention"),
    *("long_skip", "eager", "one_key_head", "float64", "timm_eva", "position_each_time"),
)
toys = pytest.mark.parametrize("toy", [TOYS[name] for name in NAMES], ids=NAMES)


@lru_cache
def wrapped(toy: Toy, scorer: str = "similarity") -> Any:
    recipe = {
        "version": 1, "mode": "merge", "scorer": scorer,
        "schedule": {"blocks": toy.blocks, "keep_ratio": 0.6},
    }  # fmt: skip
    return tokenprune.wrap(
        toy.build(), recipe, adapter=toy.facts, example_inputs=toy.inputs(), verify=False,
        train=False,
    ).eval()  # fmt: skip


def with_sharp_attention(toy: Toy) -> Any:
    """Weights that make positions matter."""
    model = wrapped(toy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        randomize_weights(model, 10.0)
    return model


@torch.no_grad()
def run(model: Any, inputs: dict[str, Tensor], path: Any, groups: Any) -> tuple[Any, Any]:
    """The output and the records of a path on given groups."""
    programs = model._pruning.programs(inputs)
    settings = CallSettings(num_keep=(), sample=False, groups=groups)
    output, records, *_ = programs.get(model, path).run(model, settings, **inputs)
    return tensors(output), records


def drawn(generator: torch.Generator, stages: int, patches: int, batch: int) -> list[Tensor]:
    """Nested groups: each stage joins groups of the one before."""
    of = torch.arange(patches).expand(batch, -1)
    found = []
    for _ in range(stages):
        left = int((of[0] == torch.arange(patches)).sum())
        count = int(torch.randint(1, left + 1, (), generator=generator))
        rows = []
        for row in of:
            there = row.unique()
            order = there[torch.randperm(left, generator=generator)]
            to = torch.arange(patches)
            choice = torch.randint(count, (left - count,), generator=generator)
            to[order[count:]] = order[:count][choice]
            rows.append(to[row])
        of = torch.stack(rows)
        found.append(of)
    return found


@toys
@settings(max_examples=4)
@given(seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_11_merged_is_expanded(toy: Toy, seed: int, batch: int, factor: float) -> None:
    model, generator = wrapped(toy), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomize_weights(model, factor)
    inputs = toy.inputs(batch, seed=seed)
    patches = model._pruning.programs(inputs).num_patches[0]
    groups = drawn(generator, len(toy.blocks), patches, batch)
    merged, records = run(model, inputs, "gather", groups)
    expanded, _ = run(model, inputs, "expanded", groups)
    assert difference(merged, expanded) < BOUNDS[toy.dtype]
    for of, (_, kept) in zip(groups, records, strict=True):
        prefix = kept.sizes.shape[1] - kept.numbers.shape[1]
        assert torch.equal(kept.numbers.gather(1, kept.rows), of)
        sizes = torch.stack([torch.bincount(row, minlength=patches) for row in of])
        assert torch.equal(kept.sizes[:, prefix:].long(), sizes.gather(1, kept.numbers))
        assert (kept.sizes[:, :prefix] == 1).all()


@toys
@fewer
@given(seed=SEED)
def test_11_sizes_sum_to_the_tokens_there_were_and_an_image_is_alone(toy: Toy, seed: int) -> None:
    model, inputs = wrapped(toy), toy.inputs(3, seed=seed)
    with torch.no_grad():
        output, trace = model(**inputs, return_trace=True)
        alone = model(**{name: value[1:2] for name, value in inputs.items()})
    for stage, kept in zip(trace.stages, (0.6, 0.36), strict=False):
        patches = stage.decision.shape[1]
        assert stage.keep_indices.shape[1] == stage.num_tokens == int(patches * kept + 1e-6)
        assert (stage.sizes.sum(1) == patches).all()
        stand = stage.decision.bool().nonzero()[:, 1]
        assert torch.equal(stand, stage.keep_indices.sort().values.flatten())
        assert stage.decision.gather(1, stage.groups).all()
    assert difference(tensors(alone), [t[1:2] for t in tensors(output)]) < BOUNDS[toy.dtype]


def test_11_groups_of_one_change_nothing() -> None:
    toy = TOYS["prefix_2"]
    model, inputs = wrapped(toy), toy.inputs(2)
    groups = [torch.arange(16).expand(2, -1)] * len(toy.blocks)
    merged, _ = run(model, inputs, "gather", groups)
    assert difference(merged, tensors(model._pruning.host(**inputs))) == 0.0


@pytest.mark.parametrize("name", ["rope_by_length", "relative_bias", "additive_mask"])
def test_11_tables_are_read_at_the_places_of_those_that_stand_for_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them at each member's own place is another function."""
    toy = TOYS[name]
    inputs, groups = toy.inputs(2), drawn(torch.Generator().manual_seed(1), 2, 16, 2)
    model = with_sharp_attention(toy)
    merged, _ = run(model, inputs, "gather", groups)
    expanded, _ = run(model, inputs, "expanded", groups)
    assert difference(merged, expanded) < 1e-5
    monkeypatch.setattr(ExpandedSet, "table_gather", staticmethod(lambda table, of, *how: table))
    wrapped.cache_clear()
    wrong, _ = run(with_sharp_attention(toy), inputs, "expanded", groups)
    wrapped.cache_clear()
    assert difference(merged, wrong) > 1e-3


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("weighted_attention", "prefix_2"),
        ("weighted_softmax", "eager"),
        ("weighted_mean", "mean_of_patches"),
        ("weighted_operand", "eager"),
    ],
)
def test_11_a_certificate_sees_each_operator_that_forgets_sizes(
    name: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = name.removeprefix("weighted_")
    right = getattr(WEIGHTED, field)
    forgetting = WEIGHTED._replace(**{field: lambda *a, **k: right(*_without_sizes(name, a), **k)})
    monkeypatch.setattr(MergedSet, "ops", forgetting)
    toy = TOYS[host]
    wrapped.cache_clear()
    with pytest.raises(VerificationError, match="expanded and gather path differ"):
        tokenprune.verify(wrapped(toy), toy.inputs())
    wrapped.cache_clear()


def _without_sizes(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    place = 3 if name == "weighted_attention" else 1
    return (*args[:place], None, *args[place + 1 :])


def test_11_causal_attention_is_refused() -> None:
    with pytest.raises(LeakError, match="merged tokens have no order"):
        wrapped(TOYS["causal"])(**TOYS["causal"].inputs())
