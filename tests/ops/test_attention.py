"""Masked attention is attention to what was kept; its gradients are those that are documented."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.ops import _fused, hide_dropped, masked_attention, masked_softmax

GARBAGE = st.sampled_from([math.inf, -math.inf, math.nan, 3e38, -1e30, 1e4])


@dataclass
class Case:
    """Operands of one call; `own_key` says that query i is token i."""

    query: Tensor
    key: Tensor
    value: Tensor
    policy: Tensor
    mask: Tensor | None
    grad: Tensor
    own_key: bool

    def run(self) -> Tensor:
        return masked_attention(
            self.query,
            self.key,
            self.value,
            self.policy,
            attn_mask=self.mask,
            own_key=self.own_key,
        )

    def leaves(self) -> dict[str, Tensor]:
        names = ["query", "key", "value", "policy"]
        if self.mask is not None and self.mask.is_floating_point():
            names.append("mask")
        return {name: getattr(self, name).requires_grad_() for name in names}

    def grads(self, out: Tensor | None = None) -> dict[str, Tensor]:
        """Gradients of `out`, or of a new run."""
        leaves = self.leaves()
        out = self.run() if out is None else out
        found = torch.autograd.grad(out, list(leaves.values()), self.grad)
        return dict(zip(leaves, found, strict=True))


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float64,
    min_kept: int = 0,
    own_key: bool | None = None,
    masks: tuple[str, ...] = ("none", "bool", "float", "heads", "images"),
) -> Case:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keys, channels = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    own = draw(st.booleans()) if own_key is None else own_key
    queries = keys if own else draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    policy = torch.zeros(batch, keys, dtype=dtype)
    for row in policy:
        kept = draw(st.integers(min_kept, keys))
        row[torch.randperm(keys, generator=generator)[:kept]] = 1
    mask = {
        "none": None,
        "bool": normal(batch, 1, queries, keys) < 0.5,
        "float": normal(queries, keys),
        "heads": normal(1, heads, queries, keys).masked_fill(
            normal(1, heads, queries, keys) > 0.5, -math.inf
        ),
        "images": normal(batch, 1, 1, keys),
    }[draw(st.sampled_from(masks))]
    query = normal(batch, heads, queries, channels) * draw(st.sampled_from([0.0, 1.0, 50.0]))
    key, value = normal(batch, heads, keys, channels), normal(batch, heads, keys, channels)
    return Case(query, key, value, policy, mask, normal(*query.shape), own)


def additive(case: Case) -> Tensor:
    """The host's mask as what is added to logits, [B, H, Lq, Lk]."""
    shape = (*case.query.shape[:3], case.key.shape[2])
    if case.mask is None:
        return torch.zeros(shape, dtype=case.query.dtype)
    mask = case.mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=case.query.dtype).masked_fill(~mask, -math.inf)
    return mask.detach().expand(shape)


def by_the_formulas(case: Case) -> dict[str, Tensor]:
    """Output and gradients, one row at a time."""
    batch, heads, queries, channels = case.query.shape
    scale, mask = channels**-0.5, additive(case)
    found = {name: torch.zeros_like(x) for name, x in case.leaves().items()}
    found |= {"out": torch.zeros_like(case.query), "mask": torch.zeros_like(mask)}
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        q, k, v, g = case.query[b, h, i], case.key[b, h], case.value[b, h], case.grad[b, h, i]
        logits = k @ q * scale + mask[b, h, i]
        seen = case.policy[b] > 0.5
        if case.own_key:
            seen[i] = True
        seen = seen & (logits > -math.inf)
        comeback = (logits > -math.inf).to(logits.dtype)  # where there is no lse to compare with
        weight = torch.zeros_like(logits)
        if seen.any():
            lse = logits[seen].logsumexp(0)
            comeback = (logits - lse).clamp(max=0).exp()
            weight[seen] = (logits[seen] - lse).exp()
        out = weight @ v
        flow = (v - out) @ g
        policy = comeback * flow
        if case.own_key:
            policy[i] = 0
        found["out"][b, h, i] = out
        found["policy"][b] += policy
        found["mask"][b, h, i] = weight * flow
        found["query"][b, h, i] = weight * flow @ k * scale
        found["key"][b, h] += torch.outer(weight * flow, q) * scale
        found["value"][b, h] += torch.outer(weight, g)
    if case.mask is not None:
        found["mask"] = found["mask"].sum_to_size(case.mask.shape)
    return {name: x.detach() for name, x in found.items()}


def kept_alone(case: Case, image: int) -> Tensor:
    """Attention of one image's kept tokens after the dropped ones have left."""
    keep = case.policy[image].nonzero()[:, 0]
    rows = keep if case.own_key else torch.arange(case.query.shape[2])
    query = case.query[image : image + 1, :, rows]
    key, value = (x[image : image + 1, :, keep] for x in (case.key, case.value))
    mask = additive(case)[image : image + 1][:, :, rows][..., keep]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0]


def spoil(x: Tensor, policy: Tensor, garbage: float) -> Tensor:
    """`x` with other contents in the dropped tokens."""
    return x.masked_fill((policy < 0.5)[:, None, :, None], garbage)


