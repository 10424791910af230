"""What each operator does with tokens: one table of kinds.

Only what mixes tokens, moves them or must be recognised has a kind. An operator that changes the
number of tokens is found by running it (`token_probe`, `tails`); one that is missing here and mixes
tokens makes `verify` refuse the host and name the node, or `alone` if it comes later.
"""

import operator
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tokenprune.tracing.finite import check_finite
from tokenprune.tracing.hook_nodes import passed

__all__ = [
    "Kind",
    "argument",
    "attends",
    "couples",
    "kind_of",
    "known_kind",
    "mixes",
    "reads_neighbours",
    "reduces",
    "set_kind",
]


class Kind(Enum):
    """What an operator does with tokens."""

    ATTENTION = auto()
    """Scaled dot-product attention."""
    SOFTMAX = auto()
    CONTRACTION = auto()
    """A matrix product, which sums over tokens where it contracts their dim."""
    EINSUM = auto()
    """The same, written as an equation."""
    MEAN = auto()
    SUM = auto()
    AMAX = auto()
    MAX = auto()
    """`torch.max(x, dim)`, which returns positions too."""
    AVERAGE_POOL = auto()
    """`nn.AdaptiveAvgPool1d`."""
    POOL = auto()
    """Any other reduction over tokens."""
    BATCH_STATISTIC = auto()
    PASSES_ZEROS = auto()
    """Zeros stay zeros: dropout, a cast, a copy."""
    SPATIAL = auto()
    """Mixes tokens by their places; keeps their number, or is found by running it."""
    PROJECTION = auto()
    """A linear map of each token's channels."""
    ADD = auto()
    FACTORY = auto()
    """Takes from a tensor its shape, type and place, never what it holds."""
    ONES = auto()
    """Makes a tensor of ones."""
    CHECK = auto()
    """Looks whether a flag is set in any entry."""
    ANY_LENGTH = auto()
    """Runs with a table shorter than the tokens, and leaves tokens out."""


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS: dict[Any, Kind] = {
    target: kind
    for kind, targets in {
        Kind.ATTENTION: (F.scaled_dot_product_attention,),
        Kind.SOFTMAX: (F.softmax, torch.softmax, "softmax", nn.Softmax),
        Kind.CONTRACTION: (torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"),
        Kind.EINSUM: (torch.einsum,),
        Kind.MEAN: (torch.mean, "mean"),
        Kind.SUM: (torch.sum, "sum"),
        Kind.AMAX: (torch.amax, "amax"),
        Kind.MAX: (torch.max, "max"),
        Kind.AVERAGE_POOL: (nn.AdaptiveAvgPool1d,),
        Kind.BATCH_STATISTIC: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        Kind.PASSES_ZEROS: (
            *(F.dropout, "to", "type", "float", "contiguous", "type_as", passed),
            *(nn.Dropout, nn.Identity),
        ),
        Kind.SPATIAL: (
            *(F.conv1d, F.conv3d, F.group_norm, F.instance_norm, F.interpolate, F.pad, F.unfold),
            *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
            *(torch.roll, torch.flip, torch.cumsum, torch.sort, torch.fft.fft2, torch.fft.rfft2),
            *(torch.var, torch.std, torch.var_mean, torch.norm, torch.linalg.norm, torch.prod),
            *("roll", "flip", "cumsum", "sort", "norm", "var", "std", "prod", "unfold"),
            *(nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.Upsample, nn.PixelShuffle),
            *(nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd),
            *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
        ),
        Kind.PROJECTION: (F.linear, F.conv2d, torch.addmm, nn.Linear, *_CONVOLUTIONS),
        Kind.ADD: (operator.add, operator.iadd, torch.add, "add", "add_"),
        Kind.FACTORY: (
            *("new_zeros", "new_empty", "new_full", "new_tensor"),
            *(torch.zeros_like, torch.empty_like, torch.full_like),
        ),
        Kind.ONES: (torch.ones, torch.ones_like, "new_ones"),
        Kind.CHECK: (check_finite,),
        Kind.ANY_LENGTH: (operator.setitem, torch.gather, "gather"),
    }.items()
    for target in targets
}
_ATTENDING = (Kind.ATTENTION, Kind.SOFTMAX, Kind.CONTRACTION)
# Of the spatial ones, those that reduce or scan the dims that they are told: mostly the channels.
_ALONG_A_DIM = (
    *(torch.cumsum, torch.sort, torch.var, torch.std, torch.var_mean, torch.norm, torch.prod),
    *(torch.linalg.norm, "cumsum", "sort", "norm", "var", "std", "prod"),
)
_POOLING = (Kind.MEAN, Kind.SUM, Kind.AMAX, Kind.MAX, Kind.AVERAGE_POOL, Kind.POOL)


def set_kind(targets: Iterable[Any], kind: Kind) -> None:
    """Say what operators do that the table does not know (`rewrite.rules.rule` calls this)."""
    _KINDS.update(dict.fromkeys(targets, kind))


def known_kind(target: Any) -> Kind | None:
    """The kind of a function, a method's name or a module class; subclasses inherit."""
    known = (_KINDS[base] for base in getattr(target, "__mro__", (target,)) if base in _KINDS)
    return next(known, None)


def kind_of(root: nn.Module, node: fx.Node) -> Kind | None:
    """What a node does with tokens; None if it acts on each token alone, as far as is known."""
    if node.op == "call_module":
        return known_kind(type(root.get_submodule(str(node.target))))
    return _KINDS.get(node.target) if node.op in ("call_function", "call_method") else None


def attends(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node weighs tokens against each other: attention, its softmax, a contraction."""
    return kind_of(root, node) in (*_ATTENDING, Kind.EINSUM)


def mixes(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node is an attention, a softmax, a contraction, a pooling or a batch statistic."""
    return kind_of(root, node) in (*_ATTENDING, *_POOLING, Kind.BATCH_STATISTIC)


def reduces(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a pooling, over tokens or over channels."""
    return kind_of(root, node) in _POOLING


def couples(root: nn.Module, node: fx.Node) -> bool:
    """Whether the output of a node for one token depends on other tokens of the same image.

    Batch norm's does not: in eval it is an affine map of each token.
    """
    kind = kind_of(root, node)
    if kind is Kind.PROJECTION:
        return not _pointwise(root, node)
    if node.op == "call_module" and kind is Kind.BATCH_STATISTIC:
        return False
    return kind is Kind.SPATIAL or mixes(root, node) or attends(root, node)


def reads_neighbours(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node finds other tokens by their places: a convolution of more than one, a pooling
    window, a shift. It cannot run once tokens have left."""
    kind = kind_of(root, node)
    if kind is Kind.PROJECTION:
        return not _pointwise(root, node)
    return kind is Kind.SPATIAL and node.target not in _ALONG_A_DIM


def _pointwise(root: nn.Module, node: fx.Node) -> bool:
    """Whether a linear map or convolution sees one token at a time."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not isinstance(module, _CONVOLUTIONS) or {*module.kernel_size, *module.stride} == {1}
    if node.target is not F.conv2d:
        return True
    weight, stride = argument(node, 1, "weight"), argument(node, 3, "stride", default=1)
    sizes = weight.meta["val"].shape[2:] if isinstance(weight, fx.Node) else (0,)
    return {*sizes} == {1} and stride in (1, (1, 1), [1, 1])


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, by its position or one of its names."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)
