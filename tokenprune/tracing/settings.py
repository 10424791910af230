"""Settings of torch and Python that a host's Python may ask for, beside those that `modes` knows.

Under torch.compile Dynamo watches them itself.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import backends
from torch.utils import deterministic

from tokenprune.tracing.names import Reached

__all__ = ["Setting", "setting", "settings_named_by"]

Setting = tuple[Any, str]
"""Where a function that tells a setting is, or a flag; and its name."""

FUNCTIONS: tuple[Setting, ...] = (
    (torch, "get_default_dtype"),
    (torch, "get_default_device"),
    (torch, "are_deterministic_algorithms_enabled"),
    (torch, "is_deterministic_algorithms_warn_only_enabled"),
    (torch, "get_deterministic_debug_mode"),
    (torch, "get_float32_matmul_precision"),
    (torch, "get_num_threads"),
    (torch, "is_anomaly_enabled"),
    (torch, "is_warn_always_enabled"),
    (torch, "initial_seed"),
    (backends.mha, "get_fastpath_enabled"),
    (sys, "getrecursionlimit"),
)
FLAGS: tuple[Setting, ...] = (
    *((backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    (backends.cuda.matmul, "allow_tf32"),
    (backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (backends.mkldnn, "enabled"),
    (deterministic, "fill_uninitialized_memory"),
)


def settings_named_by(reached: Reached) -> Iterator[Setting]:
    """The settings that functions may ask for, by torch's name or one of their own; and those of
    dtype and device, which each new tensor tells."""
    named = reached.words() | {"get_default_dtype", "get_default_device"}
    held = reached.values()
    for owner, name in FUNCTIONS:
        if name in named or any(value is getattr(owner, name) for value in held):
            yield owner, name
    yield from ((owner, name) for owner, name in FLAGS if name in named)


def setting(owner: Any, name: str, _absent: Any = None) -> Any:
    """What a setting is now."""
    value = getattr(owner, name)
    return value() if callable(value) else value
