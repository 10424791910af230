"""Move tokens out, in place again, and everything that is aligned with them."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.ops.align import is_kept, policy_of

__all__ = [
    "first_rows",
    "gather_aligned",
    "gather_table",
    "gather_tokens",
    "length_after",
    "poisonous",
    "put_back",
    "put_back_masked",
    "scatter_tokens",
    "with_prefix",
]


def with_prefix(keep_indices: Int[Tensor, "B K"], prefix: int) -> Int[Tensor, "B P_plus_K"]:
    """Positions in the sequence: the prefix tokens, then the kept patches."""
    if prefix == 0:
        return keep_indices
    if prefix == 1:
        return F.pad(keep_indices + 1, (1, 0))
    first = torch.arange(prefix, device=keep_indices.device, dtype=keep_indices.dtype)
    return torch.cat([first.expand(keep_indices.shape[0], -1), keep_indices + prefix], dim=1)


def first_rows(x: Shaped[Tensor, "..."], dim: int, rows: int) -> Shaped[Tensor, "..."]:
    """The first rows along a dim, as a view."""
    return x.narrow(dim, 0, rows)


def _take(table: Shaped[Tensor, "b M n D"], index: Int[Tensor, "B k"]) -> Shaped[Tensor, "B M k D"]:
    """`out[b, m, k, :] = table[b, m, index[b, k], :]`, a table of batch 1 being everybody's.

    Whole rows are copied by index_select where there are rows: many times faster on CPU than
    `gather` with an expanded index.
    """
    own, groups, length, width = table.shape
    batch, count = index.shape
    if width == 1:
        shared = table.squeeze(3).expand(batch, -1, -1)
        return shared.gather(2, index[:, None].expand(-1, groups, -1)).unsqueeze(3)
    group = torch.arange(groups, device=index.device)[None, :, None]
    if own != 1:
        group = group + torch.arange(own, device=index.device)[:, None, None] * groups
    rows = (index[:, None] + group * length).reshape(-1)
    return table.reshape(-1, width).index_select(0, rows).reshape(batch, groups, count, width)


def gather_tokens(
    x: Float[Tensor, "B L D"], keep_indices: Int[Tensor, "B K"], num_prefix: int
) -> Float[Tensor, "B P_plus_K D"]:
    """Keep the prefix tokens and the chosen patches of each image; the others leave.

    Args:
        x: prefix tokens, then patch tokens.
        keep_indices: positions among the patch tokens, ascending.
        num_prefix: P, how many tokens at the front always stay.
    """
    batch, length, width = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * length
    rows = with_prefix(keep_indices, num_prefix) + first
    return x.reshape(-1, width).index_select(0, rows.reshape(-1)).reshape(*rows.shape, width)


def gather_aligned(
    table: Shaped[Tensor, "..."],
    keep_indices: Int[Tensor, "B K"],
    dims: tuple[int, ...],
    prefix: tuple[int, ...],
    rank: int,
) -> Shaped[Tensor, "B ..."]:
    """Gather a token-aligned tensor for each image: a RoPE table, a position bias, a mask.

    Args:
        table: a tensor some of whose dims count tokens, such as [L, d], [H, L, L], [B, 1, L, L].
        keep_indices: positions among the patch tokens, ascending.
        dims: the token dims of `table`.
        prefix: how many entries come before the patches on each of `dims`; they always stay.
        rank: rank of the tensor the table will be combined with. Broadcasting lines dims up from
            the right, so the table gets dims of size 1 on the left up to this rank.

    Returns:
        A tensor of rank `rank`, the batch at dim 0, prefix + K entries on each token dim. A padded
        table whose dim 0 is B was one table an image already; one of 1 is shared by all.

    Raises:
        PlanError: dims and prefix disagree, the rank leaves no place for the batch, or dim 0 of
            the padded table is neither 1 nor B.
    """
    batch = keep_indices.shape[0]
    shape = (1,) * (rank - table.ndim) + tuple(table.shape)
    offset = rank - table.ndim
    places = sorted(zip((dim % max(table.ndim, 1) + offset for dim in dims), prefix, strict=False))
    found = f"found a table of shape {tuple(table.shape)}, dims {dims}, prefix {prefix}"
    if len(dims) != len(prefix) or len({place for place, _ in places}) != len(dims):
        raise PlanError(f"each token dim needs one prefix count; {found}. Give as many as dims")
    if offset < 0 or any(place == 0 for place, _ in places):
        raise PlanError(
            f"asked to gather for {batch} images at rank {rank}, which leaves no dim for the "
            f"batch; {found}; pass the rank of the tensor it is combined with"
        )
    if shape[0] not in (1, batch):
        raise PlanError(
            f"asked to gather for {batch} images; {found}: dim 0 must be 1 or {batch} "
            f"once the table has rank {rank}. Pass a table for one image or for all"
        )
    out = table.reshape(shape)
    if len(places) == 2 and places[1][0] == places[0][0] + 1:
        (first, first_prefix), (second, second_prefix) = places
        rows = with_prefix(keep_indices, first_prefix)
        columns = with_prefix(keep_indices, second_prefix)
        index = rows[:, :, None] * shape[second] + columns[:, None, :]
        taken = _take_at(out.flatten(first, second), index.flatten(1), first)
        return taken.reshape(*taken.shape[:first], *index.shape[1:], *taken.shape[first + 1 :])
    for place, count in places:
        out = _take_at(out, with_prefix(keep_indices, count), place)
    return out.expand(batch, *out.shape[1:])


def _take_at(
    table: Shaped[Tensor, "b ..."], index: Int[Tensor, "B k"], dim: int
) -> Shaped[Tensor, "B ..."]:
    """`_take` along `dim` of a table of any rank."""
    before, after = tuple(table.shape[1:dim]), tuple(table.shape[dim + 1 :])
    flat = table.flatten(dim + 1) if after else table.unsqueeze(-1)
    flat = flat.flatten(1, dim - 1) if before else flat.unsqueeze(1)
    return _take(flat, index).reshape(index.shape[0], *before, index.shape[1], *after)


def scatter_tokens(
    full: Float[Tensor, "B N D"], kept: Float[Tensor, "B K D"], keep_indices: Int[Tensor, "B K"]
) -> Float[Tensor, "B N D"]:
    """Put tokens back where they came from: a new tensor, `full` at all other places.

    Args:
        full: the tokens before they were gathered.
        kept: new values of the gathered ones.
        keep_indices: their positions in `full`, unique for each image.

    Returns:
        A tensor of the wider dtype of the two.
    """
    dtype = torch.promote_types(full.dtype, kept.dtype)
    index = keep_indices.unsqueeze(-1).expand_as(kept)
    return full.to(dtype).scatter(1, index, kept.to(dtype))


def gather_table(
    table: Shaped[Tensor, "..."],
    keep_indices: Int[Tensor, "B K"],
    dims: tuple[int, ...],
    prefix: tuple[int, ...],
    rank: int,
    rows_per_image: int = 1,
) -> Shaped[Tensor, "..."]:
    """`gather_aligned`; the table itself if every token is kept, so that nothing changes at all."""
    if all(table.shape[d] == p + keep_indices.shape[1] for d, p in zip(dims, prefix, strict=True)):
        return table
    if rows_per_image > 1:
        keep_indices = keep_indices.repeat_interleave(rows_per_image, 0)
    return gather_aligned(table, keep_indices, dims, prefix, rank)


def length_after(
    shape: torch.Size | int, kept: Any, dims: tuple[tuple[int, int], ...]
) -> tuple[int, ...] | int:
    """The shape of a table once it is gathered: prefix + K along each (dim, prefix) of `dims`. Of
    one number, what it is then."""
    if isinstance(shape, int):
        return dims[0][1] + int(kept.shape[1])
    along = {dim: prefix + kept.shape[1] for dim, prefix in dims}
    return tuple(along.get(dim, n) for dim, n in enumerate(shape))


def put_back(
    full: Float[Tensor, "B L D"],
    tokens: Float[Tensor, "B M D"],
    keep_indices: Int[Tensor, "B K"],
    num_prefix: int,
) -> Float[Tensor, "B L D"]:
    """`full` with its prefix and kept tokens replaced by `tokens`, M = P + K; `tokens` themselves
    if all are kept."""
    if tokens.shape[1] == full.shape[1]:
        return tokens
    patches = scatter_tokens(full[:, num_prefix:], tokens[:, num_prefix:], keep_indices)
    return torch.cat([tokens[:, :num_prefix].to(patches.dtype), patches], dim=1)


def put_back_masked(
    full: Float[Tensor, "B L D"],
    tokens: Float[Tensor, "B L D"],
    decision: Float[Tensor, "B N"],
    num_prefix: int,
) -> Float[Tensor, "B L D"]:
    """The mask path's `put_back`: `tokens` where kept, `full` where dropped.

    The decision's gradient at a token is <g, tokens - full>: what it would have been worth to keep.
    """
    policy = policy_of(decision, num_prefix)
    whole = torch.where(is_kept(policy).unsqueeze(-1), tokens, full)
    if not (torch.is_grad_enabled() and decision.requires_grad):
        return whole
    worth = (tokens - full).detach()
    worth = torch.where(worth.isfinite(), worth, 0.0)  # dropped tokens may hold anything
    return whole + (policy - policy.detach()).to(whole.dtype).unsqueeze(-1) * worth


def poisonous(x: Float[Tensor, "... D"]) -> Float[Tensor, " D"]:
    """NaN and inf in turn, one row as wide as `x`: filler that `verify` uses to detect leaks."""
    odd = torch.arange(x.shape[-1], device=x.device) % 2 == 1
    return torch.where(odd, x.new_tensor(float("inf")), x.new_tensor(float("nan")))
