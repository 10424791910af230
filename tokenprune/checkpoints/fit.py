"""Compare a checkpoint's tensors with a model's."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tokenprune.errors import CheckpointError

__all__ = ["check_fit", "some"]

SHOWN = 8


def check_fit(
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    source: str,
    head: str,
    tail: str = "",
) -> None:
    """Check that two state dicts have the same names and shapes.

    Args:
        given: The tensors of the checkpoint.
        own: The tensors of the model.
        source: What `given` comes from, in one word.
        head: First line of the message.
        tail: Its last line.

    Raises:
        CheckpointError: They differ; lists what is missing, unexpected, or of another shape.
    """
    groups = {
        f"missing in the {source}": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another shape": {
            f"{name} {list(given[name].shape)}, not {list(own[name].shape)}"
            for name in own.keys() & given.keys()
            if own[name].shape != given[name].shape
        },
    }
    lines = [
        f"{how} ({len(names)}): {some(sorted(names))}" for how, names in groups.items() if names
    ]
    if lines:
        raise CheckpointError("\n  - ".join([head, *lines]) + (tail and f"\n{tail}"))


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
