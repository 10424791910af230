"""Warnings: each once for a model, by name, all of one category."""

import sys
import warnings
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tokenprune.errors import TokenPruneWarning

__all__ = ["warn_once", "was_given"]

_given: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_NOT_THE_CALLER = (
    *(str(Path(__file__).parent), str(Path(torch.__file__).parent)),
    "<tokenprune program",  # as `runtime.function` names them
)


def was_given(model: nn.Module, name: str) -> bool:
    """Whether this model had the warning of this name."""
    return name in _given.get(model, ())


def warn_once(model: nn.Module, name: str, message: str) -> None:
    """Give a `TokenPruneWarning`, unless this model had one of this name.

    It points at the line outside of tokenprune and torch that led here. A copy of a model is
    another model.

    Args:
        model: Whom it is about.
        name: Of the warning; begins the text, so that filters find it.
        message: What was seen, and what to do.
    """
    given = _given.setdefault(model, set())
    if name in given:
        return
    given.add(name)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{name}: {message}", TokenPruneWarning, stacklevel=level)
