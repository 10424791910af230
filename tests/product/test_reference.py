"""The engine against DynamicViT as the papers have it: eval outputs, losses and their gradients.

All in double precision, where rounding cannot hide a difference, on small hosts of the three
published families with random weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.product.reference import (
    PlainViT,
    Result,
    Weights,
    gumbel_noise,
    loss_parts,
    policy_softmax,
    run_plain,
)
from tests.product.reference_swin import Swin, run_swin
from tokenprune.losses import PruningLoss
from tokenprune.models import LVViT
from tokenprune.recipe.counting import num_keep

CLASSES = 7
RATIOS = (0.7, 0.49, 0.343)
EXACT = 1e-9
PARITY = 1e-4  # relative; what the published softmax's 1e-6 costs


@dataclass(frozen=True)
class Family:
    """A published family, small.

    Attributes:
        make: Builds the host.
        reference: (weights, images, counts= or noise=) to a `Result`.
        blocks: Where its stages stand.
        size: Side of its images.
        patches: N.
        mode: See `Recipe`.
        token_distance: See `PruningLoss`.
        token_set: See `PruningLoss`.
    """

    make: Callable[[], nn.Module]
    reference: Callable[..., Result]
    blocks: tuple[int, ...]
    size: int
    patches: int
    mode: str = "remove"
    token_distance: str = "mse"
    token_set: str = "kept"


def deit() -> nn.Module:
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=24,
        patch_size=4,
        embed_dim=24,
        depth=4,
        num_heads=2,
        num_classes=CLASSES,
    )


def lvvit() -> nn.Module:
    return LVViT(
        img_size=24,
        patch_size=4,
        num_classes=CLASSES,
        embed_dim=24,
        depth=4,
        num_heads=2,
        stem_width=8,
    )


SWIN_SIZES: dict[str, Any] = {"depths": (1, 4, 1), "heads": (1, 2, 2), "window": 4}


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        embed_dim=12,
        depths=SWIN_SIZES["depths"],
        num_heads=SWIN_SIZES["heads"],
        window_size=SWIN_SIZES["window"],
        num_classes=CLASSES,
        drop_path_rate=0.0,
    )


def reference_deit(weights: Weights, images: Tensor, **options: Any) -> Result:
    host = PlainViT(heads=2, stages=(1, 2, 3), depth=4)
    return run_plain(weights, images, host, **options)


def reference_lvvit(weights: Weights, images: Tensor, **options: Any) -> Result:
    host = PlainViT(heads=2, stages=(1, 2, 3), depth=4, eps=1e-5, scale=2.0, stem="lvvit")
    return run_plain(weights, images, host, **options)


def reference_swin(weights: Weights, images: Tensor, **options: Any) -> Result:
    return run_swin(weights, images, Swin(**SWIN_SIZES, stages=(2, 3, 4)), **options)


FAMILIES = {
    "deit": Family(deit, reference_deit, (1, 2, 3), 24, 36),
    "lvvit": Family(lvvit, reference_lvvit, (1, 2, 3), 24, 36, token_distance="kl"),
    # block 1 of the level stays dense; the stages change between plain and shifted windows
    "swin": Family(swin, reference_swin, (2, 3, 4), 32, 64, mode="bypass", token_set="all"),
}
families = pytest.mark.parametrize("name", FAMILIES)


@cache
def wrapped(name: str) -> Any:
    family = FAMILIES[name]
    stages = [
        {"block": block, "keep_ratio": ratio}
        for block, ratio in zip(family.blocks, RATIOS, strict=True)
    ]
    recipe = {"version": 1, "mode": family.mode, "stages": stages}
    return tokenprune.wrap(family.make().double(), recipe, verify=False)


def fresh(name: str, seed: int, *, init_scale: bool = False) -> Any:
    """The wrapped host with new random weights: far from those at the start, or like them."""
    model = wrapped(name)
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * std

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                one = 1.0 if key.endswith("weight") else 0.0  # norms; every other 1-d is a bias
                parameter.copy_(one + normal(parameter, 0.02 if init_scale else 0.2))
            elif init_scale:
                parameter.copy_(normal(parameter, 0.02))
            else:
                gain = 2.0 if "qkv" in key or "token_predictors" in key else 1.2
                parameter.copy_(normal(parameter, gain * parameter[0].numel() ** -0.5))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(normal(buffer, 0.2))
            elif key.endswith("running_var"):
                buffer.copy_(1.0 + normal(buffer, 0.2).abs())
    return model


def draw(name: str, batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = FAMILIES[name].size
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


seeds = st.integers(0, 10_000)


@families
@given(seed=seeds, batch=st.integers(1, 3), ratio=st.floats(0.03, 1.0))
def test_eval_is_the_papers(name: str, seed: int, batch: int, ratio: float) -> None:
    """Same kept tokens, same predictor outputs, same logits, same final tokens."""
    model = fresh(name, seed).eval()
    images = draw(name, batch, seed)
    model.set_keep_ratio(ratio)
    counts = [num_keep(FAMILIES[name].patches, ratio ** (stage + 1)) for stage in range(3)]
    with torch.no_grad():
        logits, trace = model(images, return_trace=True)
        expected = FAMILIES[name].reference(model.state_dict(), images, counts=counts)
    for kept, scores in zip(expected.kept, expected.keep_logits, strict=True):
        # scores may be 0 to the last bit; which of equal ones stays is not the paper's
        ranked = scores[..., 0].sort(dim=1, descending=True).values
        edge = ranked[:, kept.shape[1] - 1 : kept.shape[1] + 1]
        assume(edge.shape[1] < 2 or bool((edge[:, 0] > edge[:, 1]).all()))
    for stage, kept, scores in zip(trace.stages, expected.kept, expected.keep_logits, strict=True):
        if ratio < 1.0:
            assert torch.equal(stage.keep_indices, kept)
        there = stage.keep_logits[stage.keep_logits[..., 0] > float("-inf")]
        torch.testing.assert_close(there, scores.flatten(0, 1), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(logits, expected.logits, rtol=EXACT, atol=EXACT)
    tokens = trace.patch_tokens.reshape(expected.tokens.shape)
    torch.testing.assert_close(tokens, expected.tokens, rtol=EXACT, atol=EXACT)


@families
def test_dense_is_the_papers(name: str) -> None:
    model = fresh(name, 0).eval()
    images = draw(name, 2, 0)
    with torch.no_grad(), model.using(path="dense"):
        logits = model(images)
    expected = FAMILIES[name].reference(model.state_dict(), images)
    torch.testing.assert_close(logits, expected.logits, rtol=EXACT, atol=EXACT)


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers again, for a graph of their own."""
    names = {name for name, _ in model.named_parameters()}
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return {key: value.requires_grad_(key in names) for key, value in state.items()}


