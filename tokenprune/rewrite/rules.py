"""What is replaced where a kept set hides tokens: one rule for each operator that mixes them.

Everything else in a transformer acts on each token alone and needs no rule. An operator that is
missing here is not silently wrong: the mask path then differs from the gather path, and `verify`
names the node; where it comes into a model that is wrapped, `runtime/steps.py` does. `Hiding` does
the look-ups; each rule says in a few lines what is hidden.

An operator of your own, in one file:

    @tokenprune.rewrite.rule(my_pool, kind=Kind.POOL)
    def hide(hiding, node):
        ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from tokenprune.analysis.equations import equation_of
from tokenprune.analysis.facts import TokenDim
from tokenprune.analysis.operators import Kind, argument, kind_of, known_kind, set_kind
from tokenprune.errors import LeakError, RegistrationError
from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.kept.token_ops import TokenOps
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.tracing.effects import has_effect

__all__ = ["Hiding", "OperatorRule", "hide_in_reduction", "rule", "rule_for"]

Hide = Callable[["Hiding", fx.Node], None]


@dataclass(frozen=True)
class OperatorRule:
    """What is known about an operator.

    Attributes:
        kind: What it does with tokens.
        hide: Replaces a node of it, or its arguments, so that hidden tokens are not read.
    """

    kind: Kind
    hide: Hide


_rules: dict[Any, OperatorRule] = {}
"""By `Kind`, or by operator for those that this library does not know."""


def rule(*targets: Any, kind: Kind, replace: bool = False) -> Callable[[Hide], Hide]:
    """Decorator: the rule of operators that this library does not know.

    Args:
        targets: Functions, names of tensor methods, or module classes (subclasses inherit). None
            for all operators of the kind that have no rule of their own.
        kind: What they do with tokens.
        replace: Put it in the place of a rule that there is.

    Raises:
        RegistrationError: One of them has a rule, and `replace` is False.
    """

    keys = targets or (kind,)

    def register(hide: Hide) -> Hide:
        known = [each for each in keys if each in _rules or known_kind(each) is not None]
        if known and not replace:
            raise RegistrationError(
                f"Asked for a rule for {known[0]!r}, which is known already, of kind "
                f"{known_kind(known[0]) or kind}. Leave it out of the targets, or pass "
                "replace=True to put yours in its place."
            )
        set_kind(targets, kind)
        _rules.update(dict.fromkeys(keys, OperatorRule(kind, hide)))
        return hide

    return register


def rule_for(root: nn.Module, node: fx.Node) -> OperatorRule | None:
    """The rule for a node's operator, if it has one: its own, else its kind's."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    module = node.op == "call_module"
    own = type(root.get_submodule(str(node.target))).__mro__ if module else (node.target,)
    keys = (*own, kind_of(root, node))
    return next((_rules[key] for key in keys if key in _rules), None)


@dataclass
class Hiding:
    """The rewriting of one graph whose kept set hides tokens: what a rule works with.

    Attributes:
        rewrite: The graph.
        kept: Says which tokens are there.
        ops: What replaces operators that mix tokens.
        zeroed: Nodes that are exactly zero at dropped keys (masked attention weights).
    """

    rewrite: Rewrite
    kept: KeptSet
    ops: TokenOps
    zeroed: set[fx.Node] = field(default_factory=set)

    def policy(self, node: fx.Node, dim: TokenDim, *sources: fx.Node) -> fx.Node:
        """The policy of the tokens along `dim` of `sources`, which `node` mixes: a row for each row
        of their dim 0, which counts images, or images times something else (heads)."""
        rows = {self.rewrite.facts(source).rows_per_image for source in sources}
        if len(rows) == 1 and None not in rows:
            return self.kept.policy(self.rewrite, dim.stage, dim.prefix, *filter(None, rows))
        shapes = ", ".join(str(tuple(source.meta["val"].shape)) for source in sources)
        raise LeakError(
            f"{self.rewrite.where(node)} mixes tokens of a tensor whose first dim is not the "
            f"batch (shape {shapes}), so no per-image policy can be applied. Only a batch-first "
            "layout can be masked."
        )

    def replace(self, node: fx.Node, masked: Callable[..., Any], *args: Any, **kw: Any) -> fx.Node:
        """Put a masked operation in the place of `node`."""
        new = self.rewrite.insert(node, masked, *args, **kw)
        self.rewrite.replace(node, new)
        return new


