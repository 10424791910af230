"""Operators without a rule, tried on random numbers: does a token's result depend on other tokens,
or on how many there are?

`wrap` proves the programs that it makes. A later trace may hold operators that no proof has seen:
the host was changed, or runs in training mode. Those alone are tried, each by itself, so that
neither the host nor its hooks run.
"""

import operator
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from tokenprune.analysis.facts import NodeFacts
from tokenprune.analysis.operators import has_rule, reduces
from tokenprune.errors import LeakError
from tokenprune.private import tree_map
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.hooks import calls_unhooked
from tokenprune.tracing.interpret import evaluate
from tokenprune.tracing.randomness import torch_generators_kept

if TYPE_CHECKING:
    from tokenprune.analysis.analysis import Analysis

__all__ = ["check_alone"]


def check_alone(
    root: nn.Module, analysis: "Analysis", known: Collection[str], *, proven: bool
) -> frozenset[str]:
    """Try the operators of a trace that are not among the `known` ones; none, if somebody proves
    its programs. Returns what names all of them.

    Raises:
        LeakError: One that no rule knows reads other tokens than its result is of.
    """
    trial = _Trial(root, analysis)
    found = {key: node for node, key in trial.candidates()}
    new = [] if proven else [node for key, node in found.items() if key not in known]
    with torch_generators_kept() if new else nullcontext():
        leak = next(filter(trial.leaks, new), None)
    if leak is not None:
        raise LeakError(
            f"'{leak.name}' ({_maker(leak).target}) at {leak.meta['where']} mixes tokens, and no "
            "rule says how dropped ones are hidden from the others. Leave it out, write a rule "
            "(tokenprune.rewrite.rule), or unwrap the model and wrap it with `mode: bypass`."
        )
    return frozenset(found)


