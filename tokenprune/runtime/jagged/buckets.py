"""Run a cut graph with the images of a batch sorted into buckets of about equal length."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.errors import UnsupportedHostError
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import SETTINGS
from tokenprune.runtime.jagged.cut import Segment, cut
from tokenprune.tracing.hooks import has_hooks

__all__ = ["Bucketed", "divide", "filled"]


class Bucket(NamedTuple):
    """Some images of a batch, by their numbers in it, and how many tokens the longest has."""

    images: tuple[int, ...]
    longest: int


def divide(counts: Sequence[int], most: int) -> list[Bucket]:
    """Sort images by `counts`, their numbers of tokens, into `most` buckets or fewer, so that the
    padded lengths have the smallest sum: dynamic programming over the distinct lengths."""
    order = sorted(range(len(counts)), key=counts.__getitem__)
    lengths = torch.tensor(sorted(set(counts)))
    ends = torch.bincount(torch.tensor(counts))[lengths].cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    # cost[i, j]: padded tokens of one bucket with the lengths i to j; inf is no bucket
    cost = ((ends[None] - starts[:, None]) * lengths).double()
    cost.masked_fill_(torch.ones_like(cost).tril(-1) > 0, float("inf"))
    best, firsts = cost[0], [torch.zeros_like(lengths)]
    for _ in range(1, min(most, len(lengths))):
        before = torch.cat([best.new_full((1,), float("inf")), best[:-1]])
        best, first = (before[:, None] + cost).min(0)
        firsts.append(first)
    buckets, last = list[Bucket](), len(lengths) - 1
    for first in reversed(firsts):
        begin = int(first[last])
        images = tuple(order[int(starts[begin]) : int(ends[last])])
        buckets.append(Bucket(images, int(lengths[last])))
        last = begin - 1
    return buckets[::-1]


class Bucketed:
    """A jagged program: the cut graph, run segment by segment and bucket by bucket.

    `torch.compile` leaves it as it is, since its shapes depend on what the images hold. Where
    images cannot run apart (a graph that holds for one batch size alone, a host that mixes images)
    there is one bucket.
    """

    def __init__(self, rewrite: Rewrite) -> None:
        placeholders = rewrite.graph.find_nodes(op="placeholder")
        self.inputs = {node.name: str(node.target) for node in placeholders}
        self.segments, self.rows, self.split = cut(rewrite)
        self.leaves = {str(node.target) for node in rewrite.graph.find_nodes(op="call_module")}
        own = [name for s in self.segments for name in (s.chosen, s.numbers) if name]
        self.fills = dict.fromkeys(own, -1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, settings: Any, **tensors: Tensor) -> Any:
        given: Mapping[str, Any] = {**tensors, SETTINGS: settings}
        values = {name: given[target] for name, target in self.inputs.items()}
        hooked = any(has_hooks(model.get_submodule(path)) for path in self.leaves)
        most = 1 if hooked else settings.buckets  # hooks run once a call
        for segment in self.segments:
            buckets = self._buckets(segment, values, most)
            parts = [
                segment.run(
                    model, *(self._taken(n, segment, values, bucket) for n in segment.takes)
                )
                for bucket in buckets
            ]
            for position, name in enumerate(segment.gives):
                values[name] = self._merged(name, [part[position] for part in parts], buckets)
            for name in segment.done:
                del values[name]
        return parts[0]  # of the last segment, which is run for the whole batch

    def _buckets(
        self, segment: Segment, values: Mapping[str, Any], most: int
    ) -> Sequence[Bucket | None]:
        """None is the whole batch."""
        if segment.chosen is None or not self.split or most == 1:
            return [None]
        if not values[segment.chosen].shape[0]:
            return [None]
        counts = (values[segment.chosen] >= 0).sum(1).tolist()
        buckets = divide(counts, most)
        return [None] if len(buckets) == 1 else buckets

    def _taken(
        self, name: str, segment: Segment, values: Mapping[str, Any], bucket: Bucket | None
    ) -> Any:
        """What a bucket gets of a value."""
        value, per_image = values[name], self.rows[name]
        if bucket is None or segment.chosen is None:
            return value
        if per_image is None or not isinstance(value, Tensor):
            return value
        if per_image < 0:
            per_image = value.shape[0] // values[segment.chosen].shape[0]
        if name in (segment.chosen, segment.numbers):
            value = value[:, : bucket.longest]
        if name in segment.shapes:
            return value[: len(bucket.images) * per_image]
        return value.index_select(0, _rows(bucket.images, per_image, value.device))

    def _merged(self, name: str, parts: Sequence[Tensor], buckets: Sequence[Any]) -> Tensor:
        """Results of all buckets as one batch in its own order; short rows are filled up."""
        per_image = self.rows[name]
        if buckets[0] is None or per_image is None:
            return parts[0]
        images = [image for bucket in buckets for image in bucket.images]
        if per_image < 0:
            per_image, rest = divmod(parts[0].shape[0], len(buckets[0].images))
            if rest:
                raise UnsupportedHostError(
                    f"Value '{name}' of shape {tuple(parts[0].shape)} cannot be split into "
                    f"{len(buckets[0].images)} images. Use `selection: topk` for this host."
                )
        sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].ndim)]
        fill = self.fills.get(name, 0)
        together = torch.cat([filled(part, sizes, fill) for part in parts])
        back = sorted(range(len(images)), key=images.__getitem__)
        return together.index_select(0, _rows(back, per_image, together.device))


def _rows(images: Sequence[int], per_image: int, device: torch.device) -> Tensor:
    rows = torch.tensor(images, device=device)
    if per_image > 1:
        rows = (rows[:, None] * per_image + torch.arange(per_image, device=device)).flatten()
    return rows


def filled(part: Tensor, sizes: Sequence[int], fill: int = 0) -> Tensor:
    """`part` made as long as `sizes` say, along all dims but the first."""
    more = [max(size - has, 0) for size, has in zip(sizes, part.shape[1:], strict=True)]
    if not any(more):
        return part
    return F.pad(part, [n for extra in reversed(more) for n in (0, extra)], value=fill)
