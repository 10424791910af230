"""Whether the scorers of a wrapped model have learned anything, and the warning if not."""

from collections.abc import Mapping

import torch
from torch import nn

from tokenprune.notices import warn_once, was_given
from tokenprune.private import jit_tracing, transforms_active, without_modes
from tokenprune.scorers.protocol import PREDICTORS, Scorer
from tokenprune.tracing.stand_ins import is_plain

__all__ = ["have_learned", "warn_if_fresh"]

NAME = "untrained predictors"


def have_learned(added: Mapping[str, nn.Module]) -> bool | None:
    """Whether a scorer is past its start, or none has to learn; None where values cannot be read:
    sharded, quantised or fake weights, those of a transform, a CUDA graph that is captured.

    The weights are asked, not the calls: whatever trained, converted, averaged or loaded them, and
    on whichever copy, they are not what a scorer starts with.
    """
    scorers = [m for m in added[PREDICTORS].modules() if isinstance(m, Scorer)]
    parameters = [p for scorer in scorers for p in scorer.parameters()]
    if not all(is_plain(p) and not p.is_meta for p in parameters):
        return None
    if jit_tracing() or transforms_active():
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    with torch.no_grad(), without_modes():
        return not (scorers and all(scorer.is_fresh() for scorer in scorers))


def warn_if_fresh(kind: str, added: Mapping[str, nn.Module], mergeable: bool) -> bool:
    """Say once that a model prunes by scorers that have learned nothing.

    Args:
        kind: Name of the model's class.
        added: What `wrap` added to it.
        mergeable: Its tokens can be merged instead.

    Returns:
        Whether the scorers are known to have learned.
    """
    scorers = added[PREDICTORS]
    if was_given(scorers, NAME):
        return False
    learned = have_learned(added)
    merge = "Or merge similar tokens of the host instead, without training: "
    merge = f'{merge}`tokenprune.wrap(host, "merge-k0.7")`. ' if mergeable else ""
    if learned is False:
        warn_once(
            scorers,
            NAME,
            f"the predictors of this {kind} were never trained or calibrated, so eval drops tokens "
            "without knowing which of them matter: expect to lose about as much accuracy as with "
            "random removal. Fit the predictors to images, without labels: "
            f"`tokenprune.calibrate(model, batches)`. {merge}Training the model or loading trained "
            "weights helps too.",
        )
    return bool(learned)
