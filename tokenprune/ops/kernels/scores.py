"""The later layers of a predictor as one operator: what is between two linear layers is neither
written to memory nor read from it."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = ["can_finish", "finish"]

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}
_WIDEST = 512  # channels of the second layer that one program holds


def can_finish(rows: Tensor, layers: list[nn.Module]) -> bool:
    """Whether the kernel serves these layers, which are no others than a predictor's own, and their
    input `rows`: no gradient passes through it."""
    if not kernels_run_on(rows) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if len(layers) != 4 or not rows.numel():
        return False
    act, first, other_act, second = layers
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
        return False
    weights = [*first.parameters(), *second.parameters()]
    return (
        type(first) is type(second) is nn.Linear
        and type(act) is type(other_act)
        and type(act) in _ACTIVATIONS
        and all(getattr(layer, "approximate", "none") == "none" for layer in (act, other_act))
        and len(weights) == 4
        and {type(p) for p in weights} == {nn.Parameter}  # none quantised
        and all(p.dtype == rows.dtype and p.is_contiguous() for p in weights)
        and rows.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and second.out_features == 2
        and first.out_features <= _WIDEST
    )


def finish(rows: Tensor, shared: Tensor, layers: list[nn.Module]) -> Tensor:
    """Log-probabilities [B, N, 2] in fp32, from the first linear layer's two parts.

    Args:
        rows: [B, N, H], of each token.
        shared: [B, 1, H], of all tokens of an image, with the bias.
        layers: activation, linear (H -> M), activation, linear (M -> 2); see `can_finish`.
    """
    act, first, _, second = layers
    parameters = (first.weight, first.bias, second.weight, second.bias)
    return _operator(rows, shared, *parameters, _ACTIVATIONS[type(act)])  # type: ignore[no-any-return]


def _finish(*args: Any) -> Tensor:
    from tokenprune.ops.kernels import scores_triton

    return scores_triton.finish(*args)


def _fake(rows: Tensor, *rest: Any) -> Tensor:
    return rows.new_empty(*rows.shape[:2], 2, dtype=torch.float32)


def _flops(rows: Any, shared: Any, weight: Any, *rest: Any, **other: Any) -> int:
    return int(2 * rows[0] * rows[1] * weight[0] * (weight[1] + 2))


_operator = define(
    "predictor_scores",
    "(Tensor rows, Tensor shared, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias,"
    " str activation) -> Tensor",
    _finish,
    _fake,
    flops=_flops,
)
