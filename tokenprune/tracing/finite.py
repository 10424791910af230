"""Branches of a host's code that only values which are not finite take.

`if not torch.isfinite(x).all(): x = x.clamp(...)` stands in the training forward of DETR and of the
detectors that follow it. It is traced as for finite values, and a node checks in each call that the
values of `x` are.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from tokenprune.errors import HostError
from tokenprune.private import FakeTensor
from tokenprune.tracing.draws import certain

__all__ = ["answer", "check_finite"]

USUAL = {"isfinite": True, "isinf": False, "isnan": False, "isposinf": False, "isneginf": False}
"""What each of these says about an entry that is finite."""
KEEP = {"all", "any", "item", "squeeze", "flatten", "view", "reshape", "to", "bool", "getitem"}
INVERT = {"logical_not", "bitwise_not", "invert", "inv"}
JOIN: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("and_", "logical_and", "bitwise_and", "__and__"), operator.and_),
    **dict.fromkeys(("or_", "logical_or", "bitwise_or", "__or__"), operator.or_),
}


def answer(node: fx.Node, record: Callable[..., fx.Node]) -> bool | None:
    """What Python is told that asks a tensor: what is certain, or holds for finite values. That
    they are is then checked in each call, by nodes that `record` makes as `Tracer.create_node`
    does. None if the answer depends on values."""
    known, found = certain(node), _for_finite(node)
    if known is not None or found is None:
        return known
    for asked in found[1]:
        name = str(getattr(asked.target, "__name__", asked.target))
        unusual = record("call_function", operator.ne, (asked, USUAL[name]), {})
        unusual.meta["val"] = asked.meta["val"]
        check = record("call_function", check_finite, (unusual, name, str(asked.meta["where"])), {})
        check.meta["val"] = None
    return found[0]


def _for_finite(node: fx.Node) -> tuple[bool, list[fx.Node]] | None:
    """What a question says where all values are finite, and the nodes that ask each entry of a
    tensor; None if it asks something else."""
    name = str(getattr(node.target, "__name__", node.target))
    if name in USUAL and node.op != "call_module":
        return USUAL[name], [node]
    if name not in KEEP | INVERT | JOIN.keys():
        return None
    given = [_for_finite(used) for used in node.all_input_nodes]
    if not given or given[0] is None or given[-1] is None:
        return None
    (said, asked), other = given[0], given[-1]
    if name in JOIN and len(given) == 2:
        return JOIN[name](said, other[0]), asked + other[1]
    return (said != (name in INVERT), asked) if len(given) == 1 else None


def check_finite(unusual: Tensor, question: str, where: str) -> None:
    """Raise HostError if an entry of `unusual` is set; the `question` about finite values was asked
    at `where`."""
    if not isinstance(unusual, FakeTensor) and bool(unusual.any()):
        raise HostError(
            f"The host asks torch.{question} at {where}, and values there are not finite, for "
            "which it goes another way than when it was traced. Use float32 or bfloat16, a smaller "
            "learning rate or gradient clipping; model.using('dense') runs the host itself."
        )