@rule(kind=Kind.ATTENTION)
def _attention(hiding: Hiding, node: fx.Node) -> None:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    rewrite = hiding.rewrite
    dim = rewrite.facts(key).dims.get(rewrite.rank(key) - 2)
    if dim is None:
        return
    policy = hiding.policy(node, dim, key)
    options = {
        "attn_mask": argument(node, 3, "attn_mask"),
        "dropout_p": argument(node, 4, "dropout_p", default=0.0),
        "is_causal": argument(node, 5, "is_causal", default=False),
        "scale": node.kwargs.get("scale"),
        "enable_gqa": node.kwargs.get("enable_gqa", False),
    }
    own_key = rewrite.facts(query).dims.get(rewrite.rank(query) - 2) == dim
    hiding.replace(
        node, hiding.ops.attention, query, key, value, policy, own_key=own_key, **options
    )


@rule(kind=Kind.SOFTMAX)
def _softmax(hiding: Hiding, node: fx.Node) -> None:
    rewrite, scores = hiding.rewrite, argument(node, 0, "input")
    if node.op == "call_module":
        axis, dtype = getattr(rewrite.traced_module(node), "dim"), None  # noqa: B009 - nn.Softmax
    else:
        axis, dtype = argument(node, 1, "dim"), node.kwargs.get("dtype")
    dims = rewrite.facts(scores).dims
    axis = (-1 if axis is None else axis) % rewrite.rank(scores)
    if axis not in dims:
        return
    policy = hiding.policy(node, dims[axis], scores)
    queries = [d for d, dim in dims.items() if d != axis and dim == dims[axis]]
    options = {"query_dim": queries[0] if queries else None, "dtype": dtype}
    weights = hiding.replace(node, hiding.ops.softmax, scores, policy, axis, **options)
    if not hiding.ops.weighs:
        hiding.zeroed.add(weights)


@rule(kind=Kind.PASSES_ZEROS)
def _keeps_zeros(hiding: Hiding, node: fx.Node) -> None:
    """Dropout, a cast or a copy of masked weights: dropped keys stay exactly zero."""
    if node.args and node.args[0] in hiding.zeroed:
        hiding.zeroed.add(node)


@rule(kind=Kind.CONTRACTION)
def _contraction(hiding: Hiding, node: fx.Node) -> None:
    rewrite = hiding.rewrite
    left, right = argument(node, 0, "input"), argument(node, 1, "other", "mat2")
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return
    left_axis, right_axis = rewrite.rank(left) - 1, max(rewrite.rank(right) - 2, 0)
    dim = rewrite.facts(left).dims.get(left_axis) or rewrite.facts(right).dims.get(right_axis)
    if dim is None:
        return
    policy = hiding.policy(node, dim, left, right)
    ops, zeroed = hiding.ops, hiding.zeroed
    of_weights = left in zeroed or right in zeroed
    if left not in zeroed and ops.hide is not None:
        left = rewrite.insert(node, ops.hide, left, policy, left_axis)
    if right not in zeroed:
        other = ops.hide if of_weights and ops.hide is not None else ops.operand
        right = rewrite.insert(node, other, right, policy, right_axis)
    node.args = (left, right)
    node.kwargs = {}


@rule(kind=Kind.EINSUM)
def _einsum(hiding: Hiding, node: fx.Node) -> None:
    rewrite, ops, origin = hiding.rewrite, hiding.ops, hiding.rewrite.origin(node) or node
    found = equation_of(origin)
    if found is None:
        raise LeakError(
            f"{rewrite.where(node)} calls torch.einsum with lists of subscripts. Write the "
            "equation as text, such as 'b i d, b j d -> b i j'."
        )
    equation, sources = found[0], list(_operands(node))
    operands = list(sources)
    for letter in equation.summed():
        axes = {i: term.index(letter) for i, term in enumerate(equation.operands) if letter in term}
        facts = {i: rewrite.facts(sources[i]).dims.get(axis) for i, axis in axes.items()}
        tokens = {i: dim for i, dim in facts.items() if dim is not None}
        if not tokens:
            continue
        dim = next(iter(tokens.values()))
        policy = hiding.policy(node, dim, *(sources[i] for i in tokens))
        zero = [i for i in axes if sources[i] in hiding.zeroed]
        for i in (others := [i for i in axes if i not in zero]):
            change = ops.operand if not zero and i == others[-1] else ops.hide
            if change is not None:
                operands[i] = rewrite.insert(node, change, operands[i], policy, axes[i])
    node.args = (node.args[0], *operands)


