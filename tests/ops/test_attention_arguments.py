"""The arguments of `scaled_dot_product_attention` that masked attention has to honour too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import LeakError
from tokenprune.ops import _fused, masked_attention

B, H, L, D = 2, 4, 6, 8


def operands(*heads: int, length: int = L, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, *heads, length, D, dtype=dtype).requires_grad_() for _ in range(3)]


def a_policy(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1]], dtype=dtype).requires_grad_()


def test_without_a_policy_it_is_the_host_to_the_last_bit() -> None:
    q, k, v = operands(H, dtype=torch.float32)
    bias = torch.randn(H, L, L)
    found = masked_attention(q, k, v, None, attn_mask=bias, scale=0.3)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    assert torch.equal(found, wanted)


def test_keeping_everything_is_dense_attention() -> None:
    q, k, v = operands(H)
    found = masked_attention(q, k, v, torch.ones(B, L))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("heads", [(), (H,), (2, 2)])
def test_any_number_of_head_dims(heads: tuple[int, ...]) -> None:
    q, k, v = operands(*heads)
    bias = torch.randn(B, *(1 for _ in heads), L, L, dtype=torch.float64)
    found = masked_attention(q, k, v, a_policy(), attn_mask=bias)
    flat = [x.reshape(B, -1, L, D) for x in (q, k, v)]
    wanted = masked_attention(*flat, a_policy(), attn_mask=bias.reshape(B, 1, L, L))
    torch.testing.assert_close(found, wanted.reshape(found.shape))


def test_a_mask_per_head_over_two_head_dims() -> None:
    q, k, v = operands(2, 2)
    bias = torch.randn(2, 1, L, L, dtype=torch.float64)
    found = masked_attention(q, k, v, a_policy(), attn_mask=bias)
    flat = [x.reshape(B, 4, L, D) for x in (q, k, v)]
    wanted = masked_attention(*flat, a_policy(), attn_mask=bias.expand(2, 2, L, L).reshape(4, L, L))
    torch.testing.assert_close(found.reshape(wanted.shape), wanted)


def test_keys_shared_by_groups_of_heads() -> None:
    (q, _, _), (_, k, v) = operands(H), operands(2)
    policy = a_policy()
    found = masked_attention(q, k, v, policy, enable_gqa=True)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    wanted = masked_attention(q, *wide, policy)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(found)
    leaves = (q, k, v, policy)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_one_key_for_all_heads_and_one_query_for_all_images() -> None:
    _, k, v = operands(1)
    query = torch.randn(1, H, 1, D, dtype=torch.float64, requires_grad=True)
    policy = a_policy()
    found = masked_attention(query, k, v, policy, own_key=False)
    assert found.shape == (B, H, 1, D)
    for image, row in enumerate(policy):
        kept = row > 0.5
        wanted = F.scaled_dot_product_attention(
            query[0], k[image, :, kept], v[image, :, kept].expand(H, -1, -1)
        )
        torch.testing.assert_close(found[image], wanted)
    found.sum().backward()
    assert query.grad is not None
    assert query.grad.shape == query.shape


@pytest.mark.parametrize("host", [None, "bool", "float"])
def test_causal_order_is_that_of_the_kept(host: str | None) -> None:
    q, k, v = operands(H)
    masks = {"bool": torch.rand(L, L) < 0.8, "float": torch.randn(L, L, dtype=torch.float64)}
    mask = None if host is None else masks[host]
    policy = a_policy()
    found = masked_attention(q, k, v, policy, attn_mask=mask, is_causal=True)
    for image, row in enumerate(policy):
        keep = (row > 0.5).nonzero()[:, 0]
        causal = torch.ones(len(keep), len(keep), dtype=torch.bool).tril()
        part = None if mask is None else mask[keep][:, keep]
        if part is None:
            part = causal
        elif part.dtype == torch.bool:
            part = part & causal
        else:
            part = part.masked_fill(~causal, float("-inf"))
        alone = [x[image][:, keep] for x in (q, k, v)]
        wanted = F.scaled_dot_product_attention(*alone, attn_mask=part)
        torch.testing.assert_close(found[image][:, keep], wanted)


def test_scale() -> None:
    q, k, v = operands(H)
    found = masked_attention(q, k, v, a_policy(), scale=0.7)
    torch.testing.assert_close(found, masked_attention(q * 0.7 * D**0.5, k, v, a_policy()))


def test_a_dropped_query_sees_the_kept_keys_and_its_own() -> None:
    q, k, v = operands(H)
    found = masked_attention(q, k, v, a_policy())
    seen = torch.tensor([1, 2, 5])  # token 1 of image 1 is dropped; 2 and 5 are kept
    wanted = F.scaled_dot_product_attention(q[1:, :, 1:2], k[1:, :, seen], v[1:, :, seen])
    torch.testing.assert_close(found[1:, :, 1:2], wanted)


@pytest.mark.parametrize("own_key", [True, False])
def test_nothing_kept(own_key: bool) -> None:
    q, k, v = operands(H)
    policy = torch.zeros(B, L, dtype=torch.float64, requires_grad=True)
    out = masked_attention(q, k, v, policy, own_key=own_key)
    torch.testing.assert_close(out, v if own_key else torch.zeros_like(v))
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, policy))


def test_a_row_the_host_hides_wholly_is_zero_as_in_the_dense_kernel() -> None:
    q, k, v = operands(H)
    policy = a_policy()
    mask = torch.ones(L, L, dtype=torch.bool)
    mask[2] = False
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = masked_attention(q, k, v, policy, attn_mask=mask)
    assert dense[:, :, 2].abs().max() == 0
    assert found[:, :, 2].abs().max() == 0
    found.sum().backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_a_kernel_that_makes_nan_of_such_a_row_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
        return (q @ k.mT * scale + attn_mask).softmax(-1) @ v

    q, k, v = operands(H)
    mask = torch.rand(L, L) < 0.3
    mask[2] = False
    wanted = masked_attention(q, k, v, a_policy(), attn_mask=mask)
    monkeypatch.setattr(_fused, "scaled_dot_product_attention", plain)
    assert plain(q, k, v, attn_mask=torch.full((L, L), -torch.inf), scale=1.0).isnan().all()
    found = masked_attention(q, k, v, a_policy(), attn_mask=mask)
    torch.testing.assert_close(found, wanted)


def test_the_lowest_number_as_a_mask_hides_like_minus_infinity() -> None:
    q, k, v = operands(H, dtype=torch.float32)
    hide = torch.zeros(B, 1, 1, L)
    hide[:, ..., 5] = 1
    policy = a_policy(torch.float32)
    lowest = masked_attention(q, k, v, policy, attn_mask=hide * torch.finfo(torch.float32).min)
    infinite = masked_attention(q, k, v, policy, attn_mask=hide.masked_fill(hide > 0, -torch.inf))
    torch.testing.assert_close(lowest[:, :, :5], infinite[:, :, :5])


def test_a_hidden_key_far_ahead_has_weight_one_at_most() -> None:
    q, k, v = operands(1)
    with torch.no_grad():
        q.fill_(100)
        k[:, :, 1] = 100  # dropped, its logit leads by far more than exp() can take
    policy = a_policy()
    out = masked_attention(q, k, v, policy)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, policy, grad)
    others = torch.tensor([i for i in range(L) if i != 1])
    wanted = (grad[:, 0, others] * (v[:, 0, 1:2] - out[:, 0, others])).sum((1, 2))
    torch.testing.assert_close(found[:, 1], wanted)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("own_key", [True, False])
def test_dropout_takes_the_spelled_out_way_to_the_same_place(
    mask: str | None, own_key: bool
) -> None:
    q, k, v = operands(H)
    policy = a_policy()
    masks = {"bool": torch.rand(L, L) < 0.8, "float": torch.randn(L, L, dtype=torch.float64)}
    options = {"attn_mask": None if mask is None else masks[mask], "own_key": own_key}
    fused = masked_attention(q, k, v, policy, **options)
    spelled = masked_attention(q, k, v, policy, dropout_p=1e-12, **options)
    torch.testing.assert_close(spelled, fused)
    grad, leaves = torch.randn_like(fused), (q, k, v, policy)
    for one, other in zip(
        torch.autograd.grad(spelled, leaves, grad),
        torch.autograd.grad(fused, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_dropout_drops_and_does_not_leak() -> None:
    q, k, v = operands(H)
    policy = a_policy()
    with torch.no_grad():
        k[0, :, 1] = v[0, :, 1] = float("nan")  # dropped
    torch.manual_seed(1)
    out = masked_attention(q, k, v, policy, dropout_p=0.5)
    kept = (policy > 0.5)[:, None, :, None].expand_as(out)
    assert out[kept].isfinite().all()
    grads = torch.autograd.grad(out[kept].sum(), (q, k, v, policy))
    assert all(grad.isfinite().all() for grad in grads)
    assert not torch.allclose(out[kept], masked_attention(q, k, v, policy)[kept])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_the_dense_kernel_gives(dtype: torch.dtype, dropout_p: float) -> None:
    q, k, v = operands(H, dtype=torch.float32)
    policy = a_policy(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        dense = F.scaled_dot_product_attention(q, k, v)
        out = masked_attention(q, k, v, policy, dropout_p=dropout_p, attn_mask=torch.zeros(L, L))
        out.float().square().mean().backward()  # inside, as some training loops do
    assert out.dtype == dense.dtype == dtype
    for x in (q, k, v, policy):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0


def test_a_policy_without_gradient() -> None:
    q, k, v = operands(H)
    grads = []
    for policy in (a_policy(), a_policy().detach()):
        out = masked_attention(q, k, v, policy)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_only_the_policy_needs_a_gradient() -> None:
    q, k, v = (x.detach() for x in operands(H))
    policy = a_policy()
    masked_attention(q, k, v, policy).square().sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().sum() > 0


def test_gradcheck() -> None:
    q, k, v = operands(1)
    bias = torch.randn(1, L, L, dtype=torch.float64, requires_grad=True)
    policy = a_policy().detach()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return masked_attention(q, k, v, policy, attn_mask=bias)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


def test_twice_differentiable_it_is_not() -> None:
    q, k, v = operands(1)
    out = masked_attention(q, k, v, a_policy())
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    q, k, v = operands(H)
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        masked_attention(q, k, v, a_policy(), attn_mask=torch.zeros(1, 1, L, L))
    assert max(kept) == q.numel()  # channels outnumber tokens here, or this would prove nothing
    assert sum(size == B * H * L * L for size in kept) == 0


def test_a_policy_of_other_tokens() -> None:
    q, k, v = operands(H)
    with pytest.raises(LeakError, match=r"shape \[2, 6\] .* found \[2, 5\]"):
        masked_attention(q, k, v, torch.ones(B, 5))


def test_own_key_needs_a_query_for_each_key() -> None:
    q, k, v = operands(H)
    with pytest.raises(LeakError, match=r"found 1 queries and 6 keys; pass own_key=False"):
        masked_attention(q[:, :, :1], k, v, a_policy())
