"""What mixes tokens, and its masked version.

Everything else in a transformer acts on each token alone and needs no rule. A mixer that is missing
here is not silently wrong: the mask path then differs from the gather path, and `verify` names the
node. `Mixing` does the look-ups; each rule says in a few lines what is masked.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from tokenprune.analysis.token_probe import TokenDim
from tokenprune.errors import LeakError
from tokenprune.ops.attention import masked_attention
from tokenprune.ops.pooling import (
    hide_dropped,
    masked_amax,
    masked_contraction_operand,
    masked_mean,
    masked_sum,
)
from tokenprune.ops.softmax import masked_softmax
from tokenprune.rewrite.rewrite import Rewrite

__all__ = ["Mixing", "mixes", "rule_for", "weighs"]

Rule = Callable[["Mixing", fx.Node], None]


class Mixing:
    """The masking of one graph.

    Attributes:
        zeroed: Nodes that are exactly zero at dropped keys (masked attention weights).
    """

    def __init__(self, rewrite: Rewrite, policies: Callable[[int, int, int], fx.Node]) -> None:
        self.rewrite, self._policies = rewrite, policies
        self.zeroed: set[fx.Node] = set()

    def policy(self, node: fx.Node, dim: TokenDim, *sources: fx.Node) -> fx.Node:
        """The policy of the tokens along `dim` of `sources`, which `node` mixes: a row for each row
        of their dim 0, which counts images, or images times something else (heads)."""
        folds = {self.rewrite.fold(source) for source in sources}
        if len(folds) == 1 and None not in folds:
            return self._policies(dim.stage, dim.prefix, *filter(None, folds))
        shapes = ", ".join(str(tuple(source.meta["val"].shape)) for source in sources)
        raise LeakError(
            f"{self.rewrite.where(node)} mixes tokens of a tensor whose first dim is not the "
            f"batch (shape {shapes}), so no per-image policy can be applied. Only a batch-first "
            "layout can be masked."
        )

    def replace(
        self, node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Put a masked operation in the place of `node`."""
        new = self.rewrite.insert(node, target, *args, **kwargs)
        node.replace_all_uses_with(new)
        self.rewrite.replaced(node, new)
        self.rewrite.graph.erase_node(node)
        return new


