"""What Python asks of buffers alone: settings that a host keeps as tensors, to save them.

No input has a part in the answer, so it is that of the buffers' real values, and a trace holds as
long as they have these values.
"""

from typing import Any

import torch
from torch import fx, nn

from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.interpret import Environment, evaluate
from tokenprune.tracing.stand_ins import is_plain

__all__ = ["FEW", "buffers_behind", "value_of_buffers"]

FEW = 64
"""How many numbers a setting may be: each call compares them."""


def buffers_behind(root: nn.Module, node: fx.Node) -> list[tuple[nn.Module, str]] | None:
    """The buffers, each as a module and a name, that alone a node is computed from; None if it is
    computed from anything else, or the forward writes into one."""
    found, waiting, seen = list[tuple[nn.Module, str]](), [node], {node}
    while waiting:
        each = waiting.pop()
        if each.op == "get_attr":
            path, _, name = str(each.target).rpartition(".")
            owner = root.get_submodule(path)
            value = owner._buffers.get(name)
            if value is None or not is_plain(value) or value.is_meta or value.numel() > FEW:
                return None
            if any(map(has_effect, each.users)):
                return None
            found.append((owner, name))
        elif each.op in ("placeholder", "call_module") or not each.all_input_nodes:
            return None
        fresh = [used for used in each.all_input_nodes if used not in seen]
        seen.update(fresh)
        waiting += fresh
    return found


def value_of_buffers(root: nn.Module, node: fx.Node) -> Any:
    """The value of a node that is computed from buffers alone."""
    env: Environment = {}

    def compute(each: fx.Node) -> Any:
        if each not in env:
            for used in each.all_input_nodes:
                compute(used)
            env[each] = evaluate(root, each, env)
        return env[each]

    with torch.no_grad():
        return compute(node)
