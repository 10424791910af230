"""Packed tokens of images that keep different numbers of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.ops import varlen
from tokenprune.ops.jagged import take_chosen

COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def lengths_of(counts: list[int], numbers: Tensor, prefix: int) -> varlen.Lengths:
    known = counts if len(set(counts)) > 1 else ()
    return varlen.lengths_of(numbers, torch.tensor(counts), known, prefix)


def numbers_of(counts: list[int]) -> Tensor:
    """Kept patches of 6, ascending, then -1."""
    rows = torch.full((len(counts), max(counts)), -1)
    for row, count in zip(rows, counts, strict=True):
        row[:count] = torch.randperm(6)[:count].sort().values
    return rows


@given(COUNTS, st.integers(0, 2), st.sampled_from([1, 2]))
def test_packed_tokens_are_those_of_each_image_in_turn(
    counts: list[int], prefix: int, dim: int
) -> None:
    lengths = lengths_of(counts, numbers_of(counts), prefix)
    each = [prefix + count for count in counts]
    padded = torch.randn(len(counts), 3, prefix + max(counts)).movedim(2, dim)
    packed = varlen.pack(padded, lengths, dim)
    if len(set(counts)) == 1:
        assert packed is padded
        assert varlen.unpack(padded, lengths, dim) is padded
        return
    rows = [x.narrow(dim - 1, 0, n) for x, n in zip(padded, each, strict=True)]
    assert torch.equal(packed, torch.cat(rows, dim - 1)[None])
    assert varlen.as_packed(padded, lengths, dim).shape == packed.shape
    assert varlen.as_padded(packed, lengths, dim).shape == padded.shape
    assert varlen.one_image(padded, lengths).shape[0] == packed.shape[0]
    for x, n, back in zip(padded, each, varlen.unpack(packed, lengths, dim), strict=True):
        assert torch.equal(back.narrow(dim - 1, 0, n), x.narrow(dim - 1, 0, n))
        padding = back.narrow(dim - 1, n, prefix + max(counts) - n)
        assert torch.equal(padding, x.narrow(dim - 1, n - 1, 1).expand_as(padding))


def test_dims_keep_their_order_in_memory() -> None:
    """Hosts call `view` on them."""
    lengths = lengths_of([2, 5], numbers_of([2, 5]), 1)
    heads = torch.randn(2, 3, 6, 4)
    assert varlen.pack(heads, lengths, 2).is_contiguous()
    assert varlen.unpack(varlen.pack(heads, lengths, 2), lengths, 2).is_contiguous()
    mixed = torch.randn(2, 6, 3, 4).transpose(1, 2)
    assert varlen.pack(mixed, lengths, 2).transpose(1, 2).is_contiguous()


@given(COUNTS, st.integers(0, 2))
def test_chosen_tokens_are_taken_packed(counts: list[int], prefix: int) -> None:
    tokens, chosen = torch.randn(len(counts), prefix + 6, 2), numbers_of(counts)
    lengths = lengths_of(counts, chosen, prefix)
    each = lengths.of_images
    taken = varlen.take_packed_tokens(tokens, chosen, each, prefix, lengths)
    assert torch.equal(taken, varlen.pack(take_chosen(tokens, chosen, each, prefix), lengths, 1))


def flash(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, same: Tensor, *how: Any, scale: float | None
) -> tuple[Tensor]:
    """What FlashAttention does: [T, H, d] and [B + 1] in, [T, H, d] out."""
    assert starts.dtype == torch.int32
    assert same is starts
    longest = int(starts.diff().max())
    assert how == (longest, longest, 0.0, False, False)  # no dropout, not causal
    out = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), scale=scale)
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    return (torch.cat(out, 1).transpose(0, 1),)


def test_the_operator_of_torch_takes_what_it_is_given() -> None:
    names = [argument.name for argument in varlen.flash_attention.default._schema.arguments]
    given = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    assert names[:10] == given.split()
    assert "scale" in names


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}])
@pytest.mark.parametrize("counts", [[2, 5, 1], [3, 3, 3]])
def test_images_attend_to_themselves(
    monkeypatch: pytest.MonkeyPatch, at_once: bool, options: dict[str, Any], counts: list[int]
) -> None:
    if at_once:
        monkeypatch.setattr(varlen, "_at_once_serves", lambda *x: True)
        monkeypatch.setattr(varlen, "flash_attention", flash)
    lengths = lengths_of(counts, numbers_of(counts), 1)
    q, k, v = torch.randn(3, len(counts), 2, 1 + max(counts), 4)
    found = varlen.packed_attention(
        *(varlen.pack(x, lengths, 2) for x in (q, k, v)), lengths, **options
    )
    found = varlen.unpack(found, lengths, 2)
    for image, count in enumerate(counts):
        one = (x[image, :, : 1 + count] for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*one, **options)
        torch.testing.assert_close(found[image, :, : 1 + count], expected)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("queries", [1, 6])
def test_each_image_has_its_own_mask(
    monkeypatch: pytest.MonkeyPatch, on_cuda: bool, queries: int
) -> None:
    counts = [3, 6]
    lengths = lengths_of(counts, numbers_of(counts), 0)
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    mask = torch.randn(2, 1, queries, 6)
    operands = [varlen.pack(x, lengths, 2) for x in (q, k, v)]
    with monkeypatch.context() as patch:
        if on_cuda:
            patch.setattr(Tensor, "is_cuda", property(lambda self: True), raising=False)
        found = varlen.packed_attention(*operands, lengths, mask=mask)
    found = varlen.unpack(found, lengths, 2)
    for image, count in enumerate(counts):
        one = (x[image : image + 1, :, :count] for x in (q, k, v))
        bias = mask[image : image + 1, :, :count, :count]
        expected = F.scaled_dot_product_attention(*one, bias)
        torch.testing.assert_close(found[image : image + 1, :, :count], expected)


def test_fewer_heads_of_keys() -> None:
    lengths = lengths_of([2, 4], numbers_of([2, 4]), 0)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    found = varlen.packed_attention(query, key, key, lengths, enable_gqa=True)
    wide = key.repeat_interleave(2, 1)
    torch.testing.assert_close(found, varlen.packed_attention(query, wide, wide, lengths))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k, v),
        lambda q, k, v: (q[..., :12], k[..., :12], v),
        lambda q, k, v: (q, k[:, :1], v[:, :1]),
        lambda q, k, v: (q, k, v[..., :8]),
    ],
)
def test_what_the_kernel_for_all_images_does_not_take(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    monkeypatch.setattr(varlen, "_has_flash", lambda device: True)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True), raising=False)
    operands = torch.randn(3, 1, 4, 6, 16, dtype=torch.bfloat16)
    assert varlen._at_once_serves(*operands)
    assert not varlen._at_once_serves(*change(*operands))