def _argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _attention(mixing: Mixing, node: fx.Node) -> None:
    query, key, value = (_argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    rewrite = mixing.rewrite
    dim = rewrite.dims(key).get(rewrite.rank(key) - 2)
    if dim is None:
        return
    policy = mixing.policy(node, dim, key)
    options = {
        "attn_mask": _argument(node, 3, "attn_mask"),
        "dropout_p": _argument(node, 4, "dropout_p", default=0.0),
        "is_causal": _argument(node, 5, "is_causal", default=False),
        "scale": node.kwargs.get("scale"),
        "enable_gqa": node.kwargs.get("enable_gqa", False),
    }
    own_key = rewrite.dims(query).get(rewrite.rank(query) - 2) == dim
    mixing.replace(node, masked_attention, query, key, value, policy, own_key=own_key, **options)


def _softmax(mixing: Mixing, node: fx.Node) -> None:
    rewrite, scores = mixing.rewrite, _argument(node, 0, "input")
    if node.op == "call_module":
        axis, dtype = getattr(rewrite.traced_module(node), "dim"), None  # noqa: B009 - nn.Softmax
    else:
        axis, dtype = _argument(node, 1, "dim"), node.kwargs.get("dtype")
    dims = rewrite.dims(scores)
    axis = (-1 if axis is None else axis) % rewrite.rank(scores)
    if axis not in dims:
        return
    policy = mixing.policy(node, dims[axis], scores)
    queries = [d for d, dim in dims.items() if d != axis and dim == dims[axis]]
    new = mixing.replace(
        node,
        masked_softmax,
        scores,
        policy,
        axis,
        query_dim=queries[0] if queries else None,
        dtype=dtype,
    )
    mixing.zeroed.add(new)


def _keeps_zeros(mixing: Mixing, node: fx.Node) -> None:
    """Dropout, a cast or a copy of masked weights: dropped keys stay exactly zero."""
    if node.args and node.args[0] in mixing.zeroed:
        mixing.zeroed.add(node)


def _contraction(mixing: Mixing, node: fx.Node) -> None:
    rewrite = mixing.rewrite
    left, right = node.args[0], _argument(node, 1, "other", "mat2")
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return
    left_axis, right_axis = rewrite.rank(left) - 1, max(rewrite.rank(right) - 2, 0)
    dim = rewrite.dims(left).get(left_axis) or rewrite.dims(right).get(right_axis)
    if dim is None:
        return
    policy = mixing.policy(node, dim, left, right)
    if left in mixing.zeroed:
        node.args = (left, rewrite.insert(node, hide_dropped, right, policy, right_axis))
    elif right in mixing.zeroed:
        node.args = (rewrite.insert(node, hide_dropped, left, policy, left_axis), right)
    else:
        hidden = rewrite.insert(node, hide_dropped, left, policy, left_axis)
        kept = rewrite.insert(node, masked_contraction_operand, right, policy, right_axis)
        node.args = (hidden, kept)
    node.kwargs = {}


def _reduction(masked: Callable[..., Any]) -> Rule:
    def rule(mixing: Mixing, node: fx.Node) -> None:
        rewrite, source = mixing.rewrite, _argument(node, 0, "input")
        dims = rewrite.dims_read(node, source)
        if not dims:
            return
        asked = _argument(node, 1, "dim", "axis")
        rank = rewrite.rank(source)
        axes = (
            range(rank) if asked is None else asked if isinstance(asked, tuple | list) else [asked]
        )
        over = [axis % rank for axis in axes]
        if not any(axis in dims for axis in over):
            return
        if len(over) != 1:
            raise LeakError(
                f"{rewrite.where(node)} reduces dims {over} at once, among them tokens; only a "
                "reduction over the token dim alone can be masked."
            )
        policy = mixing.policy(node, dims[over[0]], source)
        keepdim = _argument(node, 2, "keepdim", default=False)
        mixing.replace(node, masked, source, policy, over[0], keepdim)

    return rule


class Maximum(NamedTuple):
    """What `torch.max(x, dim)` returns, without positions."""

    values: torch.Tensor
    indices: None = None


def masked_max(x: torch.Tensor, policy: torch.Tensor, dim: int, keepdim: bool = False) -> Maximum:
    """`torch.max(x, dim)` over kept tokens. Positions are not formed: a host that reads them fails
    by name instead of getting positions among all tokens."""
    return Maximum(masked_amax(x, policy, dim, keepdim))


def _average_pool(mixing: Mixing, node: fx.Node) -> None:
    """`nn.AdaptiveAvgPool1d(1)` on [B, D, N]: a mean over tokens."""
    rewrite, source = mixing.rewrite, _argument(node, 0, "input")
    axis = rewrite.rank(source) - 1
    dim = rewrite.dims(source).get(axis)
    if dim is None:
        return
    size = rewrite.traced_module(node).output_size
    if size not in (1, (1,)):
        raise LeakError(
            f"{rewrite.where(node)} pools tokens into {size} bins; only 1 can be masked."
        )
    mixing.replace(node, masked_mean, source, mixing.policy(node, dim, source), axis, True)


def _batch_norm(mixing: Mixing, node: fx.Node) -> None:
    rewrite, source = mixing.rewrite, _argument(node, 0, "input")
    if isinstance(source, fx.Node) and rewrite.traced_module(node).training:
        origin = rewrite.origin(source)
        if rewrite.dims(source) or origin in rewrite.axes.folded:
            raise LeakError(
                f"{rewrite.where(node)} takes batch statistics over dropped tokens too. Put it in "
                "eval mode (freeze its statistics) to train this host."
            )


RULES: dict[Any, Rule] = {
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((F.softmax, torch.softmax, "softmax", nn.Softmax), _softmax),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _contraction),
    **dict.fromkeys((torch.mean, "mean"), _reduction(masked_mean)),
    **dict.fromkeys((torch.sum, "sum"), _reduction(masked_sum)),
    **dict.fromkeys((torch.amax, "amax"), _reduction(masked_amax)),
    **dict.fromkeys((torch.max, "max"), _reduction(masked_max)),
    nn.AdaptiveAvgPool1d: _average_pool,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), _batch_norm),
    **dict.fromkeys((F.dropout, "to", "type", "float", "contiguous", "type_as"), _keeps_zeros),
    **dict.fromkeys((nn.Dropout, nn.Identity), _keeps_zeros),
}


def rule_for(root: nn.Module, node: fx.Node) -> Rule | None:
    """The rule for a node's operator, if it has one."""
    if node.op == "call_module":
        kinds = type(root.get_submodule(str(node.target))).__mro__
        return next((RULES[kind] for kind in kinds if kind in RULES), None)
    return RULES.get(node.target) if node.op in ("call_function", "call_method") else None


def mixes(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node is an attention, a softmax, a contraction, a pooling or a batch statistic."""
    return rule_for(root, node) not in (None, _keeps_zeros)


def weighs(rule: Rule | None) -> bool:
    """Whether a rule is that of attention, of its softmax or of a contraction over tokens."""
    return rule in (_attention, _softmax, _contraction)
