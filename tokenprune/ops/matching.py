"""Which tokens are so similar that one can stand for both."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.ops.selection import indices_of

__all__ = ["Groups", "as_groups", "bipartite", "similar"]


class Groups(NamedTuple):
    """N patches in K groups.

    Attributes:
        kept: [B, K] place of the patch that stands for each group.
        of: [B, N] the group of each patch, from 0 to K - 1.
        score: [B, N] the larger, the later a patch would be joined to another; inf where it had no
            partner to be compared with.
    """

    kept: Tensor
    of: Tensor
    score: Tensor


def similar(
    keys: Float[Tensor, "B N d"], real: Bool[Tensor, "B N"] | None, first: int
) -> tuple[Float[Tensor, "B A"], Int[Tensor, "B A"]]:
    """The best partner of every second token, among the others, and how similar they are.

    ToMe (Bolya et al., 2023), section 3.2: tokens at even places of the sequence are compared with
    those at odd places, by the cosine of their keys.

    Args:
        keys: of the patches.
        real: False where a patch is padding, which joins padding alone, before anything else.
        first: place of the first patch in the sequence: how many prefix tokens there are.

    Returns:
        The cosine, and the partner's number among the patches at odd places.
    """
    keys = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    mine, other = keys[:, first % 2 :: 2], keys[:, 1 - first % 2 :: 2]
    cosines = mine @ other.mT
    if real is not None:
        mine_real, other_real = real[:, first % 2 :: 2, None], real[:, None, 1 - first % 2 :: 2]
        cosines = cosines.masked_fill(mine_real != other_real, -2.0)
        cosines = cosines.masked_fill(~mine_real & ~other_real, 2.0)
    best = cosines.max(dim=-1)
    return best.values, best.indices


def bipartite(
    keys: Float[Tensor, "B N d"], real: Bool[Tensor, "B N"] | None, first: int, num_keep: int
) -> Groups:
    """The groups that are left when the `N - num_keep` most similar pairs are joined.

    A round joins at most all tokens at even places; where more must go, another one follows, in
    which a group is compared by the key of the patch that stands for it. The order afterwards is
    ToMe's: tokens at even places that are left, in order, then those at odd places.

    Raises:
        PlanError: `num_keep` is not in 1..N.
    """
    length = keys.shape[1]
    if not 1 <= num_keep <= length:
        raise PlanError(
            f"asked to merge {length} patch tokens into {num_keep}; choose a count from 1 to "
            f"{length}"
        )
    places = torch.arange(length, device=keys.device).expand(keys.shape[0], -1)
    groups = Groups(places, places, places.new_zeros(places.shape, dtype=torch.float32))
    while (left := groups.kept.shape[1]) > num_keep:
        joined = _round(keys, real, first, min(left - num_keep, (left + 1 - first % 2) // 2))
        score = joined.score if left == length else groups.score
        kept = groups.kept.gather(1, joined.kept)
        groups = Groups(kept, joined.of.gather(1, groups.of), score)
        rows = joined.kept.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        keys = keys.gather(1, rows)
        real = None if real is None else real.gather(1, joined.kept)
    return groups


def _round(keys: Tensor, real: Tensor | None, first: int, count: int) -> Groups:
    """Join `count` pairs."""
    batch, length = keys.shape[:2]
    places = torch.arange(length, device=keys.device)
    even, odd = places[first % 2 :: 2], places[1 - first % 2 :: 2]
    cosine, partner = similar(keys, real, first)
    leave, stay = _most_similar(cosine, count)
    kept = torch.cat([even[stay], odd.expand(batch, -1)], dim=1)
    rows = torch.arange(kept.shape[1], device=keys.device).expand(batch, -1)
    of = torch.zeros(batch, length, dtype=torch.int64, device=keys.device).scatter(1, kept, rows)
    theirs = partner.gather(1, leave) + stay.shape[1]
    score = torch.full_like(of, float("inf"), dtype=cosine.dtype)
    score = score.index_copy(1, even, -cosine)
    return Groups(kept, of.scatter(1, even[leave], theirs), score)


def _most_similar(cosine: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the `count` largest of each row, and of the others, ascending."""
    if torch.compiler.is_exporting():  # ONNX's exporter knows no stable sort
        chosen = _first_largest(cosine, count)
        return indices_of(chosen, count), indices_of(~chosen, cosine.shape[1] - count)
    order = cosine.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count], order[:, count:].sort(dim=1).values


def _first_largest(cosine: Tensor, count: int) -> Tensor:
    """True at the `count` largest of each row; of equal ones the lower index wins."""
    limits = torch.finfo(cosine.dtype)
    cosine = torch.nan_to_num(cosine, nan=limits.min, posinf=limits.max, neginf=limits.min)
    lowest = cosine.topk(count, dim=1).values[:, -1:]
    above, level = cosine > lowest, cosine == lowest
    room = count - above.sum(1, keepdim=True)
    return above | (level & (level.to(torch.int64).cumsum(1) <= room))


def as_groups(of: Int[Tensor, "B N"], numbers: Int[Tensor, "B M"] | None) -> Groups:
    """Groups given from outside, of the patches that are there.

    Args:
        of: for each original patch the number of the one that stands for it; as many groups in
            every image.
        numbers: original numbers of those that are there; None if all are.
    """
    everyone = torch.arange(of.shape[1], device=of.device)
    stands = of == everyone
    count = int(stands[:1].sum()) if len(of) else 1
    kept = stands.to(torch.int64).argsort(dim=1, descending=True, stable=True)[:, :count]
    row = torch.zeros_like(of).scatter(1, kept, everyone[:count].expand(len(of), -1))
    now = everyone.expand(len(of), -1) if numbers is None else numbers
    place = torch.zeros_like(of).scatter(1, now, everyone[: now.shape[1]].expand(len(of), -1))
    score = torch.zeros_like(now, dtype=torch.float32)
    return Groups(place.gather(1, kept), row.gather(1, of.gather(1, now)), score)
