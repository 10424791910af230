"""Bypass with kept sets of different sizes: the kept tokens of a batch in rows without gaps.

What dropped tokens go around acts on each token alone, so it does not matter which tokens share a
row: no padding is needed but in the last row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tokenprune.ops.layout import TOKENS, Layout, flat_tokens, flat_tokens_back
from tokenprune.ops.selection import one_hot

__all__ = ["Packed", "merge_packed", "pack", "take_packed"]


class Packed(NamedTuple):
    """Where the tokens of a batch go. A token's place is its number among the B * L of the batch.

    Attributes:
        kept: [B, R] places of the kept tokens, the first one again where the last row has room.
        num_kept: Kept tokens of the whole batch.
        dropped: [B * L - num_kept] places of the others.
        back: [B * L] where each token is among the kept ones followed by the dropped ones.
    """

    kept: Tensor
    num_kept: int
    dropped: Tensor
    back: Tensor


def pack(numbers: Int[Tensor, "B K"], tokens: Float[Tensor, "B L D"], num_prefix: int) -> Packed:
    """Lay out the batch; prefix tokens always count as kept.

    `numbers` are the kept patches, -1 where a row has no more; `tokens` only gives the shape.
    """
    batch, length = tokens.shape[:2]
    like = numbers.new_zeros(batch, length - num_prefix)
    kept = torch.cat([like.new_ones(batch, num_prefix), one_hot(numbers, like)], dim=1).flatten()
    order = torch.argsort(kept, descending=True, stable=True)
    count = int(kept.sum())
    rows = -(-count // max(batch, 1))
    spare = order[:1].expand(rows * batch - count)
    places = torch.cat([order[:count], spare]).reshape(batch, rows)
    return Packed(places, count, order[count:], torch.argsort(order))


def take_packed(
    x: Shaped[Tensor, "..."], packed: Packed, layout: Layout = TOKENS
) -> Shaped[Tensor, "..."]:
    """The kept tokens of the whole batch in equal rows, laid out as `take_tokens` does; `x` itself
    if nothing is dropped."""
    tokens = flat_tokens(x, layout)
    if not packed.dropped.numel():
        return x
    batch, rows = packed.kept.shape
    kept = tokens.flatten(0, 1).index_select(0, packed.kept.flatten())
    kept = kept.reshape(batch, rows, tokens.shape[-1])
    return flat_tokens_back(kept, layout.gathered(x.shape, rows), layout)


def merge_packed(
    x: Float[Tensor, "..."],
    branch: Float[Tensor, "..."],
    packed: Packed,
    bypass: nn.Module,
    layout: Layout = TOKENS,
) -> Float[Tensor, "..."]:
    """`merge_branches` for a branch that `take_packed` laid out."""
    if not packed.dropped.numel():
        return branch
    tokens = flat_tokens(x, layout)
    light = bypass(tokens.flatten(0, 1).index_select(0, packed.dropped)).to(branch.dtype)
    kept = flat_tokens(branch, Layout(1, layout.channels_first)).flatten(0, 1)[: packed.num_kept]
    merged = torch.cat([kept, light]).index_select(0, packed.back)
    return flat_tokens_back(merged.reshape(tokens.shape), x.shape, layout)
