"""Which of the tokens that enter the first block are of the image, and which are the host's own."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.nodes import shape_of
from tokenprune.private import without_modes
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.hooks import calls_unhooked
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate
from tokenprune.tracing.state import buffers_kept

__all__ = ["own_tokens", "prefix_of_grid"]


def own_tokens(root: nn.Module, traced: HostGraph, entry: fx.Node) -> tuple[int, int] | None:
    """How many tokens at the front and at the end are the same for every image: class, register
    and detection tokens. None if running the host up to its first block does not tell.

    Two batches of random images go through what the host does before that block, without dropout,
    which would tell equal tokens apart. Masks (bool) are as in a call without padding: first all
    False, then, if the host refuses that or no token is of the image, all True. Nothing of the
    host changes, and no hook runs. Whole numbers (token ids) and weights on the meta device tell
    nothing.
    """
    kinds = {node.meta["val"].dtype for node in traced.inputs.values()}
    whole = any(not (kind.is_floating_point or kind == torch.bool) for kind in kinds)
    if whole or any(p.is_meta for p in root.parameters()):
        return None
    found = _same_in_all(root, traced, entry, masks=False)
    if found is None and torch.bool in kinds:
        found = _same_in_all(root, traced, entry, masks=True)
    return found


def prefix_of_grid(root: nn.Module, traced: HostGraph, blocks: Blocks, number: int) -> int | None:
    """How many tokens at the front are the host's own on the grid of a block, counted where that
    grid begins: a host may add its class token to a later one. None if nothing tells."""
    shape = shape_of(blocks[number].entry)
    first = min(n for n, block in blocks.items() if shape_of(block.entry) == shape)
    own = own_tokens(root, traced, blocks[first].entry)
    return None if own is None else own[0]


def _same_in_all(
    root: nn.Module, traced: HostGraph, entry: fx.Node, *, masks: bool
) -> tuple[int, int] | None:
    """How many tokens at the front and at the end two batches of images share."""
    given = {node: node.meta["val"] for node in traced.inputs.values()}
    devices = {x.device for x in given.values() if x.device.type == "cuda"}
    generator = torch.Generator().manual_seed(0)
    before = _before(traced.graph.nodes, entry)
    seen = []
    random, unhooked = torch.random.fork_rng(devices), calls_unhooked()
    try:
        with without_modes(), torch.no_grad(), buffers_kept(root), random, unhooked:
            for _ in range(2):
                env = {n: _filled(x, generator, masks) for n, x in given.items()}
                for node in before:
                    if node not in env:
                        env[node] = _value(root, node, env)
                seen.append(env[entry])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # images of noise may be refused in any way; then nothing is known
        return None
    tokens = torch.cat(seen)
    if tokens.ndim != 3 or not bool(tokens.isfinite().all()):
        return None
    of_image = (tokens != tokens[:1]).any(dim=2).any(dim=0).tolist()
    if not any(of_image):
        return None
    return of_image.index(True), of_image[::-1].index(True)


def _filled(like: Tensor, generator: torch.Generator, masks: bool) -> Tensor:
    """An input of this shape: noise, drawn on the CPU whatever the default device."""
    if like.dtype == torch.bool:
        return torch.full(like.shape, masks, device=like.device)
    noise = torch.randn(like.shape, generator=generator, device="cpu")
    return noise.to(like.device, like.dtype)


def _value(root: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    if is_hook_node(node):
        return None
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    drops = node.target is F.dropout or isinstance(module, nn.modules.dropout._DropoutNd)
    return env[node.all_input_nodes[0]] if drops else evaluate(root, node, env)


def _before(nodes: Iterable[fx.Node], entry: fx.Node) -> list[fx.Node]:
    found = []
    for node in nodes:
        found.append(node)
        if node is entry:
            break
    return found
