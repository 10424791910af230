"""Theorem 12 of docs/theorems.md: a certificate exists only where a leak would have been seen."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.toys.table import TOYS, Toy
from tests.toys.vit import Block, Vit, pixels, randomize_weights
from tokenprune.checks import verify as verify_file
from tokenprune.checks.proof import Theorems
from tokenprune.checks.telling import telling
from tokenprune.errors import VerificationError
from tokenprune.ops.attention import masked_attention
from tokenprune.reductions.bypass import SPLITS
from tokenprune.rewrite.kept import gathered
from tokenprune.rewrite.kept.masked import Masked
from tokenprune.rewrite.kept.token_ops import MASKED

LIVELY = ("timm_vit", "eager", "mean_and_max", "relative_bias")
BYPASS = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}, "mode": "bypass"}


class Gated(Block):
    """A block that starts as the identity, as in Flamingo."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.gate.tanh() * (super().forward(x, mask) - x)


def zero_head(host: Any) -> None:
    for parameter in host.head.parameters():
        parameter.zero_()


def layer_scale(size: float) -> Callable[[Any], None]:
    def scale(host: Any) -> None:
        for block in host.blocks:
            block.gamma1.fill_(size)
            block.gamma2.fill_(size)

    return scale


def zero_gates(host: Any) -> None:
    for block in host.blocks:
        block.gate.zero_()


def zero_last_block(host: Any) -> None:
    for parameter in host.blocks[-1].parameters():
        parameter.zero_()


def no_positions(host: Any) -> None:
    host.position.zero_()


HOSTS: dict[str, tuple[Callable[[Any], None], type[Block], Tensor]] = {
    "zero head": (zero_head, Block, pixels(2, 16)),
    "LayerScale 0": (layer_scale(0.0), Block, pixels(2, 16)),
    "LayerScale 1e-6": (layer_scale(1e-6), Block, pixels(2, 16)),
    "gates 0": (zero_gates, Gated, pixels(2, 16)),
    "zero last block": (zero_last_block, Block, pixels(2, 16)),
    "equal patches": (no_positions, Block, torch.zeros(2, 3, 16, 16)),
}
SELECT, CHOOSE = gathered.select_gathered, SPLITS["mask"].merge
ALL = pytest.mark.parametrize("name", HOSTS)


def silent(name: str, recipe: dict[str, Any] | None = None) -> tuple[Any, Tensor]:
    """A wrapped host whose outputs do not show what becomes of dropped tokens, and its input."""
    silence, block, x = HOSTS[name]
    torch.manual_seed(0)
    prefix = 0 if name == "equal patches" else 1  # a class token is not equal to them
    host = Vit(prefix, block).eval()
    randomize_weights(host, 10.0)
    with torch.no_grad():
        silence(host)
    blocks = [2] if name == "zero last block" else [1, 2]
    recipe = recipe or {"version": 1, "schedule": {"blocks": blocks, "keep_ratio": 0.6}}
    facts = replace(TOYS["prefix_1"].facts, num_prefix_tokens=prefix)
    return tokenprune.wrap(
        host, recipe, adapter=facts, example_inputs=x, verify=False, train=False
    ).eval(), x


def leaking(query: Tensor, key: Tensor, value: Tensor, policy: Tensor, **rest: Any) -> Tensor:
    """Attention that gives a tenth of its weight to all tokens, dropped ones included."""
    kept = masked_attention(query, key, value, policy, **rest)
    finite = [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (key, value)]
    return kept.lerp(masked_attention(query, *finite, torch.ones_like(policy), **rest), 0.1)


