"""What runs at a stage: called from the rewritten graphs, once per stage and forward.

Every path asks the same scorer (`score`) and chooses by the same rule (`choose`). They differ in
what they do with the choice: a decision over all patches, fewer tokens, or rows with padding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.ops.align import policy_of
from tokenprune.ops.gumbel import sample_decision
from tokenprune.ops.moving import gather_tokens, poisonous
from tokenprune.ops.selection import (
    above_threshold,
    has_padding,
    indices_of,
    kept_first,
    one_hot,
    real_first,
    top_k,
)
from tokenprune.rewrite.settings import CallSettings

__all__ = [
    "choose",
    "decide",
    "fill_dropped",
    "forced_set",
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
    """keep_logits [B, N, 2] of the patch tokens among `tokens` [B, P + N, D].

    Args:
        present: [B, N] 1 where a patch is there and real; None if all are.
        needed: What else the scorer reads.
    """
    return scorer(tokens[:, num_prefix:], present, **needed)  # type: ignore[no-any-return]


def patch_keys(key: Tensor, key_dim: int, num_prefix: int, rows_per_image: int) -> Tensor:
    """The keys of the patch tokens, [B, H, N, d], however an attention lays them out."""
    key = key.movedim(key_dim, -2)
    batch = key.shape[0] // rows_per_image
    return key.reshape(batch, -1, *key.shape[-2:])[:, :, num_prefix:]


def choose(
    keep_logits: Tensor,
    settings: CallSettings,
    stage: int,
    present: Tensor | None,
    real: Tensor | None,
) -> Tensor:
    """Which tokens stay, where no noise is drawn and no set is forced: [B, N] bool.

    Args:
        keep_logits: [B, N, 2].
        present: [B, N] bool: what no earlier stage dropped; None if all of them.
        real: [B, N] bool: what is no padding; None if all of them.
    """
    if settings.threshold is not None:
        return above_threshold(keep_logits, settings.threshold, present, real)
    ranked = keep_logits if real is None else real_first(keep_logits, real)
    if present is not None:
        ranked = ranked.masked_fill(~present.unsqueeze(-1), float("-inf"))
    return top_k(ranked, settings.num_keep[stage])


def forced_set(settings: CallSettings, stage: int) -> Tensor | None:
    """The kept set forced on a stage, [B, K]; None if the scorer decides."""
    return None if settings.keep_indices is None else settings.keep_indices[stage]


def present_masked(previous: Tensor | None, real: Tensor, tokens: Tensor) -> Tensor:
    """[B, N] 1 where a patch was kept by the stage before and is no padding."""
    return real.to(tokens.dtype) if previous is None else previous * real


def decide(
    keep_logits: Tensor,
    previous: Tensor | None,
    settings: CallSettings,
    stage: int,
    real: Tensor | None = None,
) -> Tensor:
    """The decision [B, N] about every patch, 0 wherever `previous` is.

    Args:
        keep_logits: [B, N, 2].
        previous: [B, N] decision of the stage before; None at the first.
        real: [B, N] True where a patch is no padding; None if none is.
    """
    if previous is None:
        previous = keep_logits.new_ones(keep_logits.shape[:2])
    forced = forced_set(settings, stage)
    if forced is not None:
        return one_hot(forced, previous)
    if settings.sample:
        return sample_decision(
            keep_logits,
            previous if real is None else previous * real,
            temperature=settings.temperature,
            hard=settings.hard,
            generator=settings.generator,
        )
    return choose(keep_logits, settings, stage, previous > 0.5, real).to(previous.dtype)


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


def _own_numbers(keep_logits: Tensor) -> Tensor:
    """[B, N]: before the first stage, patch i is number i."""
    batch, patches = keep_logits.shape[:2]
    return torch.arange(patches, device=keep_logits.device).expand(batch, -1)


def present_gathered(previous: Tensor | None, real: Tensor, tokens: Tensor) -> Tensor:
    """[B, N'] 1 where one of the patches that are still there is no padding."""
    there = real if previous is None else real.gather(1, previous)
    return there.to(tokens.dtype)


def select_gathered(
    tokens: Tensor,
    keep_logits: Tensor,
    previous: Tensor | None,
    settings: CallSettings,
    stage: int,
    num_prefix: int,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove the patches that are not kept.

    Args:
        tokens: [B, P + N', D], N' patches still there.
        keep_logits: [B, N', 2].
        previous: [B, N'] their original numbers; None at the first stage.
        real: [B, N] True where a patch is no padding, by original number; None if none is.

    Returns:
        tokens [B, P + K, D], and their numbers [B, K], ascending.
    """
    numbers = _own_numbers(keep_logits) if previous is None else previous
    forced = forced_set(settings, stage)
    if forced is not None:
        forced = forced.to(numbers.device)
        places = torch.searchsorted(numbers.contiguous(), forced.contiguous())
    elif settings.num_keep[stage] == keep_logits.shape[1]:
        return tokens, numbers
    else:
        chosen = choose(keep_logits, settings, stage, None, _real_there(real, previous))
        places = indices_of(chosen, settings.num_keep[stage])
    return gather_tokens(tokens, places, num_prefix), numbers.gather(1, places)


def present_jagged(numbers: Tensor | None, real: Tensor | None, tokens: Tensor) -> Tensor | None:
    """[B, N'] 1 where a row holds a token, and one that is no padding of the host's own; None
    where all do."""
    there = None if numbers is None or not has_padding(numbers) else numbers >= 0
    real = _real_there(real, numbers)
    seen = real if there is None or real is None else real & there
    seen = there if seen is None else seen
    return None if seen is None else seen.to(tokens.dtype)


def select_jagged(
    keep_logits: Tensor,
    previous: Tensor | None,
    settings: CallSettings,
    stage: int,
    real: Tensor | None = None,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the patches of each image that stay; `take_chosen` then removes the others.

    Args:
        keep_logits: [B, N', 2], N' patches of the image that has most.
        previous: [B, N'] their original numbers, -1 where a row holds no token; None at the first
            stage.
        real: [B, N] True where a patch is no padding, by original number; None if none is.
        forced: The forced set of the images in `keep_logits`, if there is one.

    Returns:
        The places of the chosen ones among the N', [B, K]: ascending, then -1 where an image keeps
        fewer than the one that keeps most; and their original numbers [B, K].
    """
    numbers = _own_numbers(keep_logits) if previous is None else previous
    if forced is not None:
        last = torch.iinfo(numbers.dtype).max  # after all numbers, as padding is
        ascending = torch.where(numbers < 0, last, numbers).contiguous()
        forced = forced.to(numbers.device, torch.int64)
        places = torch.searchsorted(ascending, forced.contiguous())
        places = torch.where(forced < 0, -1, places)
    else:
        padded = previous is not None and has_padding(numbers)
        present = numbers >= 0 if padded else None
        wanted = choose(keep_logits, settings, stage, present, _real_there(real, numbers))
        fixed = settings.threshold is None
        places = indices_of(wanted, settings.num_keep[stage]) if fixed else kept_first(wanted)
    return places, torch.where(places < 0, -1, numbers.gather(1, places.clamp_min(0)))
