"""Scorers that need no training, by name, on every plain host of the zoo; and what they read."""

import pytest
import torch

import tokenprune
from tests.zoo.hosts import ZOO
from tests.zoo.rows import Row
from tokenprune.recipe.names import named_recipes

PLAIN = [row for row in ZOO if row.mode == "remove" and not row.refused]
# Blocks that add attention and feed-forward to the same stream, so there is nothing in between.
PARALLEL = {"parallel_scaling", "differential"}
NAMES = ["key-norm-k0.7", "random-k0.7", "token-norm-k0.7"]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in PLAIN])
def test_it_is_certified(row: Row) -> None:
    """`wrap` proves it on the host: all scorers on core rows, one on each of the others in turn."""
    host = row.build(5.0)
    for name in NAMES if row.core else NAMES[PLAIN.index(row) % 3 :][:1]:
        model = tokenprune.wrap(host, name, example_inputs=row.inputs(), train=row.core).eval()
        with torch.no_grad():
            _, trace = model(**row.inputs(3), return_trace=True)
        counts = [stage.num_tokens for stage in trace.stages]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < row.num_patches()
    programs = next(iter(model._pruning.cache))
    blocks, length = programs.analysis.blocks, programs.analysis.grids[0].length
    assert list(blocks) == list(range(row.num_blocks))
    for block in blocks.values():
        assert block.attention is not None
        assert block.attention.key.meta["val"].shape[block.attention.key_dim] == length
        assert (block.middle is None) == (row.name in PARALLEL)


def test_none_is_left_out() -> None:
    assert len(PLAIN) > 60
    assert set(NAMES) <= set(named_recipes())
