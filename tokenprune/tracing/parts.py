"""Python goes through the parts that a host cuts tokens into, so a program has a fixed number."""

from torch import fx

__all__ = ["cut_evenly"]

CUTS = ("chunk", "split")


def cut_evenly(graph: fx.Graph) -> None:
    """Cut by `tensor_split` where `chunk` or `split` made parts of one size.

    Those parts are the same; of fewer tokens `tensor_split` makes as many (in a chunked
    feed-forward), and the others fewer. Not along the first dim, where images are, nor along the
    last, where channels are, unless the number itself was computed.
    """
    for node in graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if name not in CUTS or node.op not in ("call_method", "call_function"):
            continue
        given = dict(zip(("of", "number", "dim"), node.args, strict=False))
        whole, dim = given.get("of"), given.get("dim", node.kwargs.get("dim", 0))
        number = given.get("number", next(iter(node.kwargs.values()), None))
        if not isinstance(whole, fx.Node) or not isinstance(dim, int):
            continue
        parts = node.meta["val"]
        sizes = {part.shape[dim] for part in parts}
        tokens = 0 < dim % whole.meta["val"].ndim < whole.meta["val"].ndim - 1
        if len(sizes) == 1 and (isinstance(number, fx.Node) or tokens):
            node.op, node.target = "call_method", "tensor_split"
            node.args, node.kwargs = (whole, len(parts)), {"dim": dim}
