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
    """Raise `CheckpointError` if the tensors `given` by a `source` do not have the names and shapes
    of the model's own; `head` and `tail` are the first and the last line of its message."""
    groups = {
        f"missing in the {source}": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another shape": {
            f"{name} {list(given[name].shape)}, not {list(own[name].shape)}"
            for name in own.keys() & given.keys()
            if own[name].shape != given[name].shape
        },
    }
    faults = {how: sorted(names) for how, names in groups.items() if names}
    lines = [f"{how} ({len(names)}): {some(names)}" for how, names in faults.items()]
    if lines:
        raise CheckpointError("\n  - ".join([head, *lines]) + (tail and f"\n{tail}"))


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
