"""DynamicViT's forward and loss written out from the papers: what the engine is held against.

`reference_swin` has Swin's forward.

Plain functions of a state dict. Nothing here is traced, rewritten or imported from the library, and
attention is spelled out. Names of the parameters are those of a wrapped timm host.

Sources: DynamicViT (arXiv 2106.02034, section 3), LV-ViT (arXiv 2104.10858). Where the published
training code says more than the papers (the 1e-6 of the masked softmax), it is followed.

Shape letters: B images, L sequence, N patches, K kept, D channels, H heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Noise",
    "PlainViT",
    "Result",
    "Softmax",
    "Weights",
    "decide",
    "gumbel_noise",
    "linear",
    "loss_parts",
    "mlp",
    "norm",
    "policy_softmax",
    "predict",
    "run_plain",
]

Weights = Mapping[str, Tensor]
Softmax = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int, Tensor], Tensor]
"""(stage, keep log-probabilities [B N 2]) to Gumbel noise of that shape."""


@dataclass
class Result:
    """What a forward gives.

    Attributes:
        logits: [B, classes]; of LV-ViT the sum of both heads.
        tokens: Final patch tokens after the norm.
        class_logits: LV-ViT's class head alone.
        token_logits: LV-ViT's dense head, [B, N or K, classes].
        decisions: [B, N] of each stage, in training.
        kept: [B, K] of each stage, in eval, ascending, in original numbers.
        keep_logits: [B, N', 2] of each stage.
    """

    logits: Tensor
    tokens: Tensor
    class_logits: Tensor | None = None
    token_logits: Tensor | None = None
    decisions: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    keep_logits: list[Tensor] = field(default_factory=list)


# Layers.


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x)))


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D] at [B, K]."""
    return torch.stack([image[rows] for image, rows in zip(x, index, strict=True)])


# The method: predictor, decision, masked softmax (DynamicViT, eq. 1 to 11).


def predict(w: Weights, name: str, x: Tensor, decision: Tensor | None) -> Tensor:
    """Keep and drop log-probabilities [B, N, 2]; the shared half is averaged over kept tokens."""
    z = F.gelu(linear(w, f"{name}.in_proj.1", norm(w, f"{name}.in_proj.0", x, 1e-5)))
    half = z.shape[-1] // 2
    weight = torch.ones_like(z[..., :1]) if decision is None else decision.unsqueeze(-1)
    shared = (z[..., half:] * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    z = torch.cat([z[..., :half], shared.expand_as(z[..., half:])], dim=-1)
    z = F.gelu(linear(w, f"{name}.out_proj.0", z))
    z = F.gelu(linear(w, f"{name}.out_proj.2", z))
    return linear(w, f"{name}.out_proj.4", z).log_softmax(-1)


def gumbel_noise(seed: int) -> Noise:
    """Noise from a generator, stage after stage: -log(-log(u))."""
    generator = torch.Generator().manual_seed(seed)

    def draw(stage: int, logits: Tensor) -> Tensor:
        u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype)
        return -(-u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps / 2).log()).log()

    return draw


def decide(keep_logits: Tensor, noise: Tensor) -> Tensor:
    """Hard Gumbel-softmax at temperature 1: one-hot forward, soft backward. Keep is column 0."""
    soft = (keep_logits + noise).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 2).to(soft.dtype)
    return (hard - soft.detach() + soft)[..., 0]


