"""The transformer blocks of a host, in its traced graph.

Which modules are blocks, and which of their arguments holds the tokens, the host's `ArchSpec` says.
A block's attention and its middle are found in the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from tokenprune.analysis.operators import Kind, argument, attends, kind_of
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.host_graph import DATA_DEPENDENT, HostGraph, ModuleCall, untraceable
from tokenprune.tracing.opaque import OPAQUE
from tokenprune.tracing.provenance import Provenance
from tokenprune.tracing.tracer import NUMBER

__all__ = ["Attention", "Block", "find_blocks", "mark_tokens", "site_marker"]


class Attention(NamedTuple):
    """The first attention of a block.

    Attributes:
        query: Its queries.
        key: Its keys, [..., L, d], or [..., d, L] where `key_dim` is -1.
        key_dim: The dim of `key` that counts tokens, from the right.
    """

    query: fx.Node
    key: fx.Node
    key_dim: int


@dataclass(frozen=True)
class Block:
    """One block, in one run of it.

    Attributes:
        number: Counted from 0 over the whole host.
        call: The call of its module: what it takes and returns, and its stretch of the graph.
        entry: Marker of the tokens that enter it.
        middle: The sum of the residual stream and its attention; None if it has none, or if what
            follows reads the stream from before that sum too (parallel branches).
        attention: None if it has none that is recognised.
    """

    number: int
    call: ModuleCall
    entry: fx.Node
    middle: fx.Node | None
    attention: Attention | None

    @property
    def path(self) -> str:
        """Path of its module."""
        return self.call.path


def site_marker(tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Identity that marks the residual stream in block `block`; the rewriter puts stages here."""
    return tokens


def find_blocks(host: nn.Module, traced: HostGraph, spec: ArchSpec) -> dict[int, Block]:
    """Number -> block, for the blocks that run; their entries are marked in the graph.

    Raises:
        TraceError: A block runs more often than `spec.blocks` names it; or code decides by what
            tensors hold at the first block or after it.
    """
    paths = {module: path for path, module in host.named_modules()}
    waiting: dict[str, list[int]] = {}
    for number, path in enumerate(spec.blocks):
        waiting.setdefault(paths[host.get_submodule(path)], []).append(number)
    running: list[tuple[fx.Node, int, ModuleCall]] = []
    for path, numbers in waiting.items():
        found = traced.calls.get(path, ())
        if len(found) > len(numbers):
            raise _refusal(
                traced,
                found[len(numbers)].first,
                f"block '{path}' runs more often than the adapter's `blocks` name it",
            )
        running += [
            (call.first, number, call)
            for number, call in zip(numbers, found, strict=False)
            if call.first is not None
        ]
    running.sort(key=lambda run: _order(run[0]))
    if running:
        _check_values_unread(traced, running[0][0])
    same: dict[fx.Node, fx.Node] = {}  # tokens that a block hands on as they are -> their marker
    blocks: dict[int, Block] = {}
    for first, number, call in running:
        tensors = [same.get(node, node) for node in call.inputs if node is not None]
        if len(tensors) > spec.token_argument:
            tokens = tensors[spec.token_argument]
            nodes = list(call.nodes())
            readers = [node for node in tokens.users if node in set(nodes)]
            handed_on = call.output is not None and same.get(call.output, call.output) is tokens
            if handed_on:  # perhaps written into: what follows reads the same tensor
                readers = [node for node in tokens.users if _order(node) >= _order(first)]
            entry = mark_tokens(traced, tokens, number, readers, first)
            where = first.meta["where"]
            entry.meta["where"] = Provenance(call.path, where.file, where.line)
            if handed_on and call.output is not None:
                same[call.output] = entry
                call = call._replace(output=entry)
            blocks[number] = Block(
                number, call, entry, _middle(host, nodes, entry), _attention(host, nodes)
            )
    return dict(sorted(blocks.items()))


