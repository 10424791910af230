"""flex_attention, step by step: as one node, no rule could mask it, and no proxy could enter it."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["flex_attention_opened"]

FLEX = "torch.nn.attention.flex_attention"
Modify = Callable[..., Tensor]


class Recorder(Protocol):
    """A tracer. If `executing`, calls run as they are."""

    @property
    def executing(self) -> bool: ...


@contextmanager
def flex_attention_opened(tracer: Recorder) -> Iterator[None]:
    """Put `attend` and `masking` in the place of `flex_attention` and `create_block_mask`. A host
    may hold those anywhere (imported by name, in a partial), so their code is replaced."""
    flex: Any = sys.modules.get(FLEX)  # few have use for it
    with ExitStack() as stack:
        if flex is not None:
            stack.enter_context(_code_of(flex.flex_attention, tracer, attend))
            stack.enter_context(_code_of(flex.create_block_mask, tracer, masking))
        yield


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Modify | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """`flex_attention` [B, H, L, D] where nobody has compiled it, in its order of rounding.
    `score_mod` and `mask_mod` are called once for all places, by indices that broadcast."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query.to(exact) @ key.to(exact).transpose(-2, -1)
    scores = scores * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    places = [
        torch.arange(size, device=scores.device).view([-1 if at == dim else 1 for at in range(4)])
        for dim, size in enumerate(scores.shape)
    ]
    if score_mod is not None:
        scores = score_mod(scores, *places).to(exact)
    if block_mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        seen = block_mask.mask_mod(*places)
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)  # who sees nothing
    output = weights.to(query.dtype) @ value
    if return_aux is not None:
        lse = _rescaled(scores.logsumexp(-1)) if return_aux.lse else None
        most = _rescaled(scores.max(-1)[0]) if return_aux.max_scores else None
        return output, sys.modules[FLEX].AuxOutput(lse=lse, max_scores=most)
    return (output, _rescaled(scores.logsumexp(-1))) if return_lse else output


def _rescaled(logarithm: Tensor) -> Tensor:
    """To base 2 and back, as torch does: it rounds."""
    return logarithm / math.log(2) * math.log(2.0)


def masking(mask_mod: Modify, *_: Any, **__: Any) -> Any:
    """A `BlockMask` of which only the function is known: `attend` asks for no blocks."""
    kind = sys.modules[FLEX].BlockMask
    made = object.__new__(kind)
    made.mask_mod = mask_mod
    return made


@contextmanager
def _code_of(function: Any, tracer: Recorder, instead: Callable[..., Any]) -> Iterator[None]:
    """Call `instead` while something is traced, whoever holds `function`."""
    code, defaults = function.__code__, function.__kwdefaults__
    usual = FunctionType(code, function.__globals__, argdefs=function.__defaults__)
    usual.__kwdefaults__ = defaults

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (usual if tracer.executing else instead)(*args, **kwargs)

    try:
        function.__code__, function.__kwdefaults__ = _handed.__code__, {"to": chosen}
        yield
    finally:
        function.__code__, function.__kwdefaults__ = code, defaults


def _handed(*args: Any, to: Any, **kwargs: Any) -> Any:
    return to(*args, **kwargs)