def policy_softmax(scores: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the kept keys and the own one, as published.

    exp(s - max over ALL keys) times the policy, `eps / L` added to each key and `eps` to the sum.

    Args:
        scores: [B, H, L, L].
        policy: [B, L].
    """
    length = scores.shape[-1]
    own = torch.eye(length, dtype=scores.dtype, device=scores.device)
    visible = policy[:, None, None, :] * (1 - own) + own
    weight = (scores - scores.amax(-1, keepdim=True)).exp() * visible
    return (weight + eps / length) / (weight.sum(-1, keepdim=True) + eps)


# DeiT and LV-ViT: tokens leave.


@dataclass(frozen=True)
class PlainViT:
    """Sizes that a state dict does not tell.

    Attributes:
        heads: H.
        stages: The block of each stage.
        depth: Blocks.
        eps: Of the host's layer norms.
        scale: What residual branches are divided by.
        stem: DeiT's one convolution, or LV-ViT's four.
    """

    heads: int
    stages: tuple[int, ...]
    depth: int
    eps: float = 1e-6
    scale: float = 1.0
    stem: Literal["deit", "lvvit"] = "deit"


def run_plain(
    w: Weights,
    images: Tensor,
    host: PlainViT,
    *,
    counts: Sequence[int] | None = None,
    noise: Noise | None = None,
    softmax: Softmax = policy_softmax,
) -> Result:
    """A forward of a plain (isotropic) model: dense, eval or training.

    Args:
        counts: Eval: K of each stage; the best K stay, the others leave.
        noise: Training: decisions are sampled with it, all tokens stay.
        softmax: The masked one, in training.
    """
    x = _embed(w, images, host, training=noise is not None)
    result = Result(x, x)
    decision: Tensor | None = None
    number = torch.arange(x.shape[1] - 1).expand(x.shape[0], -1)
    policy = None if noise is None else torch.ones_like(x[..., 0])
    for block in range(host.depth):
        if (counts is not None or noise is not None) and block in host.stages:
            stage = host.stages.index(block)
            scores = predict(w, f"token_predictors.{stage}", x[:, 1:], decision)
            result.keep_logits.append(scores)
            if noise is None:
                order = scores[..., 0].argsort(dim=1, descending=True, stable=True)
                best = order[:, : counts[stage]].sort(1).values
                x = torch.cat([x[:, :1], take(x[:, 1:], best)], dim=1)
                number = number.gather(1, best)
                result.kept.append(number)
            else:
                fresh = decide(scores, noise(stage, scores))
                decision = fresh if decision is None else fresh * decision
                result.decisions.append(decision)
                policy = torch.cat([torch.ones_like(decision[:, :1]), decision], dim=1)
        name = f"blocks.{block}"
        h = norm(w, f"{name}.norm1", x, host.eps)
        x = x + _attend(w, f"{name}.attn", h, host.heads, policy, softmax) / host.scale
        x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x, host.eps)) / host.scale
    x = norm(w, "norm", x, host.eps)
    result.tokens = x[:, 1:]
    result.logits = linear(w, "head", x[:, 0])
    if host.stem == "lvvit":
        result.class_logits = result.logits
        result.token_logits = linear(w, "aux_head", x[:, 1:])
        seen = result.token_logits
        if decision is not None:
            seen = seen.masked_fill(decision.unsqueeze(-1) < 0.5, float("-inf"))
        result.logits = result.class_logits + 0.5 * seen.amax(1)
    return result


def _attend(
    w: Weights, name: str, x: Tensor, heads: int, policy: Tensor | None, softmax: Softmax
) -> Tensor:
    batch, length, width = x.shape
    q, k, v = (
        linear(w, f"{name}.qkv", x).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weight = scores.softmax(-1) if policy is None else softmax(scores, policy)
    return linear(w, f"{name}.proj", (weight @ v).transpose(1, 2).reshape(batch, length, width))


def _embed(w: Weights, images: Tensor, host: PlainViT, training: bool) -> Tensor:
    x, name = images, "patch_embed"
    if host.stem == "lvvit":
        for i, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
            x = F.conv2d(x, w[f"{name}.conv{i}.weight"], stride=stride, padding=padding)
            mean, var = (w[f"{name}.bn{i}.running_{s}"].clone() for s in ("mean", "var"))
            scale, shift = w[f"{name}.bn{i}.weight"], w[f"{name}.bn{i}.bias"]
            x = F.relu(F.batch_norm(x, mean, var, scale, shift, training=training))
    kernel = w[f"{name}.proj.weight"]
    x = F.conv2d(x, kernel, w[f"{name}.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([w["cls_token"].expand(x.shape[0], -1, -1), x], dim=1) + w["pos_embed"]


# The loss (DynamicViT, eq. 12 to 16, with the details of its published code).


def loss_parts(
    logits: Tensor,
    labels: Tensor,
    decisions: Sequence[Tensor],
    ratios: Sequence[float],
    teacher_logits: Tensor,
    tokens: Tensor,
    teacher_tokens: Tensor,
    *,
    kind: Literal["mse", "kl"] = "mse",
    everyone: bool = False,
) -> dict[str, Tensor]:
    """The four parts, unweighted.

    Args:
        kind: The token term is a squared distance, or a divergence of LV-ViT's token logits.
        everyone: It is taken over all tokens (Swin), not only those that the last stage kept.
    """
    gaps = [
        ((decision.mean(1) - ratio) ** 2).mean()
        for decision, ratio in zip(decisions, ratios, strict=True)
    ]
    chosen = torch.ones(tokens.shape[:2], dtype=torch.bool) if everyone else decisions[-1] > 0.5
    ours, theirs = tokens[chosen], teacher_tokens.detach()[chosen]
    distance = ((ours - theirs) ** 2).mean() if kind == "mse" else _divergence(ours, theirs)
    return {
        "classification": -logits.log_softmax(-1)[range(len(labels)), labels].mean(),
        "ratio": sum(gaps) / len(gaps),
        "distill_logits": _divergence(logits, teacher_logits.detach()),
        "distill_tokens": distance if chosen.any() else tokens.new_zeros(()),
    }


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), the mean over rows."""
    log_teacher = teacher.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - student.log_softmax(-1))).sum(-1).mean()
