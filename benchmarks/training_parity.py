"""Training held against the papers' formulas: what `benchmarks.fidelity` measures and tables.

The formulas are written out in tests/product/reference.py. All of it runs in double precision,
so that what differs is the formula and not rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenprune
import tokenprune.models
from tests.product.reference import (
    PlainViT,
    Result,
    Softmax,
    gumbel_noise,
    loss_parts,
    policy_softmax,
    run_plain,
)
from tests.product.reference_swin import Swin, run_swin
from tokenprune.losses import PruningLoss
from tokenprune.recipe import load_recipe

__all__ = ["Leak", "Parity", "Survival", "leaks", "parities", "survivals"]

FACTORS = (1, 10, 20, 50)
KEEP_PROBABILITIES = (0.5, 0.3, 0.1, 0.05)
DEITS = PlainViT(heads=6, stages=(3, 6, 9), depth=12)
LVVITS = PlainViT(heads=6, stages=(4, 8, 12), depth=16, eps=1e-5, scale=2.0, stem="lvvit")
SWINT = Swin(depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, stages=(5, 6, 7))
SUBJECTS: dict[str, tuple[str, Callable[..., Result]]] = {
    "DeiT-S": ("deit-small", lambda w, x, **o: run_plain(w, x, DEITS, **o)),
    "LV-ViT-S": ("lvvit-s", lambda w, x, **o: run_plain(w, x, LVVITS, **o)),
    "Swin-T": ("swin-tiny", lambda w, x, **o: run_swin(w, x, SWINT, **o)),
}


@dataclass(frozen=True)
class Parity:
    """Relative differences of one model at fresh weights.

    Attributes:
        model: Title.
        form: Which formulas.
        parts: Worst of the four loss parts.
        gradient: Of all predictor (and light-branch) gradients together, whole loss.
        without_ratio: The same for the loss without its ratio term.
        cosine: Between the gradients without the ratio term.
    """

    model: str
    form: str
    parts: float
    gradient: float
    without_ratio: float
    cosine: float


@dataclass(frozen=True)
class Leak:
    """DeiT-S with query, key and value weights times a factor.

    Attributes:
        factor: What they are multiplied with.
        mass: Attention of kept rows to dropped keys under the published softmax: mean, and largest.
        published: Training against gathered eval: root mean square of the difference of the
            logits over their standard deviation, published softmax. Unrelated logits have 1.4.
        ours: The same of the mask path.
        norm: Norm of the predictors' gradient under the published softmax over the norm under ours,
            without the ratio term.
    """

    factor: int
    mass: tuple[float, float]
    published: float
    ours: float
    norm: float


@dataclass(frozen=True)
class Survival:
    """A small DeiT whose predictors keep few tokens.

    Attributes:
        probability: With which a fresh predictor keeps a token, at each stage.
        empty: Batches in which some image lost every token.
        published: Batches whose loss or gradient is NaN or inf, published formulas.
        ours: The same of the engine.
        of: Batches.
    """

    probability: float
    empty: int
    published: int
    ours: int
    of: int


class Subject:
    """A wrapped host with fresh weights, its reference, and one batch."""

    def __init__(
        self, host: nn.Module, recipe: Any, run: Callable[..., Result], batch: int
    ) -> None:
        self.recipe = load_recipe(recipe)
        self.run = run
        self.model = tokenprune.wrap(host.double(), self.recipe, verify=False).train()
        self.lv = hasattr(host, "aux_head")
        generator = torch.Generator().manual_seed(1)
        size = tuple(self.model._pruning.spec.inputs["x"].shape)
        self.images = torch.randn(batch, *size, generator=generator, dtype=torch.float64)
        self.labels = torch.arange(batch)
        self.ratios = [stage.keep_ratio for stage in self.recipe.resolved_stages]
        moved = {name: 1.1 * tensor for name, tensor in self.weights().items()}
        with torch.no_grad():
            self.teacher = run(moved, self.images)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the parameters, for another graph."""
        state = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        trained = {name for name, _ in self.model.named_parameters()}
        return {name: t.requires_grad_(name in trained) for name, t in state.items()}

    def added(self) -> list[str]:
        return [n for n, _ in self.model.named_parameters() if n.startswith("token_")]

    def ours(self, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Loss parts, and gradients of added parameters: whole loss, and without the ratio term."""
        with self.model.using(generator=torch.Generator().manual_seed(seed)):
            logits, trace = self.model(self.images, return_trace=True)
        tokens = trace.patch_tokens.reshape(self.teacher.tokens.shape)
        if self.lv:
            tokens = self.model.aux_head(tokens)
        loss = PruningLoss(keep_ratios=self.ratios, **self.recipe.loss.model_dump())
        total, parts = loss(
            logits,
            self.labels,
            [stage.decision for stage in trace.stages],
            teacher_logits=self.teacher.logits,
            student_tokens=tokens,
            teacher_tokens=_compared(self.teacher),
        )
        ratio = tokenprune.losses.ratio_loss([s.decision for s in trace.stages], self.ratios)
        leaves = [self.model.get_parameter(name) for name in self.added()]
        whole = _flat(total, leaves)
        return dict(parts), whole, whole - loss.ratio * _flat(ratio, leaves)

    def published(
        self, seed: int, **options: Any
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Result]:
        """The same by the reference, and the result of its forward."""
        weights = self.weights()
        result = self.run(weights, self.images, noise=gumbel_noise(seed), **options)
        section = self.recipe.loss
        parts = loss_parts(
            result.logits,
            self.labels,
            result.decisions,
            self.ratios,
            self.teacher.logits,
            _compared(result),
            _compared(self.teacher),
            kind=section.token_distance,
            everyone=section.token_set == "all",
        )
        leaves = [weights[name] for name in self.added()]
        whole = _flat(sum(getattr(section, name) * part for name, part in parts.items()), leaves)
        ratio = _flat(parts["ratio"], leaves)
        return parts, whole, whole - section.ratio * ratio, result


def _compared(result: Result) -> Tensor:
    """Operands of the token term: LV-ViT's token logits, else the tokens."""
    return result.tokens if result.token_logits is None else result.token_logits


def _flat(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(
        loss, leaves, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    return torch.cat([gradient.flatten() for gradient in found])


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _fresh(name: str) -> nn.Module:
    recipe = load_recipe(f"dynamicvit-{name}-k0.7")
    host = recipe.host
    if host is None:
        raise SystemExit(f"{recipe.name} names no host")
    torch.manual_seed(0)
    built: nn.Module = timm.create_model(host.model, **host.kwargs, drop_path_rate=0.0)
    return built


def parities() -> list[Parity]:
    """Every family at fresh weights, against each form of the formulas."""
    rows = []
    for title, (name, run) in SUBJECTS.items():
        subject = Subject(_fresh(name), f"dynamicvit-{name}-k0.7", run, batch=2)
        if title == "Swin-T":
            forms: dict[str, dict[str, Any]] = {"the paper's": {}, "the code's": {"stale": True}}
        else:
            exact = partial(policy_softmax, eps=0.0)
            forms = {"published": {}, "published, eps = 0": {"softmax": exact}}
        parts, whole, rest = subject.ours(0)
        for form, options in forms.items():
            expected, their_whole, their_rest, _ = subject.published(0, **options)
            rows.append(
                Parity(
                    title,
                    form,
                    max(_relative(parts[key], expected[key].detach()) for key in expected),
                    _relative(whole, their_whole),
                    _relative(rest, their_rest),
                    float(torch.cosine_similarity(rest, their_rest, dim=0)),
                )
            )
    return rows


def leaks() -> list[Leak]:
    """DeiT-S at each factor, one image, the kept tokens of one sampled training step."""
    rows = []
    for factor in FACTORS:
        host = _fresh("deit-small")
        with torch.no_grad():
            for name, parameter in host.named_parameters():
                if name.endswith("qkv.weight"):
                    parameter.mul_(factor)
        subject = Subject(host, "dynamicvit-deit-small-k0.7", SUBJECTS["DeiT-S"][1], batch=1)
        mass: list[Tensor] = []
        _, _, theirs, result = subject.published(0, softmax=_recording(mass))
        _, _, ours = subject.ours(0)
        kept = [decision.nonzero()[:, 1][None] for decision in result.decisions]
        subject.model.eval()
        with torch.no_grad():
            with subject.model.using(path="gather", keep_indices=kept):
                gathered = subject.model(subject.images)
            with subject.model.using(path="mask", keep_indices=kept):
                masked = subject.model(subject.images)
        spread = gathered.std()
        leaked = torch.cat([part.flatten() for part in mass])
        rows.append(
            Leak(
                factor,
                (float(leaked.mean()), float(leaked.max())),
                float((result.logits.detach() - gathered).square().mean().sqrt() / spread),
                float((masked - gathered).square().mean().sqrt() / spread),
                float(theirs.norm() / ours.norm()),
            )
        )
    return rows


def _recording(mass: list[Tensor]) -> Softmax:
    """The published softmax; records the attention of kept rows to dropped keys in `mass`."""

    def softmax(scores: Tensor, policy: Tensor) -> Tensor:
        weight = policy_softmax(scores, policy)
        kept = policy[0].detach() > 0.5
        if not kept.all():
            mass.append(weight.detach()[0][:, kept][:, :, ~kept].sum(-1))
        return weight

    return softmax


def survivals(batches: int = 40) -> list[Survival]:
    """Small batches under predictors that keep few tokens."""
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    host = timm.create_model("deit_tiny_patch16_224", num_classes=7, **sizes)
    small = PlainViT(heads=2, stages=(1, 2, 3), depth=4)
    recipe = {"version": 1, "schedule": {"blocks": [1, 2, 3], "keep_ratio": 0.7}}
    subject = Subject(host, recipe, lambda w, x, **o: run_plain(w, x, small, **o), batch=4)
    rows = []
    for probability in KEEP_PROBABILITIES:
        with torch.no_grad():
            for predictor in subject.model.token_predictors:
                odds = torch.tensor([probability, 1 - probability], dtype=torch.float64)
                predictor.out_proj[4].bias.copy_(odds.log())
        empty = broken = ours = 0
        for seed in range(batches):
            parts, whole, _, result = subject.published(seed)
            empty += any(bool((d.sum(1) < 0.5).any() | d.isnan().any()) for d in result.decisions)
            broken += not _finite(parts, whole)
            parts, whole, _ = subject.ours(seed)
            ours += not _finite(parts, whole)
        rows.append(Survival(probability, empty, broken, ours, batches))
    return rows


def _finite(parts: dict[str, Tensor], gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all()) and all(bool(p.isfinite()) for p in parts.values())
