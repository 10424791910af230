"""Random keep-or-drop decisions with a gradient."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["sample_decision"]


def sample_decision(
    keep_logits: Float[Tensor, "B N 2"],
    previous: Float[Tensor, "B N"],
    *,
    temperature: float = 1.0,
    hard: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B N"]:
    """Sample which tokens stay: Gumbel-softmax (Jang et al., 2017, eq. 1) times `previous`.

    Class 0 is *keep*, as in DynamicViT's code and checkpoints; the paper's text numbers the classes
    the other way round. With two classes the softmax is a sigmoid of the difference, which
    cannot overflow. Sampled in fp32 (fp64 for fp64 logits), also under autocast. NaN logits count
    as 0, so a dropped token that holds NaN stays dropped.

    Args:
        keep_logits: unnormalised log-probabilities, keep first.
        previous: decision of the stage before (ones at the first); its dropped tokens stay dropped.
        temperature: of the softmax, above 0. The hard forward value does not depend on it.
        hard: 0/1 forward with the gradient of the soft sample (straight-through).
        generator: source of the noise, on the device of `keep_logits`; None for the global one.

    Returns:
        The decision of this stage, exactly 0 or 1 when `hard` and `previous` holds 0/1.
    """
    dtype = torch.promote_types(keep_logits.dtype, torch.float32)
    limits = torch.finfo(dtype)
    # A quarter of the range each, so that the difference below stays finite.
    logits = torch.nan_to_num(
        keep_logits.to(dtype), nan=0.0, posinf=limits.max / 4, neginf=-limits.max / 4
    )
    # generator=None is another overload, which refuses torch.compile's symbolic batch size
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform = torch.rand(keep_logits.shape, device=keep_logits.device, dtype=dtype, **source)
    # rand() can return 0, and 1 - eps / 2 is the largest number below 1: both logs stay finite.
    uniform = uniform.clamp(limits.tiny, 1 - limits.eps / 2)
    noisy = logits - torch.log(-torch.log(uniform))
    margin = (noisy[..., 0] - noisy[..., 1]) / temperature
    soft = torch.sigmoid(margin)
    if not hard:
        return soft * previous
    # soft - soft.detach() is exactly 0, so the value stays exactly 0 or 1.
    return ((margin >= 0).to(dtype) + (soft - soft.detach())) * previous
