"""Rows that nobody reads, in hosts of timm and transformers: left out, or said who reads them."""

import pytest
import torch

import tokenprune
from tests.theorems.case import difference, tensors
from tests.zoo.hosts import ZOO
from tests.zoo.hosts_grid import GRID
from tokenprune.errors import PlanError

pytestmark = pytest.mark.slow
ROWS = {row.name: row for row in (*ZOO, *GRID)}
# Two rows read, a rotary table, a bias of queries and keys, sizes of views, a product by hand.
READ_FEW = ("deit_distilled", "rope", "relpos_cls", "deit_teacher", "vit_eager", "bert")
READ_ALL = {"gap": "'mean'", "siglip_map": "scaled_dot_product_attention", "swin": "keeps a grid"}


@pytest.mark.parametrize("name", READ_FEW)
def test_unread_rows_are_left_out(name: str) -> None:
    row = ROWS[name]
    host = row.build(5.0).double()
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in row.inputs().items()}
    model = tokenprune.wrap(host, "exact", example_inputs=inputs, train=False)
    with torch.no_grad():
        assert difference(tensors(model(**inputs)), tensors(host(**inputs))) < 1e-12
    found = tokenprune.profile(model)
    last = found.macs_per_block[-1] / found.dense_macs_per_block[-1]
    assert last < 0.5  # keys and values are whole
    assert found.macs_per_block[:-1] == found.dense_macs_per_block[:-1]


@pytest.mark.parametrize("name", READ_ALL)
def test_a_host_that_reads_all_rows_is_refused_with_the_reader(name: str) -> None:
    row = ROWS[name]
    with pytest.raises(PlanError, match=READ_ALL[name]):
        tokenprune.wrap(row.build(), "exact", example_inputs=row.inputs(), train=False)
