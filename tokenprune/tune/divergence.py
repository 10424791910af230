"""How far a pruned model's output is from the dense model's."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import HostError, PlanError

__all__ = ["Distance", "Read", "distance_of", "main_output"]

Read = Callable[[Any], Tensor]
"""What a host returns -> the tensor [B, ...] that matters."""
Distance = Literal["kl", "cosine"]
"""`kl`: KL(dense, pruned) of the class probabilities of logits [B, C], in nats. `cosine`: 1 less
the cosine of an image's two outputs."""

FIELDS = ("logits", "image_embeds", "pooler_output")


def main_output(output: Any) -> Tensor:
    """The tensor that stands for each image: class logits, or an embedding.

    Raises:
        HostError: Only the caller can know which.
    """
    found = output
    if isinstance(output, Mapping):
        found = next((output[name] for name in FIELDS if output.get(name) is not None), None)
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim < 2:
        named = isinstance(output, Mapping)
        names = ", ".join(map(str, output)) if named else type(output).__name__
        raise HostError(
            f"Outputs can be compared where a host returns a tensor, logits or one embedding an "
            f"image, found {names}. Pass read=, a function that takes what the host returns and "
            "gives the tensor that matters: read=lambda output: output.last_hidden_state[:, 0]."
        )
    return found


def distance_of(kind: Distance | None, dense: Tensor, logits: bool) -> Distance:
    """The distance that is asked for; by default `kl` for logits [B, C], `cosine` for all else."""
    if kind is None:
        return "kl" if logits and dense.ndim == 2 and dense.shape[1] > 1 else "cosine"
    if kind not in ("kl", "cosine"):
        raise PlanError(f"asked for divergence={kind!r}: give 'kl' or 'cosine'.")
    if kind == "kl" and dense.ndim != 2:
        raise PlanError(
            f"asked for divergence='kl', which needs class logits [B, C], found outputs "
            f"{list(dense.shape)}. Use 'cosine', or a `read` that gives logits."
        )
    return kind


def distances(kind: Distance, dense: Tensor, pruned: Tensor) -> Tensor:
    """[B]: 0 where both are the same."""
    dense, pruned = dense.float(), pruned.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(dense.flatten(1), pruned.flatten(1), dim=1)
    parts = F.kl_div(pruned.log_softmax(1), dense.log_softmax(1), reduction="none", log_target=True)
    return parts.sum(1)
