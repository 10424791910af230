"""Which tokens stay."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.private import exporting

__all__ = [
    "above_threshold",
    "in_order",
    "indices_of",
    "kept_first",
    "one_hot",
    "real_first",
    "real_patches",
    "select_topk",
    "tie_order",
    "top_k",
]

TIES = 2**20
"""More than an image has tokens; float32 holds every whole number up to here."""
GOLDEN = 648055
"""The golden ratio's fraction in steps of 1 / TIES. It is odd, so no two numbers tie."""


def tie_order(numbers: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Which of equal scores wins, by the original number of a token: the largest; -1 for padding.

    Multiples of the golden ratio, modulo 1 and in steps of 2^-20. Any count of the first ones is
    spread evenly over a row of tokens and over a grid of them, and later stages keep some of the
    same. A large image part is then never dropped as a whole, as it is if the lower number wins.
    """
    return torch.where(numbers < 0, -1, numbers * GOLDEN % TIES)


def top_k(
    keep_logits: Float[Tensor, "B N 2"], num_keep: int, numbers: Int[Tensor, "B N"] | None = None
) -> Bool[Tensor, "B N"]:
    """The `num_keep` tokens of each image with the highest keep score; see `select_topk`."""
    best = _best(keep_logits, num_keep, numbers)
    chosen = torch.zeros(keep_logits.shape[:2], dtype=torch.bool, device=keep_logits.device)
    return chosen.scatter(1, best, True)


def _best(
    keep_logits: Float[Tensor, "B N 2"], num_keep: int, numbers: Int[Tensor, "B N"] | None
) -> Int[Tensor, "B K"]:
    """Places of the best tokens, in any order.

    A first `topk` finds the lowest score that stays, a second one picks over distinct numbers: so
    nothing is left to the order in which a backend meets ties.
    """
    score = _score(keep_logits, num_keep)
    lowest = score.topk(num_keep, dim=1).values[:, -1:]
    if numbers is None:
        numbers = torch.arange(score.shape[1], device=score.device).unsqueeze(0)
    ties = tie_order(numbers).to(torch.float32)
    ranked = torch.where(score == lowest, ties, torch.where(score > lowest, float(TIES), -2.0))
    return ranked.topk(num_keep, dim=1).indices


def _score(keep_logits: Float[Tensor, "B N 2"], num_keep: int) -> Float[Tensor, "B N"]:
    """The finite score of each token, once `num_keep` was checked."""
    num_patches = keep_logits.shape[1]
    if not 1 <= num_keep <= num_patches:
        raise PlanError(
            f"asked to keep {num_keep} tokens, found {num_patches} patch tokens; "
            f"choose a count from 1 to {num_patches}"
        )
    limits = torch.finfo(keep_logits.dtype)
    return torch.nan_to_num(
        keep_logits[..., 0], nan=limits.min, posinf=limits.max, neginf=limits.min
    )


def select_topk(
    keep_logits: Float[Tensor, "B N 2"], num_keep: int, numbers: Int[Tensor, "B N"] | None = None
) -> Int[Tensor, "B K"]:
    """Places of the `num_keep` tokens of each image with the highest keep score, ascending.

    The score is `keep_logits[..., 0]`. Of equal scores `tie_order` says which win, on every backend
    and whatever tokens are still there.

    Args:
        keep_logits: log-probabilities, keep first. NaN counts as the lowest score.
        num_keep: K, from 1 to N.
        numbers: original numbers of the tokens, -1 for padding; None if token i is number i.

    Raises:
        PlanError: `num_keep` is not in 1..N.
    """
    best = _best(keep_logits, num_keep, numbers)
    if exporting():  # ONNX's exporter knows no sort
        return -(-best).topk(num_keep, dim=1).values
    return best.sort(dim=1).values


def indices_of(chosen: Bool[Tensor, "B N"], count: int) -> Int[Tensor, "B K"]:
    """The `count` places of each row where `chosen` is true, ascending.

    Without a sort, which ONNX's exporter does not know.
    """
    length = chosen.shape[1]
    # Chosen places get N..1 and the others 0..-N, so descending rank is ascending index.
    position = torch.arange(length, device=chosen.device, dtype=torch.float32)
    return (chosen.to(torch.float32) * length - position).topk(count, dim=1).indices


def real_patches(mask: Shaped[Tensor, "B L"], num_patches: int) -> Bool[Tensor, "B N"]:
    """True where a patch token is no padding, from a mask over all tokens or over the patches."""
    return mask[:, mask.shape[1] - num_patches :] > 0


def real_first(
    keep_logits: Float[Tensor, "B N 2"], real: Bool[Tensor, "B N"]
) -> Float[Tensor, "B N 2"]:
    """Scores in which every padded token ranks below every real one.

    But above -inf, which marks tokens that were dropped before.
    """
    lowest = torch.finfo(keep_logits.dtype).min
    scores = torch.nan_to_num(keep_logits, nan=lowest / 4, neginf=lowest / 4)
    return torch.where(real.unsqueeze(-1), scores.clamp_min(lowest / 4), lowest / 2)


def above_threshold(
    keep_logits: Float[Tensor, "B N 2"],
    threshold: float,
    there: Shaped[Tensor, "B N"] | None = None,
    real: Shaped[Tensor, "B N"] | None = None,
    numbers: Int[Tensor, "B N"] | None = None,
) -> Bool[Tensor, "B N"]:
    """The tokens whose keep probability is above a threshold; the best one of each image anyway.

    NaN counts as the lowest score. `there` are the tokens that no earlier stage dropped, `real`
    those that are no padding of the host's own; only an image without a real token keeps another.
    `numbers` as for `select_topk`: of equal best tokens one is kept.
    """
    ranked = keep_logits if real is None else real_first(keep_logits, real)
    wanted = keep_logits[..., 0] > math.log(threshold)
    if real is not None:
        wanted = wanted & real.bool()
    if there is not None:
        wanted = wanted & there.bool()
        ranked = ranked.masked_fill(~there.bool().unsqueeze(-1), float("-inf"))
    best = torch.zeros_like(wanted).scatter(1, select_topk(ranked, 1, numbers), True)
    return torch.where(wanted.any(1, keepdim=True), wanted, best)


def kept_first(wanted: Bool[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """The places of the wanted tokens, ascending, then -1."""
    order = torch.argsort((~wanted).to(torch.uint8), dim=1, stable=True)
    places = torch.arange(wanted.shape[1], device=wanted.device)
    return torch.where(places < wanted.sum(1, keepdim=True), order, -1)


def in_order(keep_indices: Shaped[Tensor, "B K"]) -> Shaped[Tensor, "B K"]:
    """Each row ascending, with what is below 0 at its end."""
    ordered = keep_indices.sort(dim=1).values
    return ordered.gather(1, torch.argsort((ordered < 0).to(torch.uint8), dim=1, stable=True))


def one_hot(numbers: Int[Tensor, "B K"], like: Shaped[Tensor, "B N"]) -> Shaped[Tensor, "B N"]:
    """1 at the kept tokens, 0 elsewhere, in shape and type of `like`."""
    numbers = numbers.to(like.device, torch.int64)
    length = like.shape[1]
    wide = like.new_zeros(like.shape[0], length + 1)  # padding goes to one more place at the end
    return wide.scatter(1, torch.where(numbers < 0, length, numbers), 1.0)[:, :length]
