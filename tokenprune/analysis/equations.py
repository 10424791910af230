"""What a product multiplies, and which dims of which operand an equation sums over."""

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tokenprune.analysis.nodes import shape_of
from tokenprune.analysis.operators import Kind, argument, kind_of

__all__ = ["Equation", "equation_of", "factors_of"]


class Equation(NamedTuple):
    """An equation of `torch.einsum`, taken apart.

    Attributes:
        operands: The subscripts of each operand, one entry a dim: letters, and numbers for what an
            ellipsis stands for.
        output: Those of the result.
    """

    operands: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]

    @classmethod
    def of(cls, text: str, ranks: list[int]) -> "Equation":
        """The equation `text` for operands of these ranks."""
        left, arrow, right = text.replace(" ", "").partition("->")
        terms = [_spelled(term, rank) for term, rank in zip(left.split(","), ranks, strict=True)]
        if arrow:
            longest = max((sum(s.isdigit() for s in term) for term in terms), default=0)
            dots = tuple(str(n) for n in range(longest))[::-1]
            before, ellipsis, after = right.partition("...")
            output = (*before, *(dots if ellipsis else ()), *after)
        else:  # the letters that come once, in their order
            letters = [s for term in terms for s in term]
            dots = tuple(sorted({s for s in letters if s.isdigit()}, reverse=True))
            output = (*dots, *sorted(s for s in letters if letters.count(s) == 1 and s.isalpha()))
        return cls(tuple(terms), output)

    def summed(self) -> list[str]:
        """The subscripts that are summed over."""
        letters = dict.fromkeys(s for term in self.operands for s in term)
        return [s for s in letters if s not in self.output]


def _spelled(term: str, rank: int) -> tuple[str, ...]:
    before, ellipsis, after = term.partition("...")
    missing = rank - len(before) - len(after) if ellipsis else 0
    dots = [str(n) for n in range(missing)]
    return (*before, *reversed(dots), *after)


def equation_of(node: fx.Node) -> tuple[Equation, list[Any]] | None:
    """The equation of a call of `torch.einsum`, and its operands; None if it is given as lists."""
    text, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(text, str) or not all(isinstance(n, fx.Node) for n in operands):
        return None
    ranks = [len(shape_of(n)) for n in operands if isinstance(n, fx.Node)]
    return Equation.of(text, ranks), operands


def factors_of(root: nn.Module, node: fx.Node) -> list[Any]:
    """What a node multiplies by each other, without masks and biases; nothing if it is no product
    over tokens."""
    kind = kind_of(root, node)
    if kind is Kind.ATTENTION:
        return [argument(node, n, name) for n, name in enumerate(("query", "key", "value"))]
    if kind is Kind.EINSUM:
        return (equation_of(node) or (None, []))[1]
    if node.target in (torch.baddbmm, "baddbmm"):
        return [argument(node, 1, "batch1"), argument(node, 2, "batch2")]
    if kind is Kind.CONTRACTION:
        return [argument(node, 0, "input"), argument(node, 1, "other", "mat2")]
    return []