class _Trial:
    """Nodes of one trace, run with two sets of numbers that differ in every second patch token,
    and with every second patch token alone."""

    def __init__(self, root: nn.Module, analysis: "Analysis") -> None:
        self.root, self.analysis = root, analysis
        self._moved: dict[fx.Node, Tensor | None] = {}

    def candidates(self) -> Iterator[tuple[fx.Node, str]]:
        """The nodes that make a tensor of tokens by an operator without a kind; and what of each
        decides how it treats them."""
        for node in self.analysis.traced.graph.nodes:
            maker = _maker(node)
            called = maker.op in ("call_function", "call_method", "call_module")
            if not called or not isinstance(node.meta.get("val"), Tensor) or is_hook_node(node):
                continue
            given = maker.all_input_nodes
            ruled = self._ruled(maker) and not any(map(self._counts, given))
            if not ruled and any(map(self._holds, given)):
                yield node, self._key(node, maker)

    def _ruled(self, maker: fx.Node) -> bool:
        """Whether it is known how a node treats tokens; a mean along a dim that holds more than
        tokens is none that a rule can weigh."""
        folded = any(self._facts(n).folded for n in maker.all_input_nodes)
        return has_rule(self.root, maker) and not (folded and reduces(self.root, maker))

    def leaks(self, node: fx.Node) -> bool:
        """Whether a token's result depends on others, as far as it can be told."""
        if self._counted(node):
            return True
        return not self._ruled(_maker(node)) and (self._mixes(node) or self._places(node))

    def _mixes(self, node: fx.Node) -> bool:
        """Whether entries that are of no changed token changed; not, if that cannot be told."""
        expected = self._of_moved(node)
        if node.meta["val"].is_meta or (expected is None and self._facts(node).folded):
            return False
        try:
            before, after = (self._run(node, moved) for moved in (False, True))
            same = torch.isclose(_wide(before), _wide(after), 1e-3, 1e-5, equal_nan=True)
        except Exception:  # it does not run on such numbers, or its weights are elsewhere
            return False
        return not bool((same if expected is None else same | expected).all())

    def _counted(self, node: fx.Node) -> bool:
        """Whether another number of tokens, where it is read as a number, gives other entries."""
        maker = _maker(node)
        numbers = [n for n in maker.all_input_nodes if self._counts(n)]
        if not numbers or node.meta["val"].is_meta or self._outside(maker):
            return False
        try:
            env = self._drawn(maker)
            before = self._evaluate(node, env)
            after = self._evaluate(node, env | {n: env[n] + 1 for n in numbers})
            return before.shape == after.shape and not _close(before, after)
        except Exception:  # a size that nothing else has
            return False

    def _places(self, node: fx.Node) -> bool:
        """Whether tokens without the others give something else; not, if that cannot be told."""
        maker, facts = _maker(node), self._facts(node)
        given = maker.all_input_nodes
        unclear = facts.folded or any(self._facts(n).folded for n in given) or facts.gathers
        if unclear or node.meta["val"].is_meta or self._outside(maker):
            return False
        if any(map(self._counts, given)):
            return False
        try:
            env = self._drawn(maker)
            before = self._evaluate(node, env)
            again = self._evaluate(node, env, seed=1)
            fewer = {n: self._without(n, env[n]) for n in given}
            after, expected = self._evaluate(node, fewer), self._without(node, before)
            return after.shape != expected.shape or (
                _close(before, again) and not _close(expected, after)
            )
        except Exception:  # it does not run with fewer
            return False

    def _without(self, node: fx.Node, value: Any) -> Any:
        """What is left of a tensor of tokens."""
        for dim, tokens in self._facts(node).dims.items():
            length, prefix = value.shape[dim], tokens.prefix
            kept = [*range(prefix), *range(prefix + 1, length, 2)]
            value = value.index_select(dim, torch.tensor(kept, device=value.device))
        return value

    def _counts(self, node: fx.Node) -> bool:
        return self._facts(node).follows_tokens and type(node.meta.get("val")) in (int, float)

    def _outside(self, maker: fx.Node) -> bool:
        """Whether all tokens are there again, or are read as such."""
        given = maker.all_input_nodes
        return any(s.gives_all(n, maker) for s in self.analysis.stretches for n in given)

    def _drawn(self, maker: fx.Node) -> dict[fx.Node, Any]:
        torch.manual_seed(0)
        return {n: self._number(n) for n in maker.all_input_nodes}

    def _facts(self, node: fx.Node) -> NodeFacts:
        return self.analysis.facts[node]

    def _holds(self, node: fx.Node) -> bool:
        return bool(self._facts(node).dims) or self._facts(node).folded

    def _key(self, node: fx.Node, maker: fx.Node) -> str:
        target: Any = maker.target
        if maker.op == "call_module":
            module = self.root.get_submodule(str(target))
            target = type(module), module.extra_repr()
        given = map_arg((maker.args, maker.kwargs), self._form)
        return repr((target, given, node.args[1:] if maker is not node else ()))

    def _form(self, node: fx.Node) -> str:
        facts, value = self._facts(node), node.meta.get("val")
        rank = value.ndim if isinstance(value, Tensor) else None
        return f"{rank}, { {d: dim.prefix for d, dim in facts.dims.items()} }, {facts.folded}"

    def _of_moved(self, node: fx.Node) -> Tensor | None:
        """Which entries of a tensor are of a token that changes; None if none is, or nobody knows
        which."""
        if node not in self._moved:
            facts, value = self._facts(node), node.meta.get("val")
            if not isinstance(value, Tensor) or not self._holds(node):
                self._moved[node] = None
            elif facts.folded:
                self._moved[node] = self._rearranged(node)
            else:
                moved = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
                for dim, tokens in facts.dims.items():
                    moved.transpose(0, dim)[tokens.prefix + 1 :: 2] = True
                self._moved[node] = moved
        return self._moved[node]

    def _rearranged(self, node: fx.Node) -> Tensor | None:
        """The same of a tensor in which tokens share a dim with something else: what makes it is
        run on the marks; or it has the marks of an argument that lies as it does."""
        marks = {n: self._of_moved(n) for n in _maker(node).all_input_nodes}
        given = {n: self._number(n) if m is None else m.float() for n, m in marks.items()}
        shape = node.meta["val"].shape
        try:
            found = self._evaluate(node, given)
            if found.shape == shape and bool(((found == 0) | (found == 1)).all()):
                return found.bool()
        except Exception:  # it takes no such numbers
            pass
        return next((m for m in marks.values() if m is not None and m.shape == shape), None)

    def _run(self, node: fx.Node, moved: bool) -> Tensor:
        maker = _maker(node)
        env = self._drawn(maker)
        for used in env if moved else ():
            marks = self._of_moved(used)
            outside = any(s.gives_all(used, maker) for s in self.analysis.stretches)
            if marks is not None and not outside:
                env[used] = torch.where(marks, _other(env[used]), env[used])
        return self._evaluate(node, env)

    def _evaluate(self, node: fx.Node, env: dict[fx.Node, Any], seed: int = 0) -> Tensor:
        """What a node gives, none of its arguments being written to."""
        maker = _maker(node)
        torch.manual_seed(seed)  # noise of its own is the same each time
        with torch.no_grad(), calls_unhooked():
            value: Any = evaluate(self.root, maker, tree_map(_copied, env))
        if maker is node:
            return cast(Tensor, value)
        picks: Any = node.target
        return cast(Tensor, picks(value, node.args[1]))

    def _number(self, node: fx.Node) -> Any:
        return tree_map(_random, node.meta.get("val"))


def _maker(node: fx.Node) -> fx.Node:
    """The node that computes what `node` holds: another one, of which it picks one tensor."""
    if node.op == "call_function" and node.target in (operator.getitem, getattr):
        source: Any = node.args[0]
        if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), tuple | list):
            return source
    return node


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _random(leaf: Any) -> Any:
    """Random numbers of the form of a tensor; indices are 0, which is in any range."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape, device, dtype = leaf.shape, leaf.device, leaf.dtype
    if leaf.is_complex():
        return torch.randn(shape, device=device, dtype=dtype)
    if leaf.is_floating_point():
        return torch.randn(shape, device=device).to(dtype)
    if dtype is torch.bool and not shape:
        return torch.rand(shape, device=device) < 0.5
    if dtype is torch.bool:
        # few are unlike the others: whether any is, or all are, depends on one
        rare = torch.rand(shape, device=device) * max(shape, default=1) < 1
        rare[1::2] = ~rare[1::2]
        return rare
    return torch.zeros(shape, device=device, dtype=dtype)


def _other(x: Tensor) -> Tensor:
    """Other numbers: the largest become the smallest."""
    if x.dtype is torch.bool:
        return ~x
    return 1 - 5 * x if x.is_floating_point() or x.is_complex() else x


def _close(x: Tensor, y: Tensor) -> bool:
    return bool(torch.isclose(_wide(x), _wide(y), 1e-3, 1e-5, equal_nan=True).all())


def _wide(x: Tensor) -> Tensor:
    """As numbers that can be compared."""
    return x if x.is_complex() else x.double()
