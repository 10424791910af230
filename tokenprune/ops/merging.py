"""Tokens that stand for several: merged ones, and what has to know how many they stand for.

In exact arithmetic a merged sequence is one in which every member of a group holds the group's
mean: attention to n copies is attention to one with log(n) added to its logit, and a mean over
copies is a mean with weights. (ToMe, Bolya et al., 2023, section 3.2: proportional attention.)
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenprune.errors import LeakError
from tokenprune.ops.align import along, token_dim
from tokenprune.ops.kernels.joining import can_join, join_tokens
from tokenprune.ops.matching import Groups, Pairs, groups_of
from tokenprune.ops.moving import gather_aligned, with_prefix

__all__ = [
    "Merged",
    "expand_groups",
    "gather_expanded",
    "gather_merged",
    "merge_groups",
    "put_back_merged",
    "sizes_along",
    "weighted_amax",
    "weighted_attention",
    "weighted_mean",
    "weighted_operand",
    "weighted_softmax",
    "weighted_sum",
]


class Merged(NamedTuple):
    """What is left after a stage.

    Attributes:
        numbers: [B, K] original number of the patch that stands for each remaining one.
        sizes: [B, P + K] how many original tokens each stands for.
        steps: `Groups.moves` of each stage so far that merged something.
    """

    numbers: Tensor
    sizes: Tensor
    steps: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def whole(self) -> bool:
        """Nothing has been merged so far."""
        return len(self.steps) == 0  # `not` of a tuple is nothing that Dynamo traces

    @property
    def rows(self) -> Tensor:
        """[B, N] which of the remaining ones stands for each original patch."""
        rows = self.numbers
        for number, step in enumerate(self.steps):
            rows = groups_of(*step) if number == 0 else groups_of(*step).gather(1, rows)
        return rows


def merge_groups(
    tokens: Float[Tensor, "B L D"], groups: Groups | Pairs, before: Merged | None, num_prefix: int
) -> tuple[Float[Tensor, "B P_plus_K D"], Merged]:
    """The prefix tokens, and the mean of each group, weighted by sizes.

    Args:
        tokens: prefix tokens, then patch tokens.
        groups: of the patch tokens; all of size 1 if K is N.
        before: what the stage before left.
        num_prefix: P.
    """
    batch, length = tokens.shape[:2]
    patches, count = length - num_prefix, groups.kept.shape[1]
    if before is None:
        numbers = torch.arange(patches, device=tokens.device).expand(batch, -1)
        sizes = torch.ones(batch, length, dtype=torch.float32, device=tokens.device)
        before = Merged(numbers, sizes)
    if count == patches:
        return tokens, before
    everyone, joined = groups.moves()
    steps = (*before.steps, (everyone, joined))
    numbers = groups.kept if before.whole else before.numbers.gather(1, groups.kept)
    if can_join(tokens):
        merged, left = join_tokens(tokens, before.sizes, everyone, joined)
        return merged, Merged(numbers, left, steps)
    # A mean is the kept one and its distances to the others: only rows that change are touched.
    rows, to, kept = with_prefix(everyone, num_prefix), joined + num_prefix, num_prefix + count
    given = before.sizes.gather(1, rows)
    sizes = given[:, :kept].scatter_add(1, to, given[:, kept:])
    flat, wide = tokens.flatten(0, 1), torch.promote_types(tokens.dtype, sizes.dtype)
    at = to
    if batch != 1:  # one image has no offset, and small operators count there
        image = torch.arange(batch, device=tokens.device)[:, None]
        rows, at = rows + image * length, to + image * kept
    at = at.flatten()
    merged = flat.index_select(0, rows[:, :kept].flatten()).to(wide)
    gone = flat.index_select(0, rows[:, kept:].flatten())
    share = (given[:, kept:].to(wide) / sizes.gather(1, to)).reshape(-1, 1)
    merged = merged.index_add(0, at, (gone - merged.index_select(0, at)) * share)
    merged = merged.to(tokens.dtype).reshape(batch, kept, tokens.shape[-1])
    return merged, Merged(numbers, sizes, steps)


def expand_groups(
    tokens: Float[Tensor, "B L D"], of: Int[Tensor, "B N"], num_prefix: int
) -> Float[Tensor, "B L D"]:
    """Every patch holds the mean of its group; `of` is the number of the one that stands for it."""
    patches = tokens[:, num_prefix:]
    index = of.unsqueeze(-1).expand_as(patches)
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    summed = torch.zeros_like(wide).scatter_add(1, index, wide)
    count = wide.new_zeros(of.shape).scatter_add(1, of, wide.new_ones(of.shape))
    mean = (summed / count.clamp_min(1).unsqueeze(-1)).gather(1, index)
    return torch.cat([tokens[:, :num_prefix], mean.to(tokens.dtype)], dim=1)


def sizes_along(
    merged: Merged, num_prefix: int, prefix: int, rows_per_image: int
) -> Float[Tensor, "Bf L"] | None:
    """Sizes along a dim that holds `prefix` other tokens, then the patches; None where each token
    stands for itself."""
    if merged.whole:
        return None
    sizes = merged.sizes
    if prefix != num_prefix:  # else what is before the patches are prefix tokens, of size 1
        sizes = F.pad(sizes[:, num_prefix:], (prefix, 0), value=1.0)
    return sizes if rows_per_image == 1 else sizes.repeat_interleave(rows_per_image, 0)


def gather_merged(
    table: Shaped[Tensor, "..."],
    merged: Merged,
    dims: tuple[int, ...],
    prefix: tuple[int, ...],
    rank: int,
    rows_per_image: int = 1,
) -> Shaped[Tensor, "..."]:
    """`gather_aligned` for the patches that stand for groups; the table itself if all do."""
    if merged.whole:
        return table
    numbers = merged.numbers.repeat_interleave(rows_per_image, 0)
    return gather_aligned(table, numbers, dims, prefix, rank)


def gather_expanded(
    table: Shaped[Tensor, "..."],
    of: Int[Tensor, "B N"],
    dims: tuple[int, ...],
    prefix: tuple[int, ...],
    rank: int,
    rows_per_image: int = 1,
) -> Shaped[Tensor, "..."]:
    """`gather_aligned` for tokens that each have the place of the one that stands for them."""
    return gather_aligned(table, of.repeat_interleave(rows_per_image, 0), dims, prefix, rank)


def put_back_merged(
    full: Float[Tensor, "B L D"], tokens: Float[Tensor, "B M D"], merged: Merged, num_prefix: int
) -> Float[Tensor, "B L D"]:
    """Each original token with the value of the one that stands for it."""
    if merged.whole:
        return tokens
    rows = with_prefix(merged.rows, num_prefix)
    return tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def weighted_attention(
    query: Float[Tensor, "Bq *Hq Lq d"],
    key: Float[Tensor, "Bk *Hk Lk d"],
    value: Float[Tensor, "Bv *Hv Lk dv"],
    sizes: Float[Tensor, "B Lk"] | None,
    *,
    attn_mask: Shaped[Tensor, "..."] | None = None,
    is_causal: bool = False,
    own_key: bool = True,
    **options: Any,
) -> Float[Tensor, "B *H Lq dv"]:
    """Attention in which a key of size n counts as n keys: log(n) is added to its logit.

    Raises:
        LeakError: later keys are hidden; merged tokens have no order.
    """
    if sizes is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options
        )
    if is_causal:
        raise LeakError(
            "asked to merge tokens of causal attention, in which a token sees those before it; "
            "merged tokens have no order. Use `mode: remove` for this host."
        )
    shape = (sizes.shape[0], *[1] * (query.ndim - 2), sizes.shape[1])
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = sizes.to(wide).log().to(query.dtype).reshape(shape)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.where(attn_mask, bias, float("-inf"))
    elif attn_mask is not None:
        bias = bias + attn_mask
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)


def weighted_softmax(
    scores: Float[Tensor, "B ..."],
    sizes: Float[Tensor, "B L"] | None,
    dim: int = -1,
    *,
    query_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B ..."]:
    """Softmax in which an entry of size n counts as n of them: the share of each one of the n.

    What reads it over tokens multiplies by sizes (`weighted_operand`, `weighted_sum`).
    """
    if sizes is None:
        return torch.softmax(scores, dim, dtype=dtype)
    if dtype is None:  # whether autocast runs softmax in fp32 depends on the backend
        dtype = torch.softmax(scores.new_zeros(1), 0).dtype
    wide = scores.to(torch.promote_types(dtype, torch.float32))
    counts = along(sizes.to(wide.dtype), scores.ndim, token_dim(scores, sizes, dim))
    # not softmax(scores + log(n)): that is lost beside a mask's most negative number
    parts = (wide - wide.detach().amax(dim, keepdim=True)).exp()
    return (parts / (parts * counts).sum(dim, keepdim=True)).to(dtype)


def weighted_operand(x: Tensor, sizes: Tensor | None, dim: int) -> Tensor:
    """An operand of a contraction over tokens, times their sizes."""
    if sizes is None:
        return x
    return x * along(sizes.to(x.dtype), x.ndim, token_dim(x, sizes, dim))


def weighted_sum(x: Tensor, sizes: Tensor | None, dim: int, keepdim: bool = False) -> Tensor:
    """Sum over tokens, each as often as it stands for one."""
    if sizes is None:
        return x.sum(dim, keepdim=keepdim)
    counts = not x.is_floating_point()  # such as of the real tokens in a padding mask
    wide = x.to(torch.int64 if counts else torch.promote_types(x.dtype, torch.float32))
    weights = along(sizes, x.ndim, token_dim(x, sizes, dim)).to(wide.dtype)
    total = (wide * weights).sum(dim, keepdim=keepdim)
    return total if counts else total.to(x.dtype)


def weighted_mean(x: Tensor, sizes: Tensor | None, dim: int, keepdim: bool = False) -> Tensor:
    """Mean over tokens, each as often as it stands for one."""
    if sizes is None:
        return x.mean(dim, keepdim=keepdim)
    share = sizes / sizes.sum(1, keepdim=True)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weights = along(share, x.ndim, token_dim(x, sizes, dim)).to(wide.dtype)
    return (wide * weights).sum(dim, keepdim=keepdim).to(x.dtype)


def weighted_amax(x: Tensor, sizes: Tensor | None, dim: int, keepdim: bool = False) -> Tensor:
    """A maximum does not depend on how often a value is there."""
    return x.amax(dim, keepdim=keepdim)
