"""What runs at a stage: called from the rewritten graphs, once per stage and forward.

Every path asks the same predictor. The mask path returns a decision over all N patches; the gather
path returns the tokens that stay and where they came from; the ragged path, on which images keep
different numbers of tokens, which ones those are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.analysis.padding import behind_real
from tokenprune.ops.bypass import poisonous
from tokenprune.ops.gumbel import sample_decision
from tokenprune.ops.jagged import above_threshold, has_padding, kept_first, one_hot
from tokenprune.ops.selection import gather_tokens, select_topk

__all__ = [
    "StageContext",
    "forced_set",
    "gather_stage",
    "mask_stage",
    "policy_of",
    "ragged_stage",
]


@dataclass(frozen=True)
class StageContext:
    """The settings of one forward.

    Attributes:
        num_keep: K of each stage.
        sample: Draw decisions with Gumbel noise (training).
        threshold: Without noise, each image keeps the tokens whose keep probability is above this;
            None takes the top K of every image.
        buckets: Into how many groups of like length the images of a batch are sorted at most.
        temperature: Of the Gumbel-softmax.
        hard: 0/1 decisions.
        keep_indices: Kept sets forced from outside, per stage: [B, K] in original numbering,
            ascending, then -1 where an image has fewer.
        generator: Source of the noise.
        poison: `verify` only: overwrite dropped tokens with NaN and inf, to see that nobody reads
            them.
    """

    num_keep: tuple[int, ...]
    sample: bool
    threshold: float | None = None
    buckets: int = 4
    temperature: float = 1.0
    hard: bool = True
    keep_indices: tuple[Tensor, ...] | None = None
    generator: torch.Generator | None = None
    poison: bool = False


def mask_stage(
    predictor: nn.Module,
    tokens: Tensor,
    previous: Tensor | None,
    context: StageContext,
    stage: int,
    num_prefix: int,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide about every patch, removing none.

    Args:
        tokens: [B, P + N, D].
        previous: [B, N] decision of the stage before; None at the first.
        real: [B, N] True where a patch is no padding; None if none is.

    Returns:
        keep_logits [B, N, 2], decision [B, N] (never keeping what `previous` dropped), the tokens.
    """
    patches = tokens[:, num_prefix:]
    there = previous
    if real is not None:
        there = real.to(tokens.dtype) if previous is None else previous * real
    keep_logits = predictor(patches, there)
    if previous is None:
        previous = keep_logits.new_ones(keep_logits.shape[:2])
    if context.keep_indices is not None:
        decision = one_hot(context.keep_indices[stage], previous)
    elif context.sample:
        decision = sample_decision(
            keep_logits,
            previous if real is None else previous * real,
            temperature=context.temperature,
            hard=context.hard,
            generator=context.generator,
        )
    elif context.threshold is not None:
        wanted = above_threshold(keep_logits, context.threshold, previous > 0.5, real)
        decision = wanted.to(previous.dtype)
    else:
        ranked = keep_logits if real is None else behind_real(keep_logits, real)
        still = ranked.masked_fill((previous < 0.5).unsqueeze(-1), float("-inf"))
        decision = one_hot(select_topk(still, context.num_keep[stage]), previous)
    if context.poison:
        kept = policy_of(decision, num_prefix).unsqueeze(-1) > 0.5
        tokens = torch.where(kept, tokens, poisonous(tokens))
    return keep_logits, decision, tokens


def gather_stage(
    predictor: nn.Module,
    tokens: Tensor,
    kept: Tensor | None,
    context: StageContext,
    stage: int,
    num_prefix: int,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the patches that are not kept.

    Args:
        tokens: [B, P + N', D], N' patches still there.
        kept: [B, N'] their original numbers; None at the first stage.
        real: [B, N] True where a patch is no padding, by original number; None if none is.

    Returns:
        tokens [B, P + K, D], their numbers [B, K] ascending, and keep_logits [B, N', 2].
    """
    patches = tokens[:, num_prefix:]
    there = real if real is None or kept is None else real.gather(1, kept)
    keep_logits = predictor(patches, None if there is None else there.to(tokens.dtype))
    if kept is None:
        kept = torch.arange(patches.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    if context.keep_indices is not None:
        forced = context.keep_indices[stage].to(kept.device)
        chosen = torch.searchsorted(kept.contiguous(), forced.contiguous())
    elif context.num_keep[stage] == patches.shape[1]:
        return tokens, kept, keep_logits
    else:
        ranked = keep_logits if there is None else behind_real(keep_logits, there)
        chosen = select_topk(ranked, context.num_keep[stage])
    return gather_tokens(tokens, chosen, num_prefix), kept.gather(1, chosen), keep_logits


def ragged_stage(
    predictor: nn.Module,
    tokens: Tensor,
    numbers: Tensor | None,
    context: StageContext,
    stage: int,
    num_prefix: int,
    real: Tensor | None = None,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the patches of each image that stay; `take_chosen` then removes the others.

    Args:
        tokens: [B, P + N', D], N' patches of the image that has most.
        numbers: [B, N'] their original numbers, -1 where a row holds no token; None at the first
            stage.
        real: [B, N] True where a patch is no padding, by original number; None if none is.
        forced: What `forced_set` returned, for the images in `tokens`.

    Returns:
        Where the chosen ones stand among the N', [B, K]: ascending, then -1 where an image keeps
        fewer than the one that keeps most; their original numbers [B, K]; keep_logits [B, N', 2].
    """
    patches = tokens[:, num_prefix:]
    if numbers is None:
        there = None
        numbers = torch.arange(patches.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    else:
        there = numbers >= 0 if has_padding(numbers) else None
    if real is not None:
        real = real.gather(1, numbers.clamp_min(0))
    seen = real if there is None or real is None else real & there
    seen = there if seen is None else seen
    keep_logits = predictor(patches, None if seen is None else seen.to(tokens.dtype))
    if forced is not None:
        last = torch.iinfo(numbers.dtype).max  # behind all numbers, as padding is
        ascending = torch.where(numbers < 0, last, numbers).contiguous()
        forced = forced.to(numbers.device, torch.int64)
        places = torch.searchsorted(ascending, forced.contiguous())
        chosen = torch.where(forced < 0, -1, places)
    elif context.threshold is not None:
        chosen = kept_first(above_threshold(keep_logits, context.threshold, there, real))
    else:
        ranked = keep_logits if real is None else behind_real(keep_logits, real)
        chosen = select_topk(ranked, context.num_keep[stage])
    chosen_numbers = torch.where(chosen < 0, -1, numbers.gather(1, chosen.clamp_min(0)))
    return chosen, chosen_numbers, keep_logits


def forced_set(context: StageContext, stage: int) -> Tensor | None:
    """The kept set forced on a stage, [B, K]; None if the predictor decides."""
    return None if context.keep_indices is None else context.keep_indices[stage]


def policy_of(decision: Tensor, num_prefix: int) -> Tensor:
    """[B, P + N] policy: prefix tokens always stay."""
    ones = decision.new_ones(decision.shape[0], num_prefix)
    return torch.cat([ones, decision], dim=1)
