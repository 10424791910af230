"""The kernels of masked attention compute what the plain version does, also where tiles end."""

import math

import pytest
import torch
from jaxtyping import config
from torch import Tensor

from tokenprune.ops import attention, masked_attention
from tokenprune.ops.kernels.attention import fused_attention

# The interpreter computes exp(-inf - -inf) of rows that see nothing before it is replaced.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# Batch, heads, queries, keys, channels, own key, mask. Tiles hold 32 queries and 32 keys.
CASES = {
    "ragged": (2, 2, 37, 37, 16, True, None),
    "bool mask, odd channels": (1, 2, 33, 33, 5, True, "bool"),
    "bias": (2, 1, 5, 5, 16, True, "bias"),
    "class token": (2, 2, 1, 40, 8, False, None),
    "rows that see nothing": (2, 1, 3, 7, 4, False, "bool"),
}


def operands(device: torch.device, case: str) -> tuple[list[Tensor], Tensor | None, Tensor]:
    batch, heads, queries, keys, channels, _, mask = CASES[case]
    torch.manual_seed(0)

    def tokens(length: int) -> Tensor:  # heads and tokens lie as a qkv projection leaves them
        return torch.randn(batch, length, heads, channels, device=device).transpose(1, 2)

    policy = (torch.rand(batch, keys, device=device) > 0.4).float()
    policy[-1] = 0
    masks = {
        None: None,
        "bool": torch.rand(batch, 1, queries, keys, device=device) > 0.4,
        "bias": torch.randn(heads, queries, keys, device=device).masked_fill(
            torch.rand(heads, queries, keys, device=device) > 0.8, -math.inf
        ),
    }
    return [tokens(queries), tokens(keys), tokens(keys), policy], masks[mask], tokens(queries)


def results(given: list[Tensor], mask: Tensor | None, grad: Tensor, own: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = masked_attention(*leaves, attn_mask=mask, own_key=own)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "can_fuse", lambda *_: False)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_plain_version(
    case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, mask, grad = operands(device, case)
    own = CASES[case][5]
    found = results(given, mask, grad, own)
    plain(monkeypatch)
    for a, b in zip(found, results(given, mask, grad, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_inf_and_nan_of_dropped_tokens_reach_nobody(device: torch.device) -> None:
    given, mask, grad = operands(device, "ragged")
    query, key, value, policy = given
    gone = (policy < 0.5)[:, None, :, None]
    spoilt = [query, key.masked_fill(gone, math.nan), value.masked_fill(gone, math.inf), policy]
    clean, found = results(given, mask, grad, True), results(spoilt, mask, grad, True)
    kept = ~gone.expand_as(grad)
    assert torch.equal(found[0][kept], clean[0][kept])
    assert all(x.isfinite().all() for x in found)


def test_dtypes_and_masks_that_no_kernel_serves_run_plain(device: torch.device) -> None:
    given, _, grad = operands(device, "bias")
    bias = torch.randn(5, 5, device=device, requires_grad=True)
    masked_attention(*given, attn_mask=bias).backward(grad)
    assert bias.grad is not None
    masked_attention(*(x.double() for x in given))


def test_one_compiled_graph_serves_every_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    torch.compiler.reset()
    compiled = torch.compile(masked_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            x = torch.randn(batch, 1, 7, 4, device=device, requires_grad=True)
            policy = torch.ones(batch, 7, device=device, requires_grad=True)
            grads = [
                torch.autograd.grad(run(x, x, x, policy).square().sum(), (x, policy))
                for run in (compiled, masked_attention)
            ]
            torch.testing.assert_close(*grads)


def test_gradients_of_each_image_by_vmap(device: torch.device) -> None:
    (query, key, value, policy), _, _ = operands(device, "bias")

    def loss(q: Tensor, p: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fused_attention(q[None], k[None], v[None], p[None], None, 0.5, True)
        return out.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    mapped = torch.func.vmap(gradient)(query, policy, key, value)
    for image in range(2):
        alone = gradient(query[image], policy[image], key[image], value[image])
        torch.testing.assert_close(tuple(g[image] for g in mapped), alone)
