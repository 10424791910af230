"""The class logits in what a host returned."""

from typing import Any

from torch import Tensor

from tokenprune.errors import HostError, PlanError

__all__ = ["class_logits"]


def class_logits(output: Any, num_classes: int | None = None) -> Tensor:
    """The class logits [B, C] in a tensor, a tuple or an output of transformers.

    Raises:
        HostError: There are none.
        PlanError: There are not `num_classes` of them.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        is_tensor = isinstance(logits, Tensor)
        found = f"a tensor {tuple(logits.shape)}" if is_tensor else type(output).__name__
        raise HostError(
            f"Training needs class logits [B, C], the host returned {found}. Use the host's class "
            "with a classification head."
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        raise PlanError(
            f"The data has {num_classes} classes, but the host's head has {logits.shape[1]} "
            f"outputs. Build the host with num_classes={num_classes}, or use the data it was "
            "trained for."
        )
    return logits
