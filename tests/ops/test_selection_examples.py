"""Refusals of the selection operators, and their place in a graph."""

import pytest
import torch
from torch import nn

from tokenprune.errors import KeepIndicesError, PlanError
from tokenprune.ops import (
    check_keep_indices,
    gather_aligned,
    gather_tokens,
    scatter_tokens,
    select_topk,
)


@pytest.mark.parametrize("num_keep", [0, 6])
def test_a_count_out_of_range(num_keep: int) -> None:
    with pytest.raises(PlanError, match=rf"keep {num_keep} tokens, found 5 .* from 1 to 5"):
        select_topk(torch.zeros(2, 5, 2), num_keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rising", [True, False])
def test_selection_in_any_type(dtype: torch.dtype, rising: bool) -> None:
    scores = torch.arange(3000, dtype=dtype)  # fp16 and bf16 round: many ties
    scores = scores if rising else scores.flip(0)
    keep_logits = torch.stack([scores, scores], dim=-1)[None]
    wanted = scores.sort(stable=True, descending=True).indices[:7].sort().values
    assert torch.equal(select_topk(keep_logits, 7)[0], wanted)


def test_keeping_all_changes_no_bit() -> None:
    x = torch.randn(2, 6, 3)
    keep_indices = select_topk(torch.randn(2, 5, 2), 5)
    assert torch.equal(gather_tokens(x, keep_indices, 1), x)


def test_a_position_bias_is_gathered_on_both_dims_and_gets_its_gradient() -> None:
    bias = torch.randn(3, 5, 5, requires_grad=True)
    keep_indices = torch.tensor([[0, 2], [1, 3]])
    found = gather_aligned(bias, keep_indices, (1, 2), (1, 1), 4)
    assert found.shape == (2, 3, 3, 3)
    assert torch.equal(found[1], bias[:, [0, 2, 4]][:, :, [0, 2, 4]])
    found.sum().backward()
    assert bias.grad is not None
    assert bias.grad.sum() == found.numel()
    assert bias.grad[0, 0, 0] == 2  # the prefix token stays in both images


def test_integer_and_bool_tables() -> None:
    keep_indices = torch.tensor([[0, 2], [1, 3]])
    positions = gather_aligned(torch.arange(4), keep_indices, (0,), (0,), 2)
    assert torch.equal(positions, keep_indices)
    mask = torch.rand(2, 1, 4, 4) < 0.5
    found = gather_aligned(mask, keep_indices, (2, 3), (0, 0), 4)
    assert torch.equal(found[1, 0], mask[1, 0, 1::2, 1::2])


@pytest.mark.parametrize(
    ("shape", "dims", "prefix", "rank", "message"),
    [
        ((4, 3), (0,), (0, 0), 3, "one prefix count"),
        ((4, 4), (0, 0), (0, 0), 3, "one prefix count"),
        ((4, 3), (0,), (0,), 2, "leaves no dim for the batch"),
        ((1, 4, 3), (1,), (0,), 2, "leaves no dim for the batch"),
        ((5, 4, 3), (1,), (0,), 3, "dim 0 must be 1 or 2"),
    ],
)
def test_tables_that_cannot_be_gathered(
    shape: tuple[int, ...], dims: tuple[int, ...], prefix: tuple[int, ...], rank: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        gather_aligned(torch.zeros(shape), torch.tensor([[0], [1]]), dims, prefix, rank)


def test_scattering_low_precision_tokens_into_full_ones() -> None:
    full, keep_indices = torch.zeros(1, 3, 2), torch.tensor([[1]])
    found = scatter_tokens(full, torch.ones(1, 1, 2, dtype=torch.bfloat16), keep_indices)
    assert found.dtype == torch.float32
    assert found[0, 1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("keep_indices", "message"),
    [
        (torch.tensor([[0.0, 1.0]] * 2), "hold integers, found torch.float32"),
        (torch.tensor([[True, False]] * 2), r"found torch.bool; .* mask.nonzero\(\)"),
        (torch.tensor([0, 1]), r"shape \[2, K from 1 to 4\], found \[2\]"),
        (torch.tensor([[0, 1]]), r"shape \[2, K from 1 to 4\], found \[1, 2\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"found \[2, 0\]"),
        (torch.tensor([[0, 1, 2, 3, 0]] * 2), r"found \[2, 5\]"),
        (torch.tensor([[0, 1], [1, 4]]), r"image 1 hold 4, but there are 4 .* use 0 to 3"),
        (torch.tensor([[0, -1], [1, 2]]), "image 0 hold -1"),
        (torch.tensor([[0, 1], [3, 3]]), "image 1 hold 3 twice"),
    ],
)
def test_kept_sets_from_outside(keep_indices: torch.Tensor, message: str) -> None:
    with pytest.raises(KeepIndicesError, match=message):
        check_keep_indices(keep_indices, batch_size=2, num_patches=4)


def test_a_kept_set_of_another_count() -> None:
    keep_indices = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    check_keep_indices(keep_indices, batch_size=2, num_patches=4)
    with pytest.raises(KeepIndicesError, match=r"shape \[2, 3\], found \[2, 2\]"):
        check_keep_indices(keep_indices, batch_size=2, num_patches=4, num_keep=3)


class Prune(nn.Module):
    """Selection and every kind of gathering, as the gather path holds them."""

    def forward(self, x: torch.Tensor, keep_logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keep_indices = select_topk(keep_logits, 3)
        kept = gather_tokens(x, keep_indices, 1)
        table = gather_aligned(x[0], keep_indices, (0,), (1,), 4)
        bias = gather_aligned(x[:, None] @ x[:, None].mT, keep_indices, (2, 3), (1, 1), 4)
        return kept, table, bias, scatter_tokens(x[:, 1:], kept[:, 1:], keep_indices)


def test_it_exports() -> None:
    inputs = torch.randn(2, 6, 4), torch.randn(2, 5, 2)
    program = torch.export.export(Prune(), inputs)
    for found, wanted in zip(program.module()(*inputs), Prune()(*inputs), strict=True):
        assert torch.equal(found, wanted)
