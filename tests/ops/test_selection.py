"""Selection picks the best in their own order; gathering and scattering undo each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenprune.errors import KeepIndicesError, PlanError
from tokenprune.ops import (
    check_keep_indices,
    gather_aligned,
    gather_tokens,
    scatter_tokens,
    select_topk,
)
from tokenprune.ops.selection import above_threshold, tie_order, top_k


@st.composite
def kept_sets(draw: st.DrawFn) -> tuple[Tensor, int]:
    """keep_indices [B, K] and N."""
    batch, patches = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    kept = draw(st.integers(1, patches))
    rows = [
        sorted(draw(st.permutations(range(patches)))[:kept])
        for _ in range(batch)
    ]  # fmt: skip
    return torch.tensor(rows), patches


ORDER = tie_order(torch.arange(3000)).tolist()
SCORES = st.sampled_from([-1.0, 0.0, 0.5, float("-inf"), float("nan")])
ROWS = st.lists(st.lists(SCORES, min_size=6, max_size=6), min_size=1, max_size=3)


@given(ROWS, st.integers(1, 6))
def test_the_best_scores_stay_and_ties_are_spread(rows: list[list[float]], num_keep: int) -> None:
    keep_logits = torch.stack([torch.tensor(rows), torch.randn(len(rows), 6)], dim=-1)
    found = select_topk(keep_logits, num_keep)
    for row, indices in zip(rows, found.tolist(), strict=True):
        score = [float("-inf") if x != x else x for x in row]
        best = sorted(range(6), key=lambda i: (-score[i], -ORDER[i]))[:num_keep]
        assert indices == sorted(best)


@pytest.mark.parametrize("side", [7, 12, 13, 14, 16, 21, 24, 32, 34, 37])
@pytest.mark.parametrize("share", [0.7, 0.49, 0.343])
def test_equal_scores_leave_no_hole_in_a_grid(side: int, share: float) -> None:
    """The kept share of windows of 3 x 3 patches varies less than that of a random set."""
    kept = select_topk(torch.zeros(1, side * side, 2), int(share * side * side))
    grid = torch.zeros(side * side).scatter(0, kept[0], 1.0).view(1, 1, side, side)
    windows = torch.nn.functional.avg_pool2d(grid, 3, stride=1)
    assert windows.var(correction=0) < share * (1 - share) / 9


def test_no_two_numbers_tie_and_padding_is_last() -> None:
    assert tie_order(torch.arange(2**16)).unique().numel() == 2**16
    assert tie_order(torch.tensor([-1])) < tie_order(torch.arange(2**16)).min()
    logits, numbers = torch.full((1, 4, 2), float("nan")), torch.tensor([[0, 5, -1, -1]])
    assert select_topk(logits, 2, numbers).tolist() == [[0, 1]]
    assert above_threshold(logits, 0.5, numbers >= 0, numbers=numbers)[0, :2].sum() == 1


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_ties_are_settled_alike_on_what_is_left(seed: int, first: int, second: int) -> None:
    """A stage that sees only what the stage before kept takes what one that sees all would."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (3, 10, 2), generator=generator).float()
    numbers = select_topk(logits, max(first, second))
    rows = torch.randint(0, 3, (3, 10, 2), generator=generator).float()
    there = torch.zeros(3, 10, dtype=torch.bool).scatter(1, numbers, True)
    whole = top_k(rows.masked_fill(~there[..., None], float("-inf")), min(first, second))
    left = rows.gather(1, numbers[..., None].expand(-1, -1, 2))
    kept = numbers.gather(1, select_topk(left, min(first, second), numbers))
    assert torch.equal(torch.zeros_like(whole).scatter(1, kept, True), whole)


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_selections_are_nested_in_the_count(seed: int, num_keep: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep_logits = torch.randint(0, 4, (2, 10, 2), generator=generator).float()
    fewer, more = (select_topk(keep_logits, k) for k in (num_keep, num_keep + 1))
    check_keep_indices(fewer, batch_size=2, num_patches=10, num_keep=num_keep)
    for few, many in zip(fewer.tolist(), more.tolist(), strict=True):
        assert set(few) < set(many)


@given(kept_sets(), st.integers(0, 2), st.integers(1, 3))
def test_gathering_takes_the_prefix_and_the_kept(
    kept_set: tuple[Tensor, int], num_prefix: int, channels: int
) -> None:
    keep_indices, patches = kept_set
    x = torch.randn(len(keep_indices), num_prefix + patches, channels, requires_grad=True)
    found = gather_tokens(x, keep_indices, num_prefix)
    for image, kept in enumerate(keep_indices):
        rows = [*range(num_prefix), *(kept + num_prefix).tolist()]
        assert torch.equal(found[image], x[image, rows])
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad.sum() == found.numel()


@given(kept_sets(), st.integers(1, 3))
def test_scattering_gives_back_what_was_gathered(
    kept_set: tuple[Tensor, int], channels: int
) -> None:
    keep_indices, patches = kept_set
    full = torch.randn(len(keep_indices), patches, channels)
    kept = gather_tokens(full, keep_indices, 0)
    assert torch.equal(scatter_tokens(full, kept, keep_indices), full)
    blank = scatter_tokens(torch.zeros_like(full), kept + 1, keep_indices)
    assert torch.equal(gather_tokens(blank, keep_indices, 0), kept + 1)
    assert (blank != 0).sum() <= kept.numel()


@given(kept_sets(), st.data())
def test_aligned_tables_are_indexed_on_every_token_dim(
    kept_set: tuple[Tensor, int], data: st.DataObject
) -> None:
    keep_indices, patches = kept_set
    batch = len(keep_indices)
    ndim = data.draw(st.integers(1, 4))
    rank = data.draw(st.integers(ndim, 4))
    free = list(range(0 if rank > ndim else 1, ndim))
    if not free:
        rank, free = rank + 1, [0]
    dims = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=2, unique=True))
    prefix = [data.draw(st.integers(0, 2)) for _ in dims]
    shape = data.draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    if rank == ndim:
        shape[0] = data.draw(st.sampled_from([1, batch]))
    for dim, count in zip(dims, prefix, strict=True):
        shape[dim] = count + patches
    table = torch.randn(shape)
    signed = tuple(dim - data.draw(st.sampled_from([0, ndim])) for dim in dims)
    found = gather_aligned(table, keep_indices, signed, tuple(prefix), rank)
    assert found.ndim == rank
    assert found.shape[0] == batch
    padded = table.reshape((1,) * (rank - ndim) + tuple(shape)).expand(
        batch, *(-1 for _ in range(rank - 1))
    )
    for image, kept in enumerate(keep_indices):
        wanted = padded[image]
        for dim, count in zip(dims, prefix, strict=True):
            rows = torch.tensor([*range(count), *(kept + count).tolist()])
            wanted = wanted.index_select(dim + rank - ndim - 1, rows)
        assert torch.equal(found[image], wanted)


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
    best = sorted(range(3000), key=lambda i: (-float(scores[i]), -ORDER[i]))[:7]
    wanted = torch.tensor(sorted(best))
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
def test_kept_sets_from_outside(keep_indices: Tensor, message: str) -> None:
    with pytest.raises(KeepIndicesError, match=message):
        check_keep_indices(keep_indices, batch_size=2, num_patches=4)


def test_a_kept_set_of_another_count() -> None:
    keep_indices = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    check_keep_indices(keep_indices, batch_size=2, num_patches=4)
    with pytest.raises(KeepIndicesError, match=r"shape \[2, 3\], found \[2, 2\]"):
        check_keep_indices(keep_indices, batch_size=2, num_patches=4, num_keep=3)


class Prune(nn.Module):
    """Selection and every kind of gathering, as the gather path holds them."""

    def forward(self, x: Tensor, keep_logits: Tensor) -> tuple[Tensor, ...]:
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
