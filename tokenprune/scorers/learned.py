"""DynamicViT's predictor: a small network that learns which tokens to keep."""

from typing import Any, ClassVar, Literal, Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from tokenprune.ops.kernels.scores import can_score, predict
from tokenprune.ops.pooling import hide_dropped, masked_mean
from tokenprune.recipe.schema import PredictorSection
from tokenprune.scorers.protocol import SCORERS, Mask, Scorer, Scores, Tokens

__all__ = ["TokenPredictor"]

FAINT = 1 / 128
"""Weights of the last layer at the start, in steps of scores: too small to change a score."""
ABOVE = 2
"""How far its scores are apart at the start, in steps."""
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@SCORERS.register("learned")
class TokenPredictor(Scorer):
    """Keep log-probabilities from each token and the mean of the tokens that are still kept.

    DynamicViT (Rao et al., 2021), eq. 1 to 5: a projection, of which one half of the channels
    stays local and the other half is averaged over the kept tokens; then an MLP on both. The
    parameters lie where the published checkpoints have them: `in_conv` is `in_proj`, `out_conv`
    is `out_proj`.
    """

    probabilistic: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        *,
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        small_start: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build a predictor for tokens of `dim` channels; odd and tiny numbers are fine.

        Weights are drawn from a truncated normal of `init_std`, biases start at 0. With
        `small_start` those of the last layer are so small that all scores round to the same:
        before it has learned anything a predictor prefers no token, and of ties those stay that are
        spread evenly. They are not 0, so that the first gradient reaches the layers before. The
        keep probability is two roundings above 1/2, so a threshold of 0.5 drops nothing then."""
        super().__init__()
        self.dim = dim
        self.init_std, self.small_start = init_std, small_start
        act = _ACTIVATIONS[activation]
        hidden, narrow = max(dim // 2, 1), max(dim // 4, 1)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, device=device, dtype=dtype)

        norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.in_proj = nn.Sequential(norm, linear(dim, dim), act())
        self.out_proj = nn.Sequential(
            linear(dim, hidden), act(), linear(hidden, narrow), act(), linear(narrow, 2)
        )
        self.reset_parameters()

    @classmethod
    def make(cls, dim: int, section: PredictorSection, **like: Any) -> Self:
        return cls(dim, activation=section.activation, **like)

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.init_std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        with torch.no_grad():
            last = self.out_proj[-1]
            if self.small_start and self.init_std and isinstance(last, nn.Linear):
                eps = _eps(last.weight.dtype)
                last.weight.mul_(FAINT * eps / self.init_std)
                last.bias[0] = ABOVE * eps

    def is_fresh(self) -> bool:
        """The last layer is as small as at the start, so that all scores tie."""
        last = self.out_proj[-1]
        if not (_is_plain(last) and type(last.weight) is type(last.bias) is nn.Parameter):
            return False  # replaced, adapted or quantised: somebody works with it
        eps = _eps(torch.float32)
        small = last.weight.abs().max() <= 16 * FAINT * eps
        return bool(small) and bool(last.bias.abs().max() <= ABOVE * eps)

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        """Log-probabilities, keep first, in fp32 or better also under autocast."""
        layers = [*self.in_proj, *self.out_proj]
        whole = self.in_proj, self.out_proj, *layers
        if can_score(tokens, layers) and all(map(_unchanged, whole)):
            return predict(tokens, present, layers)
        features = self.in_proj(hide_dropped(tokens, present, 1))
        local, shared = features.split([self.dim // 2, self.dim - self.dim // 2], dim=-1)
        context = masked_mean(shared, present, 1, keepdim=True)
        first, *rest = self.out_proj
        if _is_plain(first) and _unchanged(self.out_proj):
            # the shared half goes through the first layer once an image instead of once a token,
            # which leaves out a seventh of a predictor's arithmetic
            local_weight, common = first.weight.tensor_split((local.shape[-1],), dim=1)
            rows = features.flatten(0, 1)[:, : local.shape[-1]]  # of a slice of 3-D it makes a copy
            logits = F.linear(rows, local_weight).view(*local.shape[:2], local_weight.shape[0])
            logits = logits + F.linear(context, common, first.bias)
            for layer in rest:
                logits = layer(logits)
        else:
            both = [local, context.expand(-1, local.shape[1], -1)]
            logits = self.out_proj(torch.cat(both, dim=-1))
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits, dim=-1, dtype=wide)


def _eps(dtype: torch.dtype) -> float:
    """The step of scores at 1."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is the linear layer we made: not quantised, adapted, pruned or hooked since."""
    return type(layer) is nn.Linear and _unchanged(layer)


def _unchanged(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    hooked = hooked or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and "forward" not in layer.__dict__
