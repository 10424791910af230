"""The learned predictor in eval as one operator: two kernels and three small ones of torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = ["can_predict", "keep_logits"]

_WEIGHTS = ("norm", "shift", "w0", "b0", "w1", "b1", "w2", "b2", "w3", "b3")


def can_predict(tokens: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether the kernels serve: half precision, contiguous weights, and no gradient asked for."""
    tensors = (tokens, *weights)
    return (
        kernels_run_on(tokens)
        and tokens.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_autocast_enabled(tokens.device.type)
        and 2 <= tokens.shape[-1] <= 1024
        and tokens.numel() > 0
        and all(x.dtype == tokens.dtype and x.device == tokens.device for x in weights)
        and all(x.is_contiguous() for x in weights)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def keep_logits(tokens: Tensor, weights: tuple[Tensor, ...], eps: float) -> Tensor:
    """Log-probabilities [B, N, 2] of DynamicViT's predictor with GELU, in fp32.

    Args:
        tokens: [B, N, D], all of them kept; rows may be strided.
        weights: scale and shift of the norm, then weight and bias of the four linear layers: D to
            D, D to h, h to w, w to 2.
        eps: of the norm.
    """
    return _operator(tokens, *weights, eps)  # type: ignore[no-any-return]


def _keep_logits(tokens: Tensor, *rest: Any) -> Tensor:
    from tokenprune.ops.kernels import predictor_triton

    norm, shift, w0, b0, w1, b1, w2, b2, w3, b3, eps = rest
    local, parts = predictor_triton.features(tokens, norm, shift, w0, b0, eps)
    mean = (parts.sum(1) / tokens.shape[1]).to(tokens.dtype)
    half = local.shape[-1]
    common = F.linear(mean, w1[:, half:], b1)
    return predictor_triton.logits(local, common, w1[:, :half], w2, b2, w3, b3)


def _fake(tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(*tokens.shape[:2], 2, dtype=torch.float32)


_operator = define(
    "keep_logits",
    f"(Tensor tokens, {', '.join(f'Tensor {name}' for name in _WEIGHTS)}, float eps) -> Tensor",
    _keep_logits,
    _fake,
)