def mark_tokens(
    traced: HostGraph, tokens: fx.Node, block: int, readers: Sequence[fx.Node], at: fx.Node
) -> fx.Node:
    """Put a `site_marker` of `tokens` before node `at`; `readers` read the marker instead."""
    with traced.graph.inserting_before(at):
        marker = traced.graph.call_function(site_marker, (tokens, block))
    marker.meta = {"val": tokens.meta["val"], "where": at.meta["where"], NUMBER: at.meta[NUMBER]}
    for reader in readers:
        reader.replace_input_with(tokens, marker)
    return marker


def _order(node: fx.Node) -> int:
    return int(node.meta[NUMBER])


def _check_values_unread(traced: HostGraph, first: fx.Node) -> None:
    """Code that decides by what tensors hold may run before the first block only."""
    for node in traced.graph.nodes:
        if OPAQUE in node.meta and _order(node) >= _order(first):
            raise _refusal(traced, node, DATA_DEPENDENT)


def _refusal(traced: HostGraph, node: fx.Node | None, reason: str) -> Exception:
    shapes = {name: tuple(given.meta["val"].shape) for name, given in traced.inputs.items()}
    where = None if node is None else node.meta.get(OPAQUE, node.meta["where"])
    return untraceable(traced.host, shapes, where, reason)


def _attention(host: nn.Module, nodes: Sequence[fx.Node]) -> Attention | None:
    """The first attention of a block: fused, or the product that a softmax over keys is made of."""
    for node in nodes:
        kind = kind_of(host, node)
        if kind is Kind.ATTENTION:
            query, key = (argument(node, i, name) for i, name in enumerate(("query", "key")))
            return Attention(query, key, -2)
        if kind is Kind.SOFTMAX:
            scores = argument(node, 0, "input")
            product = _product_of(host, scores, set(nodes)) if scores is not None else None
            if product is not None:
                return product
    return None


def _product_of(host: nn.Module, scores: fx.Node, inside: set[fx.Node]) -> Attention | None:
    """The product of queries and keys nearest before `scores`, of the same shape."""
    queue, seen = [scores], {scores}
    while queue:
        node = queue.pop(0)
        factors = _factors(host, node)
        if factors is not None and _shape(node)[-2:] == _shape(scores)[-2:]:
            return Attention(*factors, -1)
        fresh = [n for n in node.all_input_nodes if n in inside and n not in seen and _shape(n)]
        seen.update(fresh)
        queue += fresh
    return None


def _factors(host: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product; None if `node` is none."""
    if node.target is torch.baddbmm or node.target == "baddbmm":
        left, right = node.args[1], node.args[2]
    elif kind_of(host, node) is Kind.CONTRACTION:
        left, right = node.args[0], argument(node, 1, "other", "mat2")
    else:
        return None
    pair = isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return (left, right) if pair else None  # type: ignore[return-value]


def _middle(host: nn.Module, nodes: Sequence[fx.Node], entry: fx.Node) -> fx.Node | None:
    """The first sum that an attention was added to, if what follows in the block reads the stream
    from there only, and projects it."""
    shape = _shape(entry)
    made = _made_of(entry, nodes)
    for number, total in enumerate(nodes):
        if kind_of(host, total) is not Kind.ADD or _shape(total) != shape:
            continue
        before, after = set(nodes[: number + 1]), set(nodes[number + 1 :])
        earlier = (made & before | {entry}) - {total}
        whole = not any(user in after for node in earlier for user in node.users)
        feeds = any(kind_of(host, node) is Kind.PROJECTION for node in after)
        if whole and feeds and _attention_before(host, total, before):
            return total
    return None


def _attention_before(host: nn.Module, total: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether one side of a sum was made by an attention within the block."""
    queue, seen = [total], {total}
    while queue:
        node = queue.pop()
        if attends(host, node) and kind_of(host, node) is not Kind.CONTRACTION:
            return True
        fresh = [n for n in node.all_input_nodes if n in inside and n not in seen]
        seen.update(fresh)
        queue += fresh
    return False


def _made_of(source: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The tensors among `nodes` that were made of `source`."""
    found = {source}
    for node in nodes:
        if _shape(node) and any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor; () if it holds none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


Blocks = Mapping[int, Block]
