"""Parameters that require gradients for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["requiring_grad"]


@contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """Set `requires_grad` of floating parameters, and put it back."""
    changed = [p for p in parameters if p.is_floating_point() and p.requires_grad != wanted]
    for parameter in changed:
        parameter.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not wanted)