def other_tokens(tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The gather path with the numbers of the kept tokens, but the tokens beside them."""
    left, numbers = SELECT(tokens, *rest)
    return (left if left is tokens else SELECT(tokens.roll(1, dims=1), *rest)[0]), numbers


def without_gradient(query: Tensor, key: Tensor, value: Tensor, policy: Tensor, **rest: Any) -> Any:
    return masked_attention(query, key, value, policy.detach(), **rest)


def both_branches(x: Tensor, branch: Tensor, *rest: Any) -> Tensor:
    """Bypass that adds a tenth of the branch that was not chosen."""
    return CHOOSE(x, branch, *rest).lerp(torch.nan_to_num(branch, 0.0, 0.0, 0.0), 0.1)


@ALL
def test_12_a_silent_host_is_proven_on_a_lively_copy(name: str) -> None:
    model, x = silent(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    certificate = tokenprune.verify(model, x)
    assert certificate.enlivened
    assert certificate.checks[-1].name.endswith(", enlivened")
    assert all(check.passed for check in certificate.checks)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@ALL
def test_12_a_leak_in_a_silent_host_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "equal patches":  # whatever else dropped tokens may hold shows there too
        monkeypatch.setattr(gathered.Gathered, "choice", staticmethod(other_tokens))
    else:
        monkeypatch.setattr(Masked, "ops", MASKED._replace(attention=leaking))
    model, x = silent(name)
    Theorems(model, {"x": x}).checks(gradients=False)  # says nothing
    with pytest.raises(VerificationError, match="mask and gather path differ"):
        tokenprune.verify(model, x)


@ALL
def test_12_a_decision_that_nothing_teaches_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Masked, "ops", MASKED._replace(attention=without_gradient))
    model, x = silent(name)
    Theorems(model, {"x": x}).checks(gradients=True)
    with pytest.raises(VerificationError, match="outputs do not teach the decision of stage 0"):
        tokenprune.verify(model, x)


@pytest.mark.parametrize("name", ["zero head", "gates 0"])
def test_12_a_wrong_branch_in_a_silent_bypass_host_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = silent(name, BYPASS)
    assert tokenprune.verify(model, x).enlivened
    monkeypatch.setitem(SPLITS, "mask", SPLITS["mask"]._replace(merge=both_branches))
    model, x = silent(name, BYPASS)
    Theorems(model, {"x": x}).checks(gradients=True)
    with pytest.raises(VerificationError, match="mask and gather path differ"):
        tokenprune.verify(model, x)


@pytest.mark.parametrize("toy", [TOYS[name] for name in LIVELY], ids=LIVELY)
def test_12_a_lively_host_is_not_copied(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.wrap(verify=False, train=False)

    def no_copy(model: Any) -> Any:
        raise AssertionError("a host in which leaks show was copied")

    monkeypatch.setattr(verify_file, "copy", type("", (), {"deepcopy": staticmethod(no_copy)}))
    certificate = tokenprune.verify(model, toy.inputs())
    assert not certificate.enlivened
    (share,) = [c for c in certificate.checks if c.name == "share of a leak that could hide"]
    assert 0 < share.error < share.bound


def test_12_the_measured_leak_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak of a tenth at every operator changes the output by about what was measured."""
    toy = TOYS["timm_vit"]
    honest = Theorems(toy.wrap(verify=False, train=False), toy.inputs())
    honest.checks(gradients=False)
    measured = sum(leak.size**2 for leak in telling(honest).leaks) ** 0.5
    monkeypatch.setattr(Masked, "ops", MASKED._replace(attention=leaking))
    proof = Theorems(toy.wrap(copy.deepcopy(toy.build()), verify=False, train=False), toy.inputs())
    with torch.no_grad():
        (ours,), (theirs,) = proof._run("mask"), honest._run("mask")
    real = float((ours - theirs).square().mean().sqrt() / theirs.abs().max()) * 10
    assert 0.3 < real / measured < 3


class Constant(Vit):
    """Its output depends on no patch."""

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0] * 0.0


class Faint(Vit):
    """Its output hardly depends on the patches, whatever its weights."""

    def pool(self, x: Tensor) -> Tensor:
        return 1.0 + x[:, 0] * 1e-6


class MixesImages(Vit):
    """Its output for an image depends on the others of the batch."""

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x * (1 + x.mean(dim=0, keepdim=True)))


class Detached(Vit):
    """No gradient passes through its last norm."""

    def pool(self, x: Tensor) -> Tensor:
        return super().pool(x.detach())


def host_of(cls: type[Vit]) -> Vit:
    torch.manual_seed(0)
    host = cls()
    randomize_weights(host, 10.0)
    return host


def test_12_where_nothing_can_be_seen_there_is_no_certificate() -> None:
    says = r"Constant cannot be proven: its outputs do not depend on .* at stage 0 \(block 1\)"
    with pytest.raises(VerificationError, match=says):
        TOYS["prefix_1"].wrap(host_of(Constant))


def test_12_what_float32_cannot_see_float64_can(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = TOYS["prefix_1"]
    certificate = tokenprune.verify(
        toy.wrap(host_of(Faint), verify=False, train=False), toy.inputs()
    )
    assert [c.bound for c in certificate.checks if c.name.startswith("mask = gather")] == [
        1e-4,
        1e-9,
    ]
    monkeypatch.setattr(Masked, "ops", MASKED._replace(attention=leaking))
    with pytest.raises(VerificationError, match="mask and gather path differ"):
        toy.wrap(host_of(Faint))


@pytest.mark.parametrize("images", [1, 2])
def test_12_equal_images_do_not_hide_that_a_host_mixes_them(images: int) -> None:
    x = torch.ones(images, 3, 16, 16)
    model = (
        TOYS["prefix_1"]
        .wrap(host_of(MixesImages), example_inputs=x, verify=False, train=False)
        .eval()
    )
    Theorems(model, {"x": x}).checks(gradients=False)
    with pytest.raises(VerificationError, match="depends on the other images of its batch"):
        tokenprune.verify(model, x)


def test_12_without_gradients_all_leaks_are_measured_together() -> None:
    toy = TOYS["prefix_1"]
    proof = Theorems(toy.wrap(host_of(Detached), verify=False, train=False).eval(), toy.inputs())
    proof.checks(gradients=False)
    found = telling(proof)
    assert [leak.stage for leak in found.leaks] == [None]
    assert found.told
    assert not found.taught


def test_12_low_precision_is_proven_in_float32() -> None:
    toy = TOYS["bfloat16"]
    certificate = tokenprune.verify(toy.wrap(verify=False, train=False), toy.inputs())
    assert certificate.enlivened
    bounds = {c.bound for c in certificate.checks if c.name.startswith("mask = gather")}
    assert bounds == {5e-2, 1e-4}