def _operands(node: fx.Node) -> Sequence[Any]:
    """Of a call of `torch.einsum`, which takes them one by one or as a list."""
    first = node.args[1]
    return first if isinstance(first, tuple | list) else node.args[1:]


def hide_in_reduction(
    masked: Callable[..., Any], weighted: Callable[..., Any] | None = None
) -> Hide:
    """The rule of a reduction over one dim.

    Args:
        masked: (x, policy [B, L] of 1 and 0, dim, keepdim) -> the reduction over kept tokens.
        weighted: (x, sizes [B, L], dim, keepdim) -> that over merged tokens; without it a host that
            calls the operator cannot be merged.
    """
    return _in_reduction(lambda ops: weighted if ops.weighs else masked)


def _in_reduction(choose: Callable[[TokenOps], Callable[..., Any] | None]) -> Hide:
    def hide(hiding: Hiding, node: fx.Node) -> None:
        rewrite, source = hiding.rewrite, argument(node, 0, "input")
        dims = rewrite.dims_read(node, source)
        if not dims:
            return
        asked = argument(node, 1, "dim", "axis")
        rank = rewrite.rank(source)
        axes = asked if isinstance(asked, tuple | list) else [asked]
        over = [axis % rank for axis in (range(rank) if asked is None else axes)]
        if not any(axis in dims for axis in over):
            return
        if len(over) != 1:
            raise LeakError(
                f"{rewrite.where(node)} reduces dims {over} at once, among them tokens; only a "
                "reduction over the token dim alone can be masked."
            )
        reduction = choose(hiding.ops)
        if reduction is None:
            raise LeakError(
                f"{rewrite.where(node)} reduces over tokens, and its rule does not say how merged "
                "tokens count. Give `hide_in_reduction` a `weighted` form, or use `mode: remove`."
            )
        policy = hiding.policy(node, dims[over[0]], source)
        keepdim = argument(node, 2, "keepdim", default=False)
        if any(map(has_effect, source.users)):  # written into later: its gradient needs it as it is
            source = rewrite.insert(node, torch.clone, source)
        if node.kwargs.get("dtype") is not None:
            source = rewrite.insert(node, torch.Tensor.to, source, node.kwargs["dtype"])
        hiding.replace(node, reduction, source, policy, over[0], keepdim)

    return hide


@rule(kind=Kind.AVERAGE_POOL)
def _average_pool(hiding: Hiding, node: fx.Node) -> None:
    """`nn.AdaptiveAvgPool1d(1)` on [B, D, N]: a mean over tokens."""
    rewrite, source = hiding.rewrite, argument(node, 0, "input")
    axis = rewrite.rank(source) - 1
    dim = rewrite.facts(source).dims.get(axis)
    if dim is None:
        return
    size = rewrite.traced_module(node).output_size
    if size not in (1, (1,)):
        raise LeakError(
            f"{rewrite.where(node)} pools tokens into {size} bins; only 1 can be masked."
        )
    hiding.replace(node, hiding.ops.mean, source, hiding.policy(node, dim, source), axis, True)


@rule(kind=Kind.BATCH_STATISTIC)
def _batch_norm(hiding: Hiding, node: fx.Node) -> None:
    rewrite, facts = hiding.rewrite, hiding.rewrite.facts(argument(node, 0, "input"))
    if hiding.ops.weighs:
        return
    if (facts.dims or facts.folded) and rewrite.traced_module(node).training:
        raise LeakError(
            f"{rewrite.where(node)} takes batch statistics over dropped tokens too. Put it in eval "
            "mode (freeze its statistics) to train this host."
        )


@rule(kind=Kind.CHECK)
def _check(hiding: Hiding, node: fx.Node) -> None:
    """A flag of a dropped token does not count."""
    rewrite, flags = hiding.rewrite, node.all_input_nodes[0]
    for axis, dim in sorted(rewrite.facts(flags).dims.items())[:1]:
        policy = hiding.policy(node, dim, flags)
        numbers = rewrite.insert(node, torch.Tensor.to, flags, torch.float32)
        node.update_arg(0, rewrite.insert(node, hiding.ops.amax, numbers, policy, axis, False))


rule(kind=Kind.MEAN)(_in_reduction(lambda ops: ops.mean))
rule(kind=Kind.SUM)(_in_reduction(lambda ops: ops.sum))
rule(kind=Kind.AMAX)(_in_reduction(lambda ops: ops.amax))
rule(kind=Kind.MAX)(_in_reduction(lambda ops: ops.max))
