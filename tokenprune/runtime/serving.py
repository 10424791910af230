"""The programs of a wrapped model, as its owner sees them: how many, let go, run unchecked."""

from torch import nn

from tokenprune.runtime.cache import CacheInfo
from tokenprune.runtime.model import pruning_of

__all__ = ["cache_info", "clear_cache", "freeze_guards"]


def cache_info(model: nn.Module) -> CacheInfo:
    """How many programs a wrapped model keeps, and how many it has made.

    Args:
        model: What `wrap` returned.

    Raises:
        NotWrappedError: `model` is not wrapped.
    """
    return pruning_of(model).cache.info()


def clear_cache(model: nn.Module, limit: int | None = None) -> None:
    """Let all programs of a wrapped model go; the next call traces again.

    Args:
        model: What `wrap` returned.
        limit: How many it may keep from now on; as before if None.

    Raises:
        NotWrappedError: `model` is not wrapped.
        ValueError: The limit is below 1.
    """
    cache = pruning_of(model).cache
    if limit is not None and limit < 1:
        raise ValueError(f"Asked for a limit of {limit} programs; a model needs at least 1.")
    cache.limit = cache.limit if limit is None else limit
    cache.clear()


def freeze_guards(model: nn.Module, frozen: bool = True) -> None:
    """For serving: run the programs there are without looking whether the model has changed.

    Saves the time of the check in each call (at most 1 % of a DeiT-S forward of one image). From
    then on what is set or replaced on the model or its host is not seen, in silence, nor the mode
    of a part; `train()` and `eval()` of the model, values of weights and new hooks are. Call the
    model once before, so that the programs are those of the model as it is.

    Args:
        model: What `wrap` returned.
        frozen: False goes back to looking.

    Raises:
        NotWrappedError: `model` is not wrapped.
    """
    pruning_of(model).cache.frozen = frozen
