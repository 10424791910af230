"""`verify`: what its certificate says, what each check refuses, and that it changes nothing."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.analysis.test_reading import IMAGES, Detects
from tokenprune.checks import verify as verifying
from tokenprune.checks.certificate import Certificate, Check
from tokenprune.checks.proof import Theorems
from tokenprune.checks.verify import verify, verify_wrapped
from tokenprune.errors import (
    HostError,
    NotWrappedError,
    PlanError,
    UnsupportedHostError,
    VerificationError,
)
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops import select_topk
from tokenprune.rewrite.kept import gathered, masked
from tokenprune.rewrite.kept.token_ops import MASKED
from tokenprune.rewrite.stages import last_stay
from tokenprune.runtime.difference import EXACT
from tokenprune.runtime.model import pruning_of

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


class Vit(timm.models.vision_transformer.VisionTransformer):
    """A small host of which a test can change the tokens on their way."""

    def __init__(self, change: Callable[["Vit", Tensor], Tensor] | None = None) -> None:
        super().__init__(**SMALL, num_classes=5)
        self.change = change
        self.calls = 0
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Any:
        return super().forward(x if self.change is None else self.change(self, x))


def wrapped(host: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return tokenprune.wrap(
        host or Vit(), RECIPE, **{"verify": False, "train": False, **options}
    ).eval()


def names(certificate: Certificate) -> list[str]:
    return [check.name for check in certificate.checks]


THEOREMS = [
    "keep_ratio 1 is the host",
    "mask = gather on random kept sets",
    "dropped tokens may hold NaN and inf",
    "an image alone = in a batch",
    "predictor parameters without a finite gradient",
    "share of a leak that could hide",
    "decisions without a gradient from the outputs",
]


def test_the_certificate() -> None:
    certificate = verify(wrapped())
    assert names(certificate) == THEOREMS
    assert all(check.passed and check.error <= check.bound for check in certificate.checks)
    assert certificate.checks[0].bound == certificate.checks[0].error == 0.0
    assert certificate.mask_vs_gather == certificate.checks[1].error
    facts = (certificate.num_patches, certificate.num_prefix_tokens, certificate.num_keep)
    assert facts == (16, 1, (11, 7))
    first, *rest = str(certificate).splitlines()
    assert first == "Vit (timm/vision_transformer, remove): 16 -> 11 -> 7 patch tokens"
    assert len(rest) == len(THEOREMS)
    assert all(line.strip().startswith(name) for line, name in zip(rest, THEOREMS, strict=True))
    assert rest[0].endswith("0.0e+00 (bound 0e+00)")


def test_a_difference_that_is_no_number_does_not_pass() -> None:
    assert Check("x", 1e-5, 1e-4).passed
    assert not Check("x", 1e-3, 1e-4).passed
    assert not Check("x", float("nan"), 1e-4).passed


def test_a_certificate_without_a_mask_path() -> None:
    assert Certificate("Vit", "generic", "merge", 4, (4,), 1, (2,), ()).mask_vs_gather == 0.0


def test_what_is_not_wrapped() -> None:
    with pytest.raises(NotWrappedError, match=r"found Vit.*tokenprune\.wrap"):
        verify(Vit())


def nudged(*arguments: Any) -> Any:
    tokens, kept = SELECT_GATHERED(*arguments)
    return tokens + 1e-6, kept


def detached(*arguments: Any) -> Any:
    return DECIDE(*arguments).detach()


SELECT_GATHERED, DECIDE = gathered.select_gathered, masked.decide


def read_as_they_are(x: Tensor, policy: Tensor | None, dim: int) -> Tensor:
    return x


READS_ALL = MASKED._replace(hide=read_as_they_are)


def everyone_is_seen(decision: Tensor, num_prefix: int) -> Tensor:
    return decision.new_ones(decision.shape[0], num_prefix + decision.shape[1])


@pytest.mark.parametrize(
    ("place", "name", "broken", "says"),
    [
        (
            gathered.Gathered,
            "choice",
            staticmethod(nudged),
            "every token kept is not the host.*'keep_ratio 1 is",
        ),
        (
            masked,
            "policy_of",
            everyone_is_seen,
            "gather path differ first at node '.*softmax",
        ),
        (masked.Masked, "ops", READS_ALL, "contents of dropped tokens reach the output"),
        (masked, "decide", detached, r"predictors cannot be trained.*difference 2\.00e\+01"),
    ],
    ids=["identity", "paths", "contents", "gradients"],
)
def test_each_broken_promise_is_named(
    place: Any, name: str, broken: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Vit()
    for block in host.blocks:
        block.attn.fused_attn = False  # a softmax and two products, each with a rule of its own
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.normal_(std=0.3)
    monkeypatch.setattr(place, name, broken)
    model = wrapped(host)
    with pytest.raises(VerificationError, match=f"(?s)Vit cannot be pruned safely: .*{says}"):
        verify(model)


def minus_the_mean_of_the_batch(host: Vit, x: Tensor) -> Tensor:
    return x - x.mean(dim=0, keepdim=True)


def plus_the_first(host: Vit, x: Tensor) -> Tensor:
    return x + x[:1]


def plus_the_last(host: Vit, x: Tensor) -> Tensor:
    return x + x[-1:]


def plus_the_one_from_the_end(host: Vit, x: Tensor) -> Tensor:
    return x + x.flip(0)


MIXES = [minus_the_mean_of_the_batch, plus_the_first, plus_the_last, plus_the_one_from_the_end]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_host_that_mixes_images_is_refused_whatever_the_example(
    images: int, mix: Callable[[Vit, Tensor], Tensor]
) -> None:
    x = torch.randn(images, 3, 32, 32)
    model = wrapped(Vit(mix), example_inputs=x)
    with pytest.raises(VerificationError, match="depends on the other images of its batch"):
        verify(model, x)
    plain = wrapped(example_inputs=x)
    assert names(verify(plain, x)) == THEOREMS


def test_the_brief_proof_of_a_big_host_refuses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "BIG", 0)
    x = torch.randn(2, 3, 32, 32)
    host = Vit()
    for block in host.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.normal_(std=0.3)
    brief = names(verify_wrapped(wrapped(host), x))
    at_once = "mask = gather in a batch, dropped NaN, inf"
    assert brief == [THEOREMS[0], at_once, "share of a leak that could hide"]
    mixes = wrapped(Vit(minus_the_mean_of_the_batch), example_inputs=x)
    with pytest.raises(VerificationError, match="depends on the other images"):
        verify_wrapped(mixes, x)
    monkeypatch.setattr(masked.Masked, "ops", READS_ALL)
    with pytest.raises(VerificationError, match="mask and gather path differ"):
        verify_wrapped(wrapped(host), x)


def test_a_host_that_decides_by_the_batch_size_is_not_asked_for_another() -> None:
    model = wrapped(Vit(lambda host, x: x * 2 if x.shape[0] == 2 else x))
    assert names(verify(model)) == [name for name in THEOREMS if "alone" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_float64_decides_where_another_dtype_is_too_coarse(dtype: torch.dtype) -> None:
    host = Vit()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.normal_(std=0.3)
    model = wrapped(host).to(dtype)
    proof = Theorems(model, {"x": torch.randn(2, 3, 32, 32, dtype=dtype)})
    proof.bound = 2 * EXACT  # as if rounding had been larger than what is allowed
    with torch.no_grad():
        (check,) = proof.paths()
    assert check.passed
    assert check.bound == EXACT
    name = str(dtype).removeprefix("torch.")
    assert check.name.startswith(f"mask = gather on random kept sets, in float64 ({name}: ")
    assert model.head.weight.dtype == dtype


def test_an_output_without_tensors_is_refused() -> None:
    class Silent(Vit):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return 3

    with pytest.raises(HostError, match="Silent returns no tensor for the input"):
        wrapped(Silent(), verify=True)


def counting(host: Vit, x: Tensor) -> Tensor:
    host.calls += 1
    host.seen += 1
    host.last_size = x.shape[-1]
    return x


@pytest.mark.parametrize("refused", [False, True])
def test_nothing_is_changed(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Vit(counting).train()
    host.blocks[0].eval()
    torch.manual_seed(0)
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False)
    buffer, modes = host.seen, [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, noise = set(vars(host)), torch.get_rng_state()
    if refused:
        monkeypatch.setattr(Theorems, "images", lambda self: self.refuse(Check("x", 1, 0), "no"))
        with pytest.raises(VerificationError, match=r"no\. Check 'x'"):
            verify(model)
    else:
        verify(model)
    tokenprune.profile(model)
    assert host.calls == 0
    assert host.seen.tolist() == [0.0, 0.0]
    assert host.seen is buffer
    assert set(vars(host)) == attributes
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), noise)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    host(torch.zeros(1, 3, 32, 32))
    assert (host.calls, host.seen[0].item()) == (1, 1.0)  # the host itself does count


class Writing(Vit):
    """Its output depends on what its calls write into a weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Any:
        with torch.no_grad():
            self.decay.mul_(0.5)
            self.seen += 1
        return super().forward(x) * self.decay + self.seen.sum()


