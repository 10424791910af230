"""The errors of this library.

Each class also derives from the built-in a caller would expect, so `except ValueError` keeps
working. A message says what was asked, what was found and what to do.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = [
    "AdapterError",
    "AlreadyWrappedError",
    "CheckpointError",
    "ExportError",
    "HostError",
    "KeepIndicesError",
    "LeakError",
    "MissingDependencyError",
    "NonFiniteWeightsError",
    "NotWrappedError",
    "PlanError",
    "RecipeError",
    "RegistrationError",
    "TokenPruneError",
    "TokenPruneWarning",
    "TokensReturnedError",
    "TraceError",
    "UnknownAdapterError",
    "UnknownRecipeError",
    "UnsupportedHostError",
    "VerificationError",
]


class TokenPruneError(Exception):
    """Base of every error raised by tokenprune."""


class TokenPruneWarning(UserWarning):
    """Category of every warning of tokenprune; each is given once for a model, by name."""


class RecipeError(TokenPruneError, ValueError):
    """A recipe that cannot be read. `problems` lists every fault found, one line each."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__("\n  - ".join([message, *problems]))
        self.problems = tuple(problems)


class UnknownRecipeError(TokenPruneError, LookupError):
    """No shipped recipe has that name."""


class PlanError(TokenPruneError, ValueError):
    """A valid recipe that does not fit this host (a block out of range, the wrong mode, ...)."""


class UnsupportedHostError(TokenPruneError, ValueError):
    """The host cannot be pruned; the message names the module or node that prevents it."""


class TraceError(UnsupportedHostError):
    """The host's forward could not be traced; the message names the line of the host's source."""


class TokensReturnedError(UnsupportedHostError):
    """An output holds tokens, and `restore` does not say what becomes of dropped ones."""


class LeakError(UnsupportedHostError):
    """A node mixes tokens in a way that no rule can mask."""


class HostError(TokenPruneError, ValueError):
    """The host itself refused an input (an image size it does not take, a missing argument)."""


class AlreadyWrappedError(TokenPruneError, ValueError):
    """`wrap` was given a model that `wrap` returned."""


class NotWrappedError(TokenPruneError, ValueError):
    """A function that needs a wrapped model was given another one."""


class NonFiniteWeightsError(TokenPruneError, ValueError):
    """The host's weights hold NaN or inf, so nothing can be verified."""


class KeepIndicesError(TokenPruneError, ValueError):
    """Forced `keep_indices` that are out of range, repeated, or of the wrong shape."""


class VerificationError(TokenPruneError, RuntimeError):
    """Two paths that must agree do not; the message names the first node where they differ."""


class CheckpointError(TokenPruneError, RuntimeError):
    """A directory or file that cannot be loaded into this host."""


class ExportError(TokenPruneError, RuntimeError):
    """The model cannot be exported, or the exported file does not compute what the model does."""


class AdapterError(TokenPruneError, ValueError):
    """An architecture adapter is registered twice or describes a host wrongly."""


class RegistrationError(TokenPruneError, ValueError):
    """A scorer, a reduction or an operator rule is registered under a name that is taken."""


class UnknownAdapterError(TokenPruneError, LookupError):
    """No architecture adapter has that name."""


class MissingDependencyError(TokenPruneError, ImportError):
    """An optional package is needed; the message holds the pip command."""


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """A sentence naming the known names nearest to `asked`, for the end of an error message."""
    names = sorted(known)
    near = get_close_matches(asked, names, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(name) for name in near)}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"Known names: {shown}." if names else "None is known."
