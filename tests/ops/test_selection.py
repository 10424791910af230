"""Selection picks the best in their own order; gathering and scattering undo each other."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.ops import (
    check_keep_indices,
    gather_aligned,
    gather_tokens,
    scatter_tokens,
    select_topk,
)


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


SCORES = st.sampled_from([-1.0, 0.0, 0.5, float("-inf"), float("nan")])
ROWS = st.lists(st.lists(SCORES, min_size=6, max_size=6), min_size=1, max_size=3)


@given(ROWS, st.integers(1, 6))
def test_the_best_scores_stay_and_the_lower_index_wins_ties(
    rows: list[list[float]], num_keep: int
) -> None:
    keep_logits = torch.stack([torch.tensor(rows), torch.randn(len(rows), 6)], dim=-1)
    found = select_topk(keep_logits, num_keep)
    for row, indices in zip(rows, found.tolist(), strict=True):
        score = [float("-inf") if x != x else x for x in row]
        best = sorted(range(6), key=lambda i: (-score[i], i))[:num_keep]
        assert indices == sorted(best)


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