def test_what_calls_write_is_put_back_after_each_run() -> None:
    twin, host = Writing().eval(), Writing().eval()
    model = wrapped(host, verify=True)
    assert (host.decay.item(), host.seen.tolist()) == (1.0, [0.0, 0.0])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for _ in range(2):
            model(x), twin(x)
        host.head = nn.Linear(16, 5)
        pruning_of(model).cache.clear()  # so that the next call makes a new trace, and proves it
        model(x), twin(x)
    assert torch.equal(host.decay, twin.decay)
    assert torch.equal(host.seen, twin.seen)


@pytest.mark.slow
def test_a_host_without_weights() -> None:
    with torch.device("meta"):
        host = Vit()
    with pytest.raises(UnsupportedHostError, match="'cls_token' of Vit is on the meta device"):
        tokenprune.wrap(host, RECIPE)
    model = wrapped(host)  # enough to be counted
    assert tokenprune.profile(model) == tokenprune.profile(wrapped())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    assert not any(parameter.is_meta for parameter in pruning_of(model).host.parameters())


def test_frozen_predictors_are_proven_as_if_they_were_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wrapped()
    model.token_predictors.requires_grad_(False)
    assert names(verify(model)) == THEOREMS
    assert not any(p.requires_grad for p in model.token_predictors.parameters())
    monkeypatch.setattr(masked, "decide", detached)
    with pytest.raises(VerificationError, match="predictors cannot be trained"):
        verify(other := wrapped())
    other.token_predictors.requires_grad_(False)
    with pytest.raises(VerificationError, match="predictors cannot be trained"):
        verify(other)


