"""Which of the tokens that enter the first block are of the image, and which are the host's own."""

from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.nodes import shape_of
from tokenprune.errors import UnsupportedHostError
from tokenprune.private import without_modes
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.hooks import calls_unhooked
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate
from tokenprune.tracing.randomness import torch_generators_kept
from tokenprune.tracing.state import buffers_kept

__all__ = ["OwnTokens", "own_at", "own_tokens", "refuse_inside"]

# A host may hide patches by what they hold (dark ones, flat ones): a threshold that one of these
# images is below, another is above. More of them follow, for what none of these changes.
SCALES = (1.0, -1.0, 0.1, 10.0)
MOST = 16
"""Images that are compared, where two batches of them leave some tokens the same."""


class OwnTokens(NamedTuple):
    """The tokens that are the same for every image: class, register and detection tokens.

    Attributes:
        front: How many at the front.
        end: How many at the end.
        inside: The places of those with patches on both sides, counted from 0.
    """

    front: int
    end: int
    inside: tuple[int, ...] = ()


def own_tokens(
    root: nn.Module,
    traced: HostGraph,
    entry: fx.Node,
    around: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> OwnTokens | None:
    """The tokens that are the same for every image. None if running the host up to a block does not
    tell.

    Batches of random images of several scales go through what the host does before that block,
    two, or as long as some tokens are the same: at least `MOST` images. All batches draw the same
    random numbers, so noise tells no tokens apart. Masks (bool) are as in a call without padding:
    first all False, then, if the host refuses that or no token is of the image, all True. Nothing
    of the host changes, and no hook runs. Whole numbers (token ids) and weights on the meta device
    tell nothing.

    Args:
        entry: What enters the block.
        around: What an earlier block returns -> what enters that block, which is used instead: a
            block tells every token of the image.
    """
    kinds = {node.meta["val"].dtype for node in traced.inputs.values()}
    whole = any(not (kind.is_floating_point or kind == torch.bool) for kind in kinds)
    if whole or any(p.is_meta for p in root.parameters()):
        return None
    found = _same_in_all(root, traced, entry, around, masks=False)
    if found is None and torch.bool in kinds:
        found = _same_in_all(root, traced, entry, around, masks=True)
    return found


def own_at(
    root: nn.Module, traced: HostGraph, blocks: Blocks, numbers: Iterable[int]
) -> dict[int, OwnTokens]:
    """The host's own tokens at blocks that tokens leave, without those of which nothing tells.

    They are counted where a grid begins, since a host may add its class token to a later one; where
    there are some, at each of the blocks too, since it may put its tokens into another order.

    Raises:
        UnsupportedHostError: Some are among the patches.
    """
    found = dict[int, OwnTokens | None]()
    for number in numbers:
        shape = shape_of(blocks[number].entry)
        same = {n: block for n, block in blocks.items() if shape_of(block.entry) == shape}
        first = min(same)
        if first not in found:
            found[first] = own_tokens(root, traced, blocks[first].entry)
        own = found[first]
        if own is not None and number not in found and own.front + own.end:
            made = {b.call.output: b.entry for n, b in same.items() if n != number}
            around = {output: entry for output, entry in made.items() if output is not None}
            own = own_tokens(root, traced, blocks[number].entry, around) or own
        if own is not None:
            refuse_inside(traced, own)
        found.setdefault(number, own)
    return {n: own for n in numbers if (own := found[n]) is not None}


def refuse_inside(traced: HostGraph, own: OwnTokens) -> None:
    """Raise UnsupportedHostError if own tokens of the host are among the patches, which leave."""
    front, end, inside = own
    if inside:
        places = f"{inside[0]} to {inside[-1]}" if len(inside) > 1 else str(inside[0])
        raise UnsupportedHostError(
            f"{len(inside)} of the tokens that enter the blocks of {traced.host} are the same "
            f"for every image and lie among its patches (places {places}): registers, say, which "
            "are to stay, while only tokens at the front or at the end can. Move them there, or "
            "let them be dropped as patches are: "
            f"adapter=ArchSpec(num_prefix_tokens={front}, num_suffix_tokens={end})."
        )


def _same_in_all(
    root: nn.Module,
    traced: HostGraph,
    entry: fx.Node,
    around: Mapping[fx.Node, fx.Node],
    *,
    masks: bool,
) -> OwnTokens | None:
    """The tokens that all images share."""
    given = {node: node.meta["val"] for node in traced.inputs.values()}
    generator = torch.Generator().manual_seed(0)
    before = _before(traced.graph.nodes, entry)
    first, images = None, 0
    try:
        with without_modes(), torch.no_grad(), buffers_kept(root, [traced.graph]), calls_unhooked():
            for scale in chain(SCALES, repeat(1.0)):
                env: dict[fx.Node, Any] = {
                    n: _filled(x, generator, masks, scale) for n, x in given.items()
                }
                with torch_generators_kept(root):  # each draws the same
                    for node in before:
                        if node in around:
                            env[node] = env[around[node]]
                        elif node not in env:
                            env[node] = None if is_hook_node(node) else evaluate(root, node, env)
                tokens = env[entry]
                if tokens.ndim != 3 or not len(tokens) or not bool(tokens.isfinite().all()):
                    return None
                again = first is not None
                if first is None:
                    first = tokens
                    of_image = torch.zeros_like(tokens[0, :, 0], dtype=torch.bool)
                of_image = of_image | (tokens != first).any(dim=2).any(dim=0)
                images += len(tokens)
                if again and (bool(of_image.all()) or images >= MOST):
                    break
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # images of noise may be refused in any way; then nothing is known
        return None
    told: list[bool] = of_image.tolist()
    if not any(told):
        return None
    front, end = told.index(True), told[::-1].index(True)
    patches = range(front, len(told) - end)
    return OwnTokens(front, end, tuple(place for place in patches if not told[place]))


def _filled(like: Tensor, generator: torch.Generator, masks: bool, scale: float) -> Tensor:
    """An input of this shape: noise, drawn on the CPU whatever the default device."""
    if like.dtype == torch.bool:
        return torch.full(like.shape, masks, device=like.device)
    noise = torch.randn(like.shape, generator=generator, device="cpu")
    return (noise * scale).to(like.device, like.dtype)


def _before(nodes: Iterable[fx.Node], entry: fx.Node) -> list[fx.Node]:
    found = []
    for node in nodes:
        found.append(node)
        if node is entry:
            break
    return found
