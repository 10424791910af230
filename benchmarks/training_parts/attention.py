"""Implementations of attention under a policy, compared in time, memory and exactness."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.cost.timing import interleaved
from tokenprune.ops.attention import masked_attention, masked_softmax

__all__ = ["SHAPE", "WAYS", "Way", "measure_ways"]

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SHAPE = (16, 6, 197, 64)  # DeiT-S, batch 16
KEPT = 0.7


def _own(policy: Tensor) -> Tensor:
    """[B, 1, L, L]: the policy of the key, 1 for a query's own."""
    length = policy.shape[1]
    eye = torch.eye(length, dtype=policy.dtype, device=policy.device)
    return policy[:, None, None] * (1 - eye) + eye


def spelled_out(query: Tensor, key: Tensor, value: Tensor, policy: Tensor) -> Tensor:
    """Softmax over the kept keys and the own one, not fused."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return masked_softmax(scores, policy, -1, query_dim=-2) @ value


def log_policy(
    query: Tensor, key: Tensor, value: Tensor, policy: Tensor, eps: float = 1e-6
) -> Tensor:
    """Fused attention with log(policy) added to the logits, as a mask that has a gradient."""
    mask = (_own(policy) + eps).log()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def log_policy_column(
    query: Tensor, key: Tensor, value: Tensor, policy: Tensor, eps: float = 1e-6
) -> Tensor:
    """Fused attention with an extra channel: the query's is 1, the key's is log(policy).

    A sum over channels cannot treat a query's own key differently, so a dropped one is hidden too.
    """
    column = (policy + eps).log()[:, None, :, None].expand(-1, key.shape[1], -1, 1)
    scale = query.shape[-1] ** -0.5
    wide_query = torch.cat([query * scale, torch.ones_like(query[..., :1])], -1)
    wide_key = torch.cat([key, column], -1)
    wide_value = torch.cat([value, torch.zeros_like(value[..., :1])], -1)
    out = F.scaled_dot_product_attention(wide_query, wide_key, wide_value, scale=1.0)
    return out[..., :-1]


def published(query: Tensor, key: Tensor, value: Tensor, policy: Tensor) -> Tensor:
    """DynamicViT's own: exp, times the policy, over the sum, with eps on both sides."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores - scores.amax(-1, keepdim=True).detach()
    weights = scores.exp() * _own(policy)
    eps = 1e-6
    weights = (weights + eps / policy.shape[1]) / (weights.sum(-1, keepdim=True) + eps)
    return weights @ value


def dense(query: Tensor, key: Tensor, value: Tensor, policy: Tensor) -> Tensor:
    """The host's attention, without a policy."""
    return F.scaled_dot_product_attention(query, key, value)


WAYS: dict[str, Attention] = {
    "dense SDPA": dense,
    "**ours**: fused kernel, backward in slices": masked_attention,
    "spelled out, exact": spelled_out,
    "SDPA, log(policy) as mask": log_policy,
    "SDPA, log(policy) as a channel": log_policy_column,
    "DynamicViT's softmax with eps": published,
}


@dataclass(frozen=True)
class Way:
    """One of `WAYS`, measured.

    Attributes:
        name: which.
        time: forward and backward, relative to dense SDPA.
        kept_bytes: saved for backward, query, key and value apart.
        square: whether a tensor [.., L, L] is among them.
        leak: largest change of a kept row when dropped tokens hold other, larger values.
        gradient: largest error of the policy's gradient, relative to its largest entry; NaN for
            dense.
    """

    name: str
    time: float
    kept_bytes: int
    square: bool
    leak: float
    gradient: float


def measure_ways(rounds: int = 7) -> list[Way]:
    """All of them at DeiT-S's shape in float32; errors against the exact one in float64."""
    operands = _operands(torch.float32)
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def step(way: Attention) -> None:
        way(*operands).backward(grad)

    timings = interleaved({n: partial(step, way) for n, way in WAYS.items()}, rounds=rounds)
    base = timings["dense SDPA"].seconds
    exact = _policy_gradient(spelled_out, torch.float64, grad)
    found = []
    for name, way in WAYS.items():
        kept, square = _saved(way)
        error = float("nan")
        if way is not dense:
            own = _policy_gradient(way, torch.float32, grad)
            error = float((own - exact).abs().max() / exact.abs().max())
        leak = _leak(way)
        found.append(Way(name, timings[name].seconds / base, kept, square, leak, error))
    return found


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(SHAPE, generator=drawn).to(dtype).requires_grad_() for _ in range(3)
    )
    policy = (torch.rand(SHAPE[0], SHAPE[2], generator=drawn) < KEPT).to(dtype)
    policy[:, 0] = 1
    return query, key, value, policy.requires_grad_()


def _policy_gradient(way: Attention, dtype: torch.dtype, grad: Tensor) -> Tensor:
    operands = _operands(dtype)
    # rows of kept queries only: the others are not read
    kept = operands[3].detach()[:, None, :, None]
    way(*operands).backward(grad.to(dtype) * kept)
    found = operands[3].grad
    if found is None:
        raise RuntimeError("the policy got no gradient")
    return found.double()


def _leak(way: Attention) -> float:
    query, key, value, policy = (x.detach() for x in _operands(torch.float32))
    gone = (policy < 1)[:, None, :, None]
    first = way(query, key, value, policy)
    second = way(query, key.where(~gone, key * -3), value.where(~gone, value * 10), policy)
    return float((first - second).abs().masked_fill(gone, 0).max())


def _saved(way: Attention) -> tuple[int, bool]:
    """Bytes kept for backward beside the operands, and whether some are [.., L, L]."""
    operands = _operands(torch.float32)
    given = {x.untyped_storage().data_ptr() for x in operands}
    storages: dict[int, int] = {}
    square = False

    def look(tensor: Tensor) -> Tensor:
        nonlocal square
        place = tensor.untyped_storage().data_ptr()
        if place not in given:
            storages[place] = tensor.untyped_storage().nbytes()
        square |= (
            tuple(tensor.shape[-2:]) == (SHAPE[2], SHAPE[2]) and tensor.numel() > SHAPE[2] ** 2
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        way(*operands)
    return sum(storages.values()), square
