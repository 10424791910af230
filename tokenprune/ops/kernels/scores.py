"""A predictor as one operator: of what lies between its matrix products only the results that the
next product reads are written to memory."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = ["can_score", "predict"]

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}
_KINDS = [nn.LayerNorm, nn.Linear, None, nn.Linear, None, nn.Linear, None, nn.Linear]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 2048  # channels of a token
_OF_LAST = 512  # inputs of the last layer, which one program holds


def can_score(tokens: Tensor, layers: list[nn.Module]) -> bool:
    """Whether the kernels serve these tokens [B, N, D] and the layers of a `TokenPredictor`, which
    nobody has replaced, adapted, quantised or hooked; no gradient passes through them."""
    if not kernels_run_on(tokens) or torch.is_grad_enabled() or not tokens.numel():
        return False
    if len(layers) != len(_KINDS) or tokens.dtype not in _DTYPES or tokens.shape[-1] > _WIDEST:
        return False
    act = type(layers[2])
    weights = _parameters(layers)
    return (
        act in _ACTIVATIONS
        and all(type(layer) is (kind or act) for layer, kind in zip(layers, _KINDS, strict=True))
        and all(getattr(layer, "approximate", "none") == "none" for layer in layers)
        and len(weights) == 10
        and all(type(p) is nn.Parameter and p.dtype == tokens.dtype for p in weights)
        and all(p.is_contiguous() and p.device == tokens.device for p in weights)
        and weights[0].shape == (tokens.shape[-1],)
        and [len(weights[at]) for at in (0, 2, 4, 6)]
        == [weights[at].shape[1] for at in (2, 4, 6, 8)]
        and weights[8].shape[1] <= _OF_LAST
        and len(weights[8]) == 2
        and not torch.is_autocast_enabled(tokens.device.type)
    )


def predict(tokens: Tensor, present: Tensor | None, layers: list[nn.Module]) -> Tensor:
    """Keep log-probabilities [B, N, 2] in fp32.

    Args:
        tokens: [B, N, D], of any strides.
        present: [B, N] 1 where a token is there; None if all are.
        layers: norm, linear, then three times activation and linear; see `can_score`.
    """
    norm: Any = layers[0]
    return _operator(tokens, present, _parameters(layers), norm.eps, _ACTIVATIONS[type(layers[2])])  # type: ignore[no-any-return]


def _parameters(layers: list[nn.Module]) -> list[Any]:
    return [p for layer in layers for p in layer._parameters.values()]


def _predict(*args: Any) -> Tensor:
    from tokenprune.ops.kernels import scores_triton

    return scores_triton.predict(*args)


def _fake(tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(*tokens.shape[:2], 2, dtype=torch.float32)


def _flops(tokens: Any, present: Any, parameters: Any, *rest: Any, **other: Any) -> int:
    images, rows = tokens[0], tokens[0] * tokens[1]
    project, first, second, last = (parameters[at] for at in (2, 4, 6, 8))
    local = tokens[2] // 2
    per_token = project[0] * project[1] + first[0] * local + second[0] * second[1]
    per_image = first[0] * (first[1] - local)
    return int(2 * (rows * (per_token + last[0] * last[1]) + images * per_image))


_operator = define(
    "predictor",
    "(Tensor tokens, Tensor? present, Tensor[] parameters, float eps, str activation) -> Tensor",
    _predict,
    _fake,
    flops=_flops,
)
