"""What runs at a stage: called from the rewritten graphs, once per stage and forward.

Every path asks the same scorer (`score`) and chooses by the same rule (`choose`). They differ in
what they do with the choice: a decision over all patches, fewer tokens, or rows with padding.

`logits` are keep_logits [B, N', 2] of the N' patches that are still there; `previous` is what the
stage before kept, None at the first. `real` [B, N] is True where a patch is no padding, by original
number; None if no patch is padding.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.ops import selection
from tokenprune.ops.align import policy_of
from tokenprune.ops.fusing import fuse
from tokenprune.ops.gumbel import sample_decision, sample_topk
from tokenprune.ops.kernels.selection import can_keep_above, can_select, keep_above, keep_best
from tokenprune.ops.moving import gather_tokens, poisonous
from tokenprune.ops.spread import spread_decision, with_spread_noise
from tokenprune.rewrite.settings import CallSettings

__all__ = [
    "choose",
    "decide",
    "fill_dropped",
    "forced_set",
    "fuse_gathered",
    "fuse_masked",
    "last_stay",
    "patch_keys",
    "present_gathered",
    "present_jagged",
    "present_masked",
    "score",
    "select_gathered",
    "select_jagged",
]


def score(
    scorer: nn.Module, tokens: Tensor, present: Tensor | None, num_prefix: int, **needed: Any
) -> Tensor:
    """keep_logits of the patches in `tokens` [B, P + N', D]; `present` is [B, N'] 1 where one is
    there and real, None if all are."""
    return scorer(tokens[:, num_prefix:], present, **needed)  # type: ignore[no-any-return]


def last_stay(keep_logits: Tensor, count: int) -> Tensor:
    """keep_logits [B, N', 2] in which no token is before the last `count`, and none of these is
    drawn to leave."""
    scores = keep_logits[..., 0].detach().nan_to_num(0.0)
    best = scores.amax(dim=1, keepdim=True).clamp_min(0.0) + 1.0  # so that none ties
    sure = torch.stack([best, torch.full_like(best, float("-inf"))], dim=-1)
    return torch.cat([keep_logits[:, :-count], sure.expand(-1, count, -1)], dim=1)


def patch_keys(key: Tensor, key_dim: int, num_prefix: int, rows_per_image: int) -> Tensor:
    """The keys of the patch tokens, [B, H, N, d], however an attention lays them out."""
    key = key.movedim(key_dim, -2)
    batch = key.shape[0] // rows_per_image
    heads = rows_per_image * math.prod(key.shape[1:-2])  # not -1: there may be no image
    return key.reshape(batch, heads, *key.shape[-2:])[:, :, num_prefix:]


def choose(
    logits: Tensor,
    settings: CallSettings,
    stage: int,
    present: Tensor | None,
    real: Tensor | None,
    numbers: Tensor | None = None,
) -> Tensor:
    """Which tokens stay, where no noise is drawn and no set is forced: [B, N'] bool, as `present`
    (what no earlier stage dropped; None: all) and here `real` are. `numbers` as for
    `select_topk`."""
    logits = with_spread_noise(logits, numbers) if settings.spread else logits
    if settings.threshold is not None:
        return selection.above_threshold(logits, settings.threshold, present, real, numbers)
    ranked = logits if real is None else selection.real_first(logits, real)
    if present is not None:
        ranked = ranked.masked_fill(~present.unsqueeze(-1), float("-inf"))
    return selection.top_k(ranked, settings.num_keep[stage], numbers)


def forced_set(settings: CallSettings, stage: int) -> Tensor | None:
    """The kept set forced on a stage, [B, K]; None if the scorer decides."""
    return None if settings.keep_indices is None else settings.keep_indices[stage]


def present_masked(previous: Tensor | None, real: Tensor | None, tokens: Tensor) -> Tensor | None:
    """[B, N] 1 where a patch was kept by the stage before and is no padding."""
    if previous is None or real is None:
        return previous if real is None else real.to(tokens.dtype)
    return previous * real


def decide(
    logits: Tensor, previous: Tensor | None, settings: CallSettings, stage: int, real: Tensor | None
) -> Tensor:
    """The decision [B, N] about every patch, 0 wherever `previous` [B, N] is."""
    if previous is None:
        previous = logits.new_ones(logits.shape[:2])
    forced = forced_set(settings, stage)
    if forced is not None:
        return selection.one_hot(forced, previous)
    if settings.sample:
        how: dict[str, Any] = {"temperature": settings.temperature, "hard": settings.hard}
        there = previous if real is None else previous * real
        if settings.spread:
            chosen = None
            if settings.fixed or settings.threshold is not None:
                chosen = choose(logits, settings, stage, previous > 0.5, real)
            return spread_decision(logits, there, chosen, **how)
        if settings.fixed:
            count = settings.num_keep[stage]
            return sample_topk(logits, there, count, **how, generator=settings.generator)
        return sample_decision(logits, there, **how, generator=settings.generator)
    return choose(logits, settings, stage, previous > 0.5, real).to(previous.dtype)


def fill_dropped(
    tokens: Tensor, decision: Tensor, settings: CallSettings, num_prefix: int
) -> Tensor:
    """The tokens [B, P + N, D]; `verify` fills dropped ones with NaN and inf to detect leaks."""
    if not settings.poison:
        return tokens
    kept = policy_of(decision, num_prefix).unsqueeze(-1) > 0.5
    return torch.where(kept, tokens, poisonous(tokens))


def _real_there(real: Tensor | None, numbers: Tensor | None) -> Tensor | None:
    """`real` for the patches that are still there."""
    return real if real is None or numbers is None else real.gather(1, numbers.clamp_min(0))


def _own_numbers(logits: Tensor) -> Tensor:
    """[B, N]: before the first stage, patch i is number i."""
    batch, patches = logits.shape[:2]
    return torch.arange(patches, device=logits.device).expand(batch, -1)


def present_gathered(previous: Tensor | None, real: Tensor, tokens: Tensor) -> Tensor:
    """[B, N'] 1 where one of the patches that are still there is no padding."""
    return (real if previous is None else real.gather(1, previous)).to(tokens.dtype)


def select_gathered(
    tokens: Tensor,
    logits: Tensor,
    previous: Tensor | None,
    settings: CallSettings,
    stage: int,
    num_prefix: int,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Remove the patches that are not kept.

    Args:
        tokens: [B, P + N', D].
        previous: [B, N'] their original numbers.

    Returns:
        tokens [B, P + K, D], and their numbers [B, K], ascending.
    """
    if settings.keep_indices is None:
        num_keep = settings.num_keep[stage]
        if num_keep == logits.shape[1]:
            return tokens, _own_numbers(logits) if previous is None else previous
        ranked = _ranked(logits, settings, previous, real)
        if can_select(tokens, ranked):
            return keep_best(tokens, ranked[..., 0], previous, num_keep, num_prefix)
    places = _places(logits, previous, settings, stage, real)
    kept = places if previous is None else previous.gather(1, places)
    return gather_tokens(tokens, places, num_prefix), kept


def _ranked(
    logits: Tensor, settings: CallSettings, previous: Tensor | None, real: Tensor | None
) -> Tensor:
    there = _real_there(real, previous)
    logits = with_spread_noise(logits, previous) if settings.spread else logits
    return logits if there is None else selection.real_first(logits, there)


def _places(
    logits: Tensor, previous: Tensor | None, settings: CallSettings, stage: int, real: Tensor | None
) -> Tensor:
    """The places [B, K] of the patches that stay among those that are there, ascending."""
    forced = forced_set(settings, stage)
    if forced is None:
        ranked = _ranked(logits, settings, previous, real)
        return selection.select_topk(ranked, settings.num_keep[stage], previous)
    numbers = _own_numbers(logits) if previous is None else previous
    return torch.searchsorted(numbers.contiguous(), forced.to(numbers.device).contiguous())


def fuse_gathered(
    tokens: Tensor,
    logits: Tensor,
    previous: Tensor | None,
    settings: CallSettings,
    stage: int,
    num_prefix: int,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `select_gathered`; the patches that leave go on as one."""
    places = _places(logits, previous, settings, stage, real)
    kept = places if previous is None else previous.gather(1, places)
    left = gather_tokens(tokens, places, num_prefix)
    if places.shape[1] == logits.shape[1]:
        return left, kept
    stays = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    stays = stays.scatter(1, places, True)
    there = _real_there(real, previous)
    fused, place = fuse(tokens[:, num_prefix:], logits[..., 0], stays, there)
    row = num_prefix + stays.cumsum(1).gather(1, place) - 1
    return _with_row(left, row, fused), kept


def fuse_masked(
    tokens: Tensor, logits: Tensor, decision: Tensor, present: Tensor | None, num_prefix: int
) -> Tensor:
    """The tokens [B, P + N, D], one of them the sum of those that leave; `present` [B, N]."""
    there = None if present is None else present > 0.5
    fused, place = fuse(tokens[:, num_prefix:], logits[..., 0], decision > 0.5, there)
    return _with_row(tokens, num_prefix + place, fused)


def _with_row(tokens: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """`tokens` [B, L, D] with one row [B, 1] of each image replaced by `value` [B, D]."""
    index = row.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    return tokens.scatter(1, index, value.to(tokens.dtype).unsqueeze(1))


def present_jagged(
    numbers: Tensor | None, counts: Sequence[int] | None, real: Tensor | None, tokens: Tensor
) -> Tensor | None:
    """[B, N'] 1 where a row holds a token, and one that is no padding of the host's own; None
    where all do."""
    seen = _real_there(real, numbers)
    if numbers is not None and counts:
        seen = numbers >= 0 if seen is None else seen & (numbers >= 0)
    return None if seen is None else seen.to(tokens.dtype)


def select_jagged(
    logits: Tensor,
    previous: Tensor | None,
    counts: Sequence[int] | None,
    settings: CallSettings,
    stage: int,
    real: Tensor | None,
    forced: Tensor | None,
) -> "Jagged":
    """Choose the patches of each image that stay; `take_chosen` then removes the others.

    Args:
        previous: [B, N'] original numbers, -1 where a row holds no token; N' is the most
            that an image has.
        counts: How many each image had; empty where all had N'.
        forced: The forced set of these images, if there is one.

    Returns:
        See `Jagged`.
    """
    plain = forced is None and real is None and not settings.spread
    if plain and settings.threshold is not None and can_keep_above(logits[..., 0]):
        return _cut(*keep_above(logits[..., 0], previous, math.log(settings.threshold)))
    numbers = _own_numbers(logits) if previous is None else previous
    if forced is not None:
        last = torch.iinfo(numbers.dtype).max  # after all numbers, as padding is
        ascending = torch.where(numbers < 0, last, numbers).contiguous()
        forced = forced.to(numbers.device, torch.int64)
        places = torch.where(forced < 0, -1, torch.searchsorted(ascending, forced.contiguous()))
    else:
        present = numbers >= 0 if counts else None
        wanted = choose(logits, settings, stage, present, _real_there(real, numbers), numbers)
        places = selection.kept_first(wanted)
    kept = torch.where(places < 0, -1, numbers.gather(1, places.clamp_min(0)))
    return _cut(places, kept, (places >= 0).sum(1))


class Jagged(NamedTuple):
    """What each image keeps at a stage.

    Attributes:
        known: How many, for Python; empty where all keep K.
        counts: [B] how many.
        places: [B, K] of the chosen ones among those that were there: ascending, then -1 where an
            image keeps fewer than the one that keeps most.
        numbers: [B, K] their original numbers, and -1.
    """

    known: tuple[int, ...]
    counts: Tensor
    places: Tensor
    numbers: Tensor


def _cut(places: Tensor, kept: Tensor, counts: Tensor) -> Jagged:
    """Rows as long as the longest. Reads values, and so waits for a GPU."""
    known = tuple(counts.tolist())
    longest = max(known, default=1)  # no image: as if it kept its best token
    same = min(known, default=1) == longest
    return Jagged(() if same else known, counts, places[:, :longest], kept[:, :longest])
