"""Operators without a rule, tried on random numbers: does a token's result depend on other tokens?

`wrap` proves the programs that it makes. A later trace may hold operators that no proof has seen:
the host was changed, or runs in training mode. Those alone are tried, each by itself, so that
neither the host nor its hooks run.
"""

import operator
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from tokenprune.analysis.facts import NodeFacts
from tokenprune.analysis.operators import kind_of
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
    """Nodes of one trace, run with two sets of numbers that differ in every second patch token."""

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
            if kind_of(self.root, maker) is None and any(map(self._holds, maker.all_input_nodes)):
                yield node, self._key(node, maker)

    def leaks(self, node: fx.Node) -> bool:
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
            with torch.no_grad(), calls_unhooked():
                found = self._evaluate(node, given)
            if found.shape == shape and bool(((found == 0) | (found == 1)).all()):
                return found.bool()
        except Exception:  # it takes no such numbers
            pass
        return next((m for m in marks.values() if m is not None and m.shape == shape), None)

    def _run(self, node: fx.Node, moved: bool) -> Tensor:
        maker = _maker(node)
        with torch.no_grad(), calls_unhooked():
            torch.manual_seed(0)  # noise of its own is the same both times
            env = {n: self._number(n) for n in maker.all_input_nodes}
            for used in env if moved else ():
                marks = self._of_moved(used)
                outside = any(s.gives_all(used, maker) for s in self.analysis.stretches)
                if marks is not None and not outside:
                    env[used] = torch.where(marks, _other(env[used]), env[used])
            return self._evaluate(node, env)

    def _evaluate(self, node: fx.Node, env: dict[fx.Node, Any]) -> Tensor:
        maker = _maker(node)
        value: Any = evaluate(self.root, maker, env)
        found: Tensor = value if maker is node else value[node.args[1]]
        return found

    def _number(self, node: fx.Node) -> Any:
        return tree_map(_random, node.meta.get("val"))


def _maker(node: fx.Node) -> fx.Node:
    """The node that computes what `node` holds: another one, of which it picks one tensor."""
    if node.op == "call_function" and node.target is operator.getitem:
        source: Any = node.args[0]
        if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), tuple | list):
            return source
    return node


def _random(leaf: Any) -> Any:
    """Random numbers of the form of a tensor; indices are 0, which is in any range."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape, device, dtype = leaf.shape, leaf.device, leaf.dtype
    if leaf.is_complex():
        return torch.randn(shape, device=device, dtype=dtype)
    if leaf.is_floating_point():
        return torch.randn(shape, device=device).to(dtype)
    if dtype is torch.bool:
        return torch.rand(shape, device=device) < 0.5
    return torch.zeros(shape, device=device, dtype=dtype)


def _other(x: Tensor) -> Tensor:
    """Other numbers: the largest become the smallest."""
    if x.dtype is torch.bool:
        return ~x
    return 1 - 5 * x if x.is_floating_point() or x.is_complex() else x


def _wide(x: Tensor) -> Tensor:
    """As numbers that can be compared."""
    return x if x.is_complex() else x.double()