def test_batches_of_other_sizes_than_the_traced_one() -> None:
    model = wrapped()
    for batch in (1, 2, 5):
        assert names(verify(model, torch.randn(batch, 3, 32, 32))) == THEOREMS


def test_a_class_token_that_is_taken_for_a_patch_is_noticed() -> None:
    """Of 65 tokens, random sets alone happen to keep it in both images."""
    host = timm.models.VisionTransformer(**{**SMALL, "patch_size": 4}, num_classes=5).eval()
    recipe = {"version": 1, "schedule": {"blocks": [1], "keep_ratio": 0.7}}
    blocks, images = tuple(f"blocks.{n}" for n in range(3)), torch.randn(2, 3, 32, 32)
    for prefix, holds in ((1, nullcontext()), (0, pytest.raises(VerificationError))):
        facts = ArchSpec(blocks=blocks, norm="norm", num_prefix_tokens=prefix)
        with holds:
            tokenprune.wrap(host, recipe, adapter=facts, example_inputs=images, train=False)


@torch.no_grad()
def test_detection_tokens_are_not_merged_and_bound_the_counts() -> None:
    with pytest.raises(PlanError, match="last 2 tokens of this host, which are no patches"):
        tokenprune.wrap(Detects(), "merge-k0.7", example_inputs=IMAGES, train=False)
    model = tokenprune.wrap(Detects(), "token-norm-k0.7", example_inputs=IMAGES, train=False)
    model.set_keep_ratio(0.1)
    with pytest.raises(PlanError, match="The last 2 tokens always stay"):
        model(IMAGES)


def test_the_last_tokens_stay_where_scores_tie() -> None:
    scores = torch.zeros(2, 18, 2)
    scores[1, 3] = torch.nan
    kept = select_topk(last_stay(scores, 2), 6)
    assert (kept[:, -2:] == torch.tensor([16, 17])).all()
