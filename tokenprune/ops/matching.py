"""Which tokens are so similar that one can stand for both."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.ops.kernels.joining import can_join, join_pairs
from tokenprune.ops.selection import indices_of
from tokenprune.private import exporting

__all__ = ["Groups", "Pairs", "as_groups", "bipartite", "groups_of", "similar"]


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

    def moves(self) -> tuple[Tensor, Tensor]:
        """All places [B, N], those of `kept` first; the groups [B, N - K] of the others."""
        stays = torch.zeros_like(self.of).scatter(1, self.kept, 1)
        gone = stays.argsort(dim=1, stable=True)[:, : stays.shape[1] - self.kept.shape[1]]
        return torch.cat([self.kept, gone], dim=1), self.of.gather(1, gone)


class Pairs(NamedTuple):
    """`Groups` of one round, of which a call computes only what it reads.

    Attributes:
        everyone: [B, N] all places, those of `kept` first.
        joined: [B, N - K] the groups of the others.
        cosine: [B, A] of the patches at places start, start + 2, ... and their partners.
        start: 0 or 1.
    """

    everyone: Tensor
    joined: Tensor
    cosine: Tensor
    start: int

    @property
    def kept(self) -> Tensor:
        """As in `Groups`."""
        return self.everyone[:, : self.everyone.shape[1] - self.joined.shape[1]]

    @property
    def of(self) -> Tensor:
        """As in `Groups`."""
        return groups_of(self.everyone, self.joined)

    @property
    def score(self) -> Tensor:
        """As in `Groups`."""
        score = torch.full_like(self.everyone, float("inf"), dtype=self.cosine.dtype)
        places = torch.arange(self.start, score.shape[1], 2, device=score.device)
        return score.index_copy(1, places, -self.cosine)

    def moves(self) -> tuple[Tensor, Tensor]:
        """As in `Groups`."""
        return self.everyone, self.joined


def groups_of(everyone: Int[Tensor, "B N"], joined: Int[Tensor, "B R"]) -> Int[Tensor, "B N"]:
    """The group of each patch, from what `Groups.moves` returns."""
    kept = torch.arange(everyone.shape[1] - joined.shape[1], device=everyone.device)
    kept = kept.expand(everyone.shape[0], -1)  # not len(), which would fix the batch in a file
    rows = torch.cat([kept, joined], dim=1)
    return everyone.scatter(1, everyone, rows)  # each place is written once


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
) -> Groups | Pairs:
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
    if num_keep == length:
        places = torch.arange(length, device=keys.device).expand(keys.shape[0], -1)
        return Groups(places, places, torch.zeros_like(places, dtype=torch.float32))
    most = (length + 1 - first % 2) // 2
    groups: Groups | Pairs = _round(keys, real, first, min(length - num_keep, most))
    last = groups
    while (left := groups.kept.shape[1]) > num_keep:
        rows = last.kept.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        keys = keys.gather(1, rows)
        real = None if real is None else real.gather(1, last.kept)
        last = _round(keys, real, first, min(left - num_keep, (left + 1 - first % 2) // 2))
        kept, of = groups.kept.gather(1, last.kept), last.of.gather(1, groups.of)
        groups = Groups(kept, of, groups.score)
    return groups


def _round(keys: Tensor, real: Tensor | None, first: int, count: int) -> Pairs:
    """Join `count` pairs."""
    batch, length = keys.shape[:2]
    cosine, partner = similar(keys, real, first)
    if can_join(cosine):
        return Pairs(*join_pairs(cosine, partner, length, first % 2, count), cosine, first % 2)
    places = torch.arange(length, device=keys.device)
    even, odd = places[first % 2 :: 2], places[1 - first % 2 :: 2]
    leave, stay = _most_similar(cosine, count)
    gone, joined = even[leave], partner.gather(1, leave) + stay.shape[1]
    everyone = torch.cat([even[stay], odd.expand(batch, -1), gone], dim=1)
    return Pairs(everyone, joined, cosine, first % 2)


def _most_similar(cosine: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the `count` largest of each row, and of the others, ascending."""
    if exporting():  # ONNX's exporter knows no stable sort
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
    count = int(stands[:1].sum()) if of.shape[0] else 1
    kept = stands.to(torch.int64).argsort(dim=1, descending=True, stable=True)[:, :count]
    row = torch.zeros_like(of).scatter(1, kept, everyone[:count].expand(of.shape[0], -1))
    now = everyone.expand(of.shape[0], -1) if numbers is None else numbers
    place = torch.zeros_like(of).scatter(1, now, everyone[: now.shape[1]].expand(of.shape[0], -1))
    score = torch.zeros_like(now, dtype=torch.float32)
    return Groups(place.gather(1, kept), row.gather(1, of.gather(1, now)), score)