def train_ours(
    name: str,
    model: Any,
    images: Tensor,
    labels: Tensor,
    teacher: Result,
    seed: int,
    ratio_weight: float,
) -> tuple[Any, dict[str, Tensor], Tensor, PruningLoss]:
    """Trace, loss parts, weighted loss of the engine, and the library's loss."""
    family = FAMILIES[name]
    with model.using(generator=torch.Generator().manual_seed(seed)):
        logits, trace = model(images, return_trace=True)
    tokens = trace.patch_tokens.reshape(teacher.tokens.shape)
    if name == "lvvit":
        tokens = model.aux_head(tokens)
    loss = PruningLoss(
        keep_ratios=RATIOS,
        ratio=ratio_weight,
        token_distance=family.token_distance,  # type: ignore[arg-type]
        token_set=family.token_set,  # type: ignore[arg-type]
    )
    total, parts = loss(
        logits,
        labels,
        [stage.decision for stage in trace.stages],
        teacher_logits=teacher.logits,
        student_tokens=tokens,
        teacher_tokens=teacher.tokens if teacher.token_logits is None else teacher.token_logits,
    )
    return trace, dict(parts), total, loss


def train_reference(
    name: str,
    weights: Weights,
    images: Tensor,
    labels: Tensor,
    teacher: Result,
    seed: int,
    loss: PruningLoss,
) -> tuple[Result, dict[str, Tensor], Tensor]:
    """The same of the reference."""
    family = FAMILIES[name]
    # a predictor's gradient may be as small as the published 1e-6: with less, formulas are compared
    softmax = {"softmax": partial(policy_softmax, eps=1e-8)} if family.mode == "remove" else {}
    result = family.reference(weights, images, noise=gumbel_noise(seed), **softmax)
    lv = name == "lvvit"
    parts = loss_parts(
        result.logits,
        labels,
        result.decisions,
        RATIOS,
        teacher.logits,
        result.token_logits if lv else result.tokens,
        teacher.token_logits if lv else teacher.tokens,
        kind=family.token_distance,  # type: ignore[arg-type]
        everyone=family.token_set == "all",
    )
    total = sum(getattr(loss, part) * value for part, value in parts.items())
    return result, parts, total


@families
@given(seed=seeds, ratio_weight=st.sampled_from([0.0, 2.0, 10.0]))
@example(seed=1318, ratio_weight=0.0)
def test_training_is_the_papers(name: str, seed: int, ratio_weight: float) -> None:
    """Same decisions, loss parts and gradients, at the scale of fresh weights.

    The gradients are those of every parameter. The ratio term outweighs the others in those of the
    predictors, so its weight is 0 in some draws. In an image that keeps no token
    the class token sees itself alone; there ours limits what a dropped key would weigh, on purpose.
    """
    model = fresh(name, seed, init_scale=True).train()
    images, labels = draw(name, 3, seed), torch.tensor([0, 3, 6])
    before = leaves(model)
    other = {key: value * 1.1 for key, value in leaves(model).items()}
    teacher = FAMILIES[name].reference(other, images)
    trace, parts, total, loss = train_ours(name, model, images, labels, teacher, seed, ratio_weight)
    result, expected, wanted = train_reference(name, before, images, labels, teacher, seed, loss)
    assume(all(decision.sum(1).min() > 0 for decision in result.decisions))
    for stage, decision in zip(trace.stages, result.decisions, strict=True):
        assert torch.equal(stage.decision, decision)
    assert parts.keys() == {part for part in expected if part != "ratio" or ratio_weight}
    for part, value in parts.items():
        torch.testing.assert_close(value, expected[part].detach(), rtol=PARITY, atol=0.0)

    trained = [key for key, value in before.items() if value.requires_grad]
    ours = torch.autograd.grad(
        total, [model.get_parameter(key) for key in trained], allow_unused=True
    )
    theirs = torch.autograd.grad(wanted, [before[key] for key in trained], allow_unused=True)
    for key, found, gradient in zip(trained, ours, theirs, strict=True):
        if gradient is None:
            assert found is None or not found.any(), key
            continue
        scale = gradient.norm()
        if "token_predictors" in key:
            assert scale > 0, key
            # of the predictor's gradient as a whole: in a last bias the two classes nearly cancel,
            # and what is left is of the size of the published eps
            predictor = key[: key.index(".", len("token_predictors."))]
            scale = torch.stack(
                [g.norm() for k, g in zip(trained, theirs, strict=True) if k.startswith(predictor)]
            ).norm()
        assert (found - gradient).norm() <= PARITY * scale + 1e-12, key
