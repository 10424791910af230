"""Which of the tokens that enter the first block are of the image, and which are the host's own."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from tokenprune.private import without_modes
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate, tensor_attribute
from tokenprune.tracing.state import buffers_kept

__all__ = ["own_tokens"]


def own_tokens(root: nn.Module, traced: HostGraph, entry: fx.Node) -> tuple[int, int] | None:
    """How many tokens at the front and at the end are the same for every image: class, register
    and detection tokens. None if running the host up to its first block does not tell.

    Two batches of random images go through what the host does before that block; nothing of the
    host changes. Whole numbers (token ids) and weights on the meta device tell nothing.
    """
    given = [node.meta["val"] for node in traced.inputs.values()]
    tensors = [
        tensor_attribute(root, str(n.target)) for n in traced.graph.find_nodes(op="get_attr")
    ]
    whole = any(not x.is_floating_point() for x in given)
    if whole or any(t.is_meta for t in tensors if isinstance(t, Tensor)):
        return None
    device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    before = _before(traced.graph.nodes, entry)
    seen = []
    try:
        with without_modes(), torch.no_grad(), buffers_kept(root), torch.random.fork_rng([]):
            for _ in range(2):
                env = {
                    node: torch.randn(node.meta["val"].shape, generator=generator).to(
                        device, node.meta["val"].dtype
                    )
                    for node in traced.inputs.values()
                }
                for node in before:
                    if node not in env:
                        env[node] = evaluate(root, node, env)
                seen.append(env[entry])
    except Exception:  # images of noise may be refused in any way; then nothing is known
        return None
    tokens = torch.cat(seen)
    if tokens.ndim != 3 or not bool(tokens.isfinite().all()):
        return None
    of_image = (tokens != tokens[:1]).any(dim=2).any(dim=0).tolist()
    if not any(of_image):
        return None
    return of_image.index(True), of_image[::-1].index(True)


def _before(nodes: Iterable[fx.Node], entry: fx.Node) -> list[fx.Node]:
    found = []
    for node in nodes:
        found.append(node)
        if node is entry:
            break
    return found
