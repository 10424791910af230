"""What couples tokens: where the per-token part of a block ends.

Only the shape-preserving operators need a name here. One that changes the number of tokens is found
by running it (`tokenprune.analysis.tails`), and one that is missing makes `verify` refuse the host.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tokenprune.rewrite.rules import mixes, rule_for, weighs

__all__ = ["attends", "couples"]

COUPLING_MODULES = (
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
COUPLING_FUNCTIONS = frozenset(
    {
        *(F.conv1d, F.conv3d, F.group_norm, F.instance_norm, F.interpolate, F.pad, F.unfold),
        *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
        *(torch.roll, torch.flip, torch.cumsum, torch.sort, torch.fft.fft2, torch.fft.rfft2),
        *(torch.var, torch.std, torch.var_mean, torch.norm, torch.linalg.norm, torch.prod),
        *("roll", "flip", "cumsum", "sort", "norm", "var", "std", "prod", "unfold"),
    }
)
NORMS = (nn.modules.batchnorm._BatchNorm,)


def attends(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node weighs tokens against each other: attention, its softmax, a contraction."""
    return weighs(rule_for(root, node)) or node.target is torch.einsum


def couples(root: nn.Module, node: fx.Node) -> bool:
    """Whether what a node says of one token depends on other tokens of the same image.

    Batch norm does not: in eval it is an affine map of each token.
    """
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, NORMS):
            return False
        if isinstance(module, CONVOLUTIONS):
            return not _pointwise(module.kernel_size, module.stride)
        if isinstance(module, COUPLING_MODULES):
            return True
    if node.target is F.conv2d:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        return not _pointwise_function(weight, node)
    target: Any = node.target
    return target in COUPLING_FUNCTIONS or mixes(root, node) or attends(root, node)


def _pointwise(kernel: tuple[Any, ...], stride: tuple[Any, ...]) -> bool:
    return {*kernel, *stride} == {1}


def _pointwise_function(weight: Any, node: fx.Node) -> bool:
    stride = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    sizes = weight.meta["val"].shape[2:] if isinstance(weight, fx.Node) else (0,)
    return {*sizes} == {1} and stride in (1, (1, 1), [1, 1])
