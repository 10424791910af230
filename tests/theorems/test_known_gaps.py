"""Toys that the engine cannot prune yet, each a strict xfail; and how many toys there are."""

import pytest

import tokenprune
from tests.theorems.case import same_bits, tensors
from tests.toys.table import GAPS, TOYS, Toy


@pytest.mark.parametrize(
    "gap",
    [
        pytest.param(toy, id=name, marks=pytest.mark.xfail(strict=True, reason=reason))
        for name, (toy, reason) in GAPS.items()
    ],
)
def test_known_gaps(gap: Toy) -> None:
    """What a host of `TOYS` can do. A toy that passes here belongs there."""
    host = gap.build()
    dense = tensors(gap.build()(**gap.inputs()))
    model = gap.wrap(host)
    tokenprune.verify(model, gap.inputs())
    for size in gap.sizes:
        model.train()
        sum(t.sum() for t in tensors(model(**gap.inputs(3, size)))).backward()  # type: ignore[union-attr]
        model.eval()
        model(**gap.inputs(3, size))
    assert same_bits(host(**gap.inputs()), dense)


def test_no_toy_is_lost() -> None:
    assert len(TOYS) == 41
    core = {"eager", "rope_by_length", "relative_bias", "mean_and_max", "bool_mask", "timm_vit"}
    assert {name for name, toy in TOYS.items() if toy.core} == core
