"""The contract of a pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import fx

from tokenprune.errors import LeakError, PlanError, UnsupportedHostError
from tokenprune.rewrite.rewrite import Rewrite

__all__ = ["Pass", "run_passes"]


class Pass(ABC):
    """One edit of a graph.

    `requires` looks at what comes in and raises before anything is changed; `apply` edits;
    `ensures` looks at the result.
    """

    def requires(self, rewrite: Rewrite) -> None:  # noqa: B027 - most passes need nothing
        """Raise if this graph cannot be edited."""

    @abstractmethod
    def apply(self, rewrite: Rewrite) -> None:
        """Edit the copy."""

    def ensures(self, rewrite: Rewrite) -> None:  # noqa: B027 - lint has seen the graph
        """Raise if the result is not what the pass promises."""


def run_passes(rewrite: Rewrite, passes: Sequence[Pass]) -> fx.Graph:
    """Run `passes` in order, each checked before and after.

    Raises:
        LeakError: A node mixes tokens in a way no rule can mask.
        PlanError: A scorer reads what the host does not have there.
        UnsupportedHostError: Anything else in the way; the pass is named.
    """
    for each in passes:
        each.requires(rewrite)
        try:
            each.apply(rewrite)
            rewrite.graph.lint()
        except (LeakError, PlanError):
            raise
        except (RuntimeError, LookupError, TypeError) as error:
            raise UnsupportedHostError(
                f"{type(each).__name__} failed on this host: {type(error).__name__}: {error}"
            ) from error
        each.ensures(rewrite)
    return rewrite.graph
