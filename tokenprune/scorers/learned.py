"""DynamicViT's predictor: a small network that learns which tokens to keep."""

from typing import Any, ClassVar, Literal, Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.ops.kernels.predictor import can_predict, keep_logits
from tokenprune.ops.pooling import hide_dropped, masked_mean
from tokenprune.recipe.schema import PredictorSection
from tokenprune.scorers.protocol import SCORERS, Mask, Scorer, Scores, Tokens

__all__ = ["TokenPredictor"]

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build a predictor for tokens of `dim` channels; odd and tiny numbers are fine. Weights
        are drawn from a truncated normal of `init_std`, biases start at 0."""
        super().__init__()
        self.dim = dim
        self.init_std = init_std
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

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        """Log-probabilities, keep first, in fp32 or better also under autocast."""
        weights, eps = self._plain_weights() if present is None else ((), 0.0)
        if weights and can_predict(tokens, weights):
            return keep_logits(tokens, weights, eps)
        features = self.in_proj(hide_dropped(tokens, present, 1))
        local, shared = features.split([self.dim // 2, self.dim - self.dim // 2], dim=-1)
        context = masked_mean(shared, present, 1, keepdim=True)
        first, *rest = self.out_proj
        if _is_plain(first):
            # the shared half goes through the first layer once an image instead of once a token,
            # which leaves out a seventh of a predictor's arithmetic
            own, common = first.weight.tensor_split((local.shape[-1],), dim=1)
            logits = F.linear(local, own) + F.linear(context, common, first.bias)
        else:
            both = [local, context.expand(-1, local.shape[1], -1)]
            logits = first(torch.cat(both, dim=-1))
        for layer in rest:
            logits = layer(logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits, dim=-1, dtype=wide)

    def _plain_weights(self) -> tuple[tuple[Tensor, ...], float]:
        """The parameters in order, and the norm's eps, if the layers are those we made, with exact
        GELU; else no parameters."""
        layers: list[Any]
        norm, *layers = (*self.in_proj, *self.out_proj)
        linear, activations = layers[::2], layers[1::2]
        gelu = all(type(act) is nn.GELU and act.approximate == "none" for act in activations)
        if not gelu or len(linear) != 4 or type(norm) is not nn.LayerNorm or _hooked(norm):
            return (), 0.0
        if not all(_is_plain(layer) and layer.bias is not None for layer in linear):
            return (), 0.0
        weights = (x for layer in (norm, *linear) for x in (layer.weight, layer.bias))
        return tuple(weights), norm.eps


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is the linear layer we made: not quantised, adapted, pruned or hooked since."""
    return type(layer) is nn.Linear and not _hooked(layer)
