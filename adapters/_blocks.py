"""Find the transformer blocks of a host that no family matches, by what its modules contain."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tokenprune.adapters._facts import join, parent

__all__ = ["Stack", "find_stacks"]

# Children or parameters that make a module an attention: query projections, alone or fused.
QUERY = re.compile(
    r"(to_|w_?)?(q|qk|qkv|qv|kqv|query|queries|query_key_value)(_?(proj|lin|linear|conv))?"
    r"|in_proj(_\w+)?|c_attn|linear_q",
    re.IGNORECASE,
)
MIXER = re.compile(r"mixer|modulation|attn|attention", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|\bff\b", re.IGNORECASE)
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Stack:
    """Blocks whose containers have the same path, numbers aside, in order."""

    kinds: tuple[str, ...]  # names of their classes
    blocks: tuple[str, ...]  # their paths

    def __str__(self) -> str:
        return f"{len(self.blocks)} blocks of class {' and '.join(self.kinds)}"


def find_stacks(host: nn.Module) -> list[Stack]:
    """All stacks of transformer blocks in `host`, the longest first."""
    listed = [
        join(path, name)
        for path, module in host.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for name, child in module.named_children()
        if is_block(child)
    ]
    # a stage that holds blocks looks like one itself
    holders = {above for path in listed for above in _above(path)}
    found: dict[str, list[str]] = defaultdict(list)
    for path in listed:
        if path not in holders:
            found[re.sub(r"\d+", "#", parent(path))].append(path)
    stacks = []
    for blocks in found.values():
        kinds = dict.fromkeys(type(host.get_submodule(path)).__name__ for path in blocks)
        stacks.append(Stack(tuple(kinds), tuple(blocks)))
    return sorted(stacks, key=lambda stack: len(stack.blocks), reverse=True)


def _above(path: str) -> Iterator[str]:
    while path := parent(path):
        yield path


def is_attention(module: nn.Module) -> bool:
    """Whether `module` itself holds a query projection."""
    names = [name for name, _ in module.named_children()]
    names += [name for name, _ in module.named_parameters(recurse=False)]
    return any(QUERY.fullmatch(name) for name in names)


def is_block(module: nn.Module) -> bool:
    """Whether `module` holds a token mixer and a feed-forward part.

    An attention is recognised by its query projection; any other mixer by its name, if another
    child has the name of a feed-forward part.
    """
    inside: set[nn.Module] = set()
    for child in module.modules():
        if child not in inside and is_attention(child):
            if child is module:  # attention and feed-forward fused into one module
                return any(FEED_FORWARD.search(name) for name, _ in module.named_children())
            inside.update(child.modules())
    if not inside:
        names = [name for name, _ in module.named_children()]
        return any(map(FEED_FORWARD.search, names)) and any(map(MIXER.search, names))
    others = [m for m in module.modules() if m not in inside and isinstance(m, LINEAR)]
    return len(others) >= 2