@given(cases())
def test_output_and_every_gradient_follow_the_formulas(case: Case) -> None:
    wanted = by_the_formulas(case)
    out = case.run()
    torch.testing.assert_close(out, wanted["out"], rtol=1e-9, atol=1e-9)
    for name, grad in case.grads().items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-8, atol=1e-8, msg=name)


@given(cases(dtype=torch.float32, min_kept=1))
def test_kept_rows_are_what_they_are_without_the_dropped_tokens(case: Case) -> None:
    out = case.run()
    for image, policy in enumerate(case.policy):
        rows = out[image, :, policy > 0.5] if case.own_key else out[image]
        wanted = kept_alone(case, image)
        torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-4)


@given(cases(dtype=torch.float32), GARBAGE, GARBAGE)
def test_contents_of_dropped_tokens_do_not_matter(case: Case, one: float, other: float) -> None:
    kept = (case.policy > 0.5)[:, None, :, None]
    rows = kept.expand_as(case.query) if case.own_key else torch.ones_like(case.query) > 0
    case.grad.masked_fill_(~rows, 0)
    clean, clean_grads = case.run(), case.grads()
    spoilt = replace(
        case,
        query=case.query.detach(),
        key=spoil(case.key.detach(), case.policy, one),
        value=spoil(case.value.detach(), case.policy, other),
    )
    out = spoilt.run()
    torch.testing.assert_close(out[rows], clean[rows], rtol=0, atol=0)
    grads = spoilt.grads()
    assert all(grad.isfinite().all() for grad in grads.values())
    for name in ("key", "value"):
        torch.testing.assert_close(
            grads[name] * kept, clean_grads[name] * kept, rtol=1e-5, atol=1e-5
        )


@given(cases(dtype=torch.float32, own_key=True), GARBAGE)
def test_queries_of_dropped_tokens_do_not_matter(case: Case, garbage: float) -> None:
    rows = (case.policy > 0.5)[:, None, :, None].expand_as(case.query)
    spoilt = replace(case, query=spoil(case.query, case.policy, garbage))
    torch.testing.assert_close(spoilt.run()[rows], case.run()[rows], rtol=0, atol=0)


@given(cases())
def test_softmax_then_product_is_the_same_attention(case: Case) -> None:
    out, grads = case.run(), case.grads()
    leaves = case.leaves()
    scores = case.query @ case.key.mT * case.query.shape[-1] ** -0.5
    scores = scores + (additive(case) if leaves.get("mask") is None else leaves["mask"])
    p = masked_softmax(scores, case.policy, query_dim=-2 if case.own_key else None)
    spelled = p @ hide_dropped(case.value, case.policy, 2)
    torch.testing.assert_close(spelled, out, rtol=1e-9, atol=1e-9)
    for name, grad in case.grads(spelled).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-8, atol=1e-8, msg=name)


@given(cases(), st.integers(1, 40))
def test_slices_do_not_show(case: Case, entries: int) -> None:
    out, grads = case.run(), case.grads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "_SLICE_CPU", entries)
        patch.setattr(_fused, "_SLICE", entries)
        sliced, sliced_grads = case.run(), case.grads()
    torch.testing.assert_close(sliced, out, rtol=1e-9, atol=1e-9)
    for name, grad in sliced_grads.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-9, atol=1e-9, msg=name)


LOW = st.sampled_from([torch.float16, torch.bfloat16])


@given(LOW.flatmap(lambda dtype: cases(dtype=dtype)), st.booleans())
def test_low_precision_is_near(case: Case, as_on_accelerators: bool) -> None:
    floating = case.mask is not None and case.mask.is_floating_point()
    wide = replace(
        case,
        **{name: getattr(case, name).double() for name in ("query", "key", "value", "policy")},
        mask=case.mask.double() if floating else case.mask,
        grad=case.grad.double(),
    )
    wanted = by_the_formulas(wide)
    with pytest.MonkeyPatch.context() as patch:
        if as_on_accelerators:
            patch.setattr(_fused, "_factor_dtype", lambda query: query.dtype)
        out, grads = case.run(), case.grads()
    assert out.dtype == case.query.dtype
    step = torch.finfo(case.query.dtype).eps
    torch.testing.assert_close(out.double(), wanted["out"], rtol=8 * step, atol=8 * step)
    for name, grad in grads.items():
        # The gradient of a key is a sum over queries, whose rounding it inherits.
        scale = max(wanted[name].abs().max(), wide.query.abs().max(), 1)
        assert grad.dtype == case.query.dtype
        assert (grad - wanted[name]).abs().max() <= 32 * step * scale, name


@given(cases(own_key=True, masks=("none", "float")))
def test_an_image_does_not_depend_on_the_others(case: Case) -> None:
    out = case.run()
    for image in range(len(out)):
        here = slice(image, image + 1)
        alone = replace(
            case,
            query=case.query[here],
            key=case.key[here],
            value=case.value[here],
            policy=case.policy[here],
        )
        torch.testing.assert_close(alone.run(), out[here], rtol=1e-12, atol=1e-12)
