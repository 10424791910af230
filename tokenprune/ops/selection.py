"""Which tokens stay, and moving them out and back."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tokenprune.errors import KeepIndicesError, PlanError

__all__ = [
    "check_keep_indices",
    "gather_aligned",
    "gather_tokens",
    "indices_of",
    "scatter_tokens",
    "select_topk",
]


def select_topk(keep_logits: Float[Tensor, "B N 2"], num_keep: int) -> Int[Tensor, "B K"]:
    """The `num_keep` tokens of each image with the highest keep score, in their own order.

    The score is `keep_logits[..., 0]`. Of equal scores the lower index wins, on every backend:
    `topk` finds the threshold, and a second `topk` over distinct numbers does the picking, so
    nothing is left to the order in which a backend meets ties. No sort, so it exports.

    Args:
        keep_logits: log-probabilities, keep first. NaN counts as the lowest score.
        num_keep: K, from 1 to N.

    Returns:
        Indices of patch tokens, ascending and unique.

    Raises:
        PlanError: `num_keep` is not in 1..N.
    """
    num_patches = keep_logits.shape[1]
    if not 1 <= num_keep <= num_patches:
        raise PlanError(
            f"asked to keep {num_keep} tokens, found {num_patches} patch tokens; "
            f"choose a count from 1 to {num_patches}"
        )
    limits = torch.finfo(keep_logits.dtype)
    score = torch.nan_to_num(
        keep_logits[..., 0], nan=limits.min, posinf=limits.max, neginf=limits.min
    )
    threshold = score.topk(num_keep, dim=1).values[:, -1:]
    above, level = score > threshold, score == threshold
    room = num_keep - above.sum(1, keepdim=True)
    return indices_of(above | (level & (level.to(torch.int64).cumsum(1) <= room)), num_keep)


def indices_of(chosen: Bool[Tensor, "B N"], count: int) -> Int[Tensor, "B K"]:
    """Where `chosen` is true, ascending; without a sort, which ONNX's exporter does not know.

    Args:
        count: K, how many are true in each row.
    """
    length = chosen.shape[1]
    # Chosen places get N..1 and the others 0..-N, so descending rank is ascending index.
    position = torch.arange(length, device=chosen.device, dtype=torch.float32)
    return (chosen.to(torch.float32) * length - position).topk(count, dim=1).indices


def _with_prefix(keep_indices: Int[Tensor, "B K"], prefix: int) -> Int[Tensor, "B P_plus_K"]:
    """Positions in the sequence: the prefix tokens, then the kept patches behind them."""
    if prefix == 0:
        return keep_indices
    first = torch.arange(prefix, device=keep_indices.device, dtype=keep_indices.dtype)
    return torch.cat([first.expand(keep_indices.shape[0], -1), keep_indices + prefix], dim=1)


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
    return _take(x.unsqueeze(1), _with_prefix(keep_indices, num_prefix)).squeeze(1)


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
        raise PlanError(f"each token dim needs one prefix count; {found}")
    if offset < 0 or any(place == 0 for place, _ in places):
        raise PlanError(
            f"asked to gather for {batch} images at rank {rank}, which leaves no dim for the "
            f"batch; {found}; pass the rank of the tensor it is combined with"
        )
    if shape[0] not in (1, batch):
        raise PlanError(
            f"asked to gather for {batch} images; {found}: dim 0 must be 1 or {batch} "
            f"once the table has rank {rank}"
        )
    out = table.reshape(shape)
    if len(places) == 2 and places[1][0] == places[0][0] + 1:
        (first, first_prefix), (second, second_prefix) = places
        rows = _with_prefix(keep_indices, first_prefix)
        columns = _with_prefix(keep_indices, second_prefix)
        index = (rows[:, :, None] * shape[second] + columns[:, None, :]).reshape(batch, -1)
        taken = _take_at(out.flatten(first, second), index, first)
        square = (rows.shape[1], columns.shape[1])
        return taken.reshape(batch, *shape[1:first], *square, *shape[second + 1 :])
    for place, count in places:
        out = _take_at(out, _with_prefix(keep_indices, count), place)
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
    full: Float[Tensor, "B N D"],
    kept: Float[Tensor, "B K D"],
    keep_indices: Int[Tensor, "B K"],
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


def check_keep_indices(
    keep_indices: Tensor,
    *,
    batch_size: int,
    num_patches: int,
    num_keep: int | None = None,
    padded: bool = False,
) -> None:
    """Check a kept set that came from outside; reads values, so not for use inside a graph.

    Args:
        keep_indices: what should be [B, K], unique for each image, in 0..N-1; any order.
        batch_size: B.
        num_patches: N.
        num_keep: K, or None for any from 1 to N.
        padded: -1 may stand where an image keeps fewer than others, but one token at least.

    Raises:
        KeepIndicesError: it is not that. The message names the image and the value.
    """
    if keep_indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise KeepIndicesError(
            f"keep_indices must hold integers, found {keep_indices.dtype}; "
            "a mask becomes indices with mask.nonzero()"
        )
    shape = tuple(keep_indices.shape)
    wanted = num_keep if num_keep is not None else f"K from 1 to {num_patches}"
    fits = len(shape) == 2 and shape[0] == batch_size and 1 <= shape[1] <= num_patches
    if not fits or (num_keep is not None and shape[1] != num_keep):
        raise KeepIndicesError(
            f"keep_indices must have the shape [{batch_size}, {wanted}], found {list(shape)}; "
            "pass one row of patch indices for each image"
        )
    lowest = -1 if padded else 0
    outside = (keep_indices < lowest) | (keep_indices >= num_patches)
    if outside.any():
        image, column = (int(i) for i in outside.nonzero()[0])
        raise KeepIndicesError(
            f"keep_indices of image {image} hold {int(keep_indices[image, column])}, but there are "
            f"{num_patches} patch tokens; use 0 to {num_patches - 1} (prefix tokens do not count)"
        )
    ordered = keep_indices.sort(dim=1).values
    empty = ordered[:, -1] < 0
    if empty.any():
        raise KeepIndicesError(
            f"keep_indices of image {int(empty.nonzero()[0])} name no token; keep one at least"
        )
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        image, column = (int(i) for i in twice.nonzero()[0])
        raise KeepIndicesError(
            f"keep_indices of image {image} hold {int(ordered[image, column])} twice; "
            "name each token once"
        )
