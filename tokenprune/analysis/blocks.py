"""The transformer blocks of a host, in its traced graph.

Which modules are blocks, and which of their arguments holds the tokens, the host's `ArchSpec` says.
A block's attention and its middle are found in the graph.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from tokenprune.analysis.batch_probe import probe_batch
from tokenprune.analysis.equations import equation_of, factors_of
from tokenprune.analysis.nodes import IDENTITY, makers, shape_of
from tokenprune.analysis.operators import Kind, argument, attends, kind_of
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.calls import NUMBER, ModuleCall
from tokenprune.tracing.host_graph import HostGraph, untraceable
from tokenprune.tracing.interpret import quiet_trials
from tokenprune.tracing.modes import MODES, where_predictors_learn
from tokenprune.tracing.opaque import OPAQUE

__all__ = [
    "Attention",
    "Block",
    "Blocks",
    "blocks_of",
    "find_blocks",
    "mark_tokens",
    "sequence_first",
    "site_marker",
]


class Attention(NamedTuple):
    """The first attention of a block.

    Attributes:
        query: Its queries.
        key: Its keys, [..., L, d], or [..., d, L] where `key_dim` is -1.
        key_dim: The dim of `key` that counts tokens, from the right.
        node: The fused attention, or the softmax over keys.
    """

    query: fx.Node
    key: fx.Node
    key_dim: int
    node: fx.Node


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


Blocks = Mapping[int, Block]


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
    running: list[tuple[int, ModuleCall]] = []
    for path, numbers in waiting.items():
        found = traced.calls.get(path, ())
        if len(found) > len(numbers):
            reason = (
                f"block '{path}' runs {len(found)} times, and adapter {spec.adapter!r} names it "
                f"{len(numbers)} times. Name it once for each run: adapter=ArchSpec(blocks=...)"
            )
            raise _refusal(traced, found[len(numbers)].first, reason)
        running += zip(numbers, found, strict=False)
    return blocks_of(host, traced, running, spec)


def blocks_of(
    host: nn.Module, traced: HostGraph, numbered: Iterable[tuple[int, ModuleCall]], spec: ArchSpec
) -> dict[int, Block]:
    """Number -> block of the calls that made nodes; their entries are marked in the graph.

    Raises:
        TraceError: Code decides by what tensors hold at the first block or after it.
    """
    running = [(call.first, n, call) for n, call in numbered if call.first is not None]
    running.sort(key=lambda run: _order(run[0]))
    for node in traced.graph.nodes if running else ():
        last = running[-1][2].last or running[-1][0]
        if OPAQUE in node.meta and _order(running[0][0]) <= _order(node) <= _order(last):
            raise _refusal(traced, node, node.meta[OPAQUE].reason)
    same: dict[fx.Node, fx.Node] = {}  # tokens that a block hands on as they are -> their marker
    blocks: dict[int, Block] = {}
    for first, number, call in running:
        given = call.inputs[spec.token_argument : spec.token_argument + 1]
        if given and given[0] is not None:
            tokens = same.get(given[0], given[0])
            nodes = list(call.nodes())
            readers = [node for node in tokens.users if node in nodes]
            handed_on = call.output is not None and same.get(call.output, call.output) is tokens
            if handed_on:  # perhaps written into: what follows reads the same tensor
                readers = [node for node in tokens.users if _order(node) >= _order(first)]
            if sequence_first(host, traced, tokens):
                tokens, back = _turned(traced, tokens, readers, first)
                entry = mark_tokens(traced, tokens, number, [back], back)
            else:
                entry = mark_tokens(traced, tokens, number, readers, first)
            entry.meta["where"] = first.meta["where"]._replace(module=call.path)
            if handed_on and call.output is not None:
                same[call.output] = entry
                call = call._replace(output=entry)
            middle, attention = _middle(host, nodes, entry), _attention(host, nodes)
            blocks[number] = Block(number, call, entry, middle, attention)
    return dict(sorted(blocks.items()))


def sequence_first(host: nn.Module, traced: HostGraph, tokens: fx.Node) -> bool:
    """Whether tokens are [L, B, D]; where sizes leave that open, more images tell."""
    shape, images = shape_of(tokens), traced.batch_size
    if len(shape) != 3 or shape[1] != images or shape[0] == images:
        return False
    with quiet_trials(), torch.no_grad(), traced.fake_mode:
        facts, bound = probe_batch(host, traced)
    found = facts[tokens]
    return bound or (found.batched and found.rows_per_image is None)


def _turned(
    traced: HostGraph, tokens: fx.Node, readers: Sequence[fx.Node], at: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """[B, L, D] of [L, B, D], and those turned back, which `readers` read."""
    value, kept = tokens.meta["val"], (NUMBER, "where", MODES)
    with traced.graph.inserting_before(at):
        there = traced.graph.call_method("transpose", (tokens, 0, 1))
        back = traced.graph.call_method("transpose", (there, 0, 1))
    for node, seen in ((there, value.transpose(0, 1)), (back, value)):
        meta = {key: at.meta[key] for key in kept if key in at.meta}
        node.meta = {"val": seen, IDENTITY: False, **meta}
    for reader in readers:
        reader.replace_input_with(tokens, back)
    return there, back


def mark_tokens(
    traced: HostGraph, tokens: fx.Node, block: int, readers: Sequence[fx.Node], at: fx.Node
) -> fx.Node:
    """Put a `site_marker` of `tokens` before node `at`; `readers` read the marker instead."""
    with traced.graph.inserting_before(at):
        marker = traced.graph.call_function(site_marker, (tokens, block))
    marker.meta = {"val": tokens.meta["val"], "where": at.meta["where"], NUMBER: at.meta[NUMBER]}
    marker.meta[IDENTITY] = True
    modes = where_predictors_learn(at.meta.get(MODES, ()))
    if modes:
        marker.meta[MODES] = modes
    for reader in readers:
        reader.replace_input_with(tokens, marker)
    return marker


def _order(node: fx.Node) -> int:
    return int(node.meta[NUMBER])


def _refusal(traced: HostGraph, node: fx.Node | None, reason: str) -> Exception:
    shapes = {name: tuple(given.meta["val"].shape) for name, given in traced.inputs.items()}
    opaque = None if node is None else node.meta.get(OPAQUE)
    where = opaque.where if opaque else node and node.meta["where"]
    return untraceable(traced.host, shapes, where, reason)


def _attention(host: nn.Module, nodes: Sequence[fx.Node]) -> Attention | None:
    """The first attention of a block: fused, or the product that a softmax over keys is made of."""
    for node in nodes:
        kind = kind_of(host, node)
        if kind is Kind.ATTENTION:
            query, key = (argument(node, i, name) for i, name in enumerate(("query", "key")))
            return Attention(query, key, -2, node)
        if kind is Kind.SOFTMAX:
            factors = _product_of(host, argument(node, 0, "input"), set(nodes))
            if factors is not None:
                return Attention(*factors, node)
    return None


def _product_of(
    host: nn.Module, scores: fx.Node, inside: set[fx.Node]
) -> tuple[fx.Node, fx.Node, int] | None:
    """The product of queries and keys nearest before `scores`, of the same shape."""
    for node in makers(scores, lambda n: n in inside and shape_of(n)):
        factors = _factors(host, node)
        if factors is not None and shape_of(node)[-2:] == shape_of(scores)[-2:]:
            return factors
    return None


def _factors(host: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """The two factors of a product, and the dim of the second one that becomes the last of the
    product, from the right; None if `node` is none."""
    factors, dim = factors_of(host, node), -1
    if len(factors) != 2 or not all(isinstance(factor, fx.Node) for factor in factors):
        return None
    found = equation_of(node) if kind_of(host, node) is Kind.EINSUM else None
    if found is not None:
        equation, of_key = found[0], found[0].operands[1]
        if equation.output[-1] not in of_key:
            return None
        dim = of_key.index(equation.output[-1]) - len(of_key)
    return factors[0], factors[1], dim


def _middle(host: nn.Module, nodes: Sequence[fx.Node], entry: fx.Node) -> fx.Node | None:
    """The first sum that an attention was added to, if what follows in the block reads the stream
    from there only, and projects it."""
    made = {entry}  # the tensors that were made of it
    for node in nodes:
        if shape_of(node) and not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    for number, total in enumerate(nodes):
        if kind_of(host, total) is not Kind.ADD or shape_of(total) != shape_of(entry):
            continue
        before, after = set(nodes[: number + 1]), set(nodes[number + 1 :])
        earlier = (made & before | {entry}) - {total}
        whole = not any(user in after for node in earlier for user in node.users)
        feeds = any(kind_of(host, node) is Kind.PROJECTION for node in after)
        attention = (n for n in makers(total, before.__contains__) if attends(host, n))
        if whole and feeds and any(kind_of(host, n) is not Kind.CONTRACTION for n in attention):
            return total
    return None
