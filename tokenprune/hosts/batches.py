"""Batches of a caller's own images, in the forms that loops and loaders give them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokenprune.errors import HostError
from tokenprune.hosts.inputs import CallSignature, first_floating

__all__ = ["Batch", "BatchSource", "Batches"]

BatchSource = Tensor | Iterable[Any]
"""Images [B, ...]; a data set of single images; or batches of them: a list, a DataLoader. A batch
is a tensor, a mapping of the host's arguments, or a tuple that begins with one of these and then
may hold labels."""

AT_ONCE = 64
"""Images that run at once of one large tensor."""
LABELS = ("labels", "label", "targets")
"""Keys of a mapping that hold labels, and are no arguments here."""


@dataclass(frozen=True)
class Batch:
    """One batch, on the host's device.

    Attributes:
        args: What the host's forward takes by position.
        kwargs: What it takes by name; one of the two is empty.
        labels: What the batch said they are, [B]; None if it held none.
        size: B.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    size: int

    def few(self) -> tuple[Any, ...] | dict[str, Any]:
        """Its first two images, as `wrap` takes `example_inputs`."""

        def cut(value: Any) -> Any:
            of_images = isinstance(value, Tensor) and value.shape[:1] == (self.size,)
            return value[:2] if of_images else value

        return {k: cut(v) for k, v in self.kwargs.items()} or tuple(map(cut, self.args))


class Batches:
    """Reads batches once, and gives them again and again: a loader may shuffle, or draw crops.

    for batch in Batches(host, loader):
        output = host(*batch.args, **batch.kwargs)
    """

    def __init__(self, host: nn.Module, source: BatchSource, labels: Any = None) -> None:
        """Look at the source.

        Args:
            host: Who is to take them.
            source: See `BatchSource`. Its batches stay in memory.
            labels: [N] for all images in order, or one for each batch; None takes what the batches
                hold.

        Raises:
            HostError: It holds no batch.
        """
        self.host, self.call = host, CallSignature.of(type(host))
        if isinstance(source, Tensor):
            source = torch.split(source, AT_ONCE)
        elif isinstance(source, Mapping):
            source = [source]
        elif isinstance(source, Dataset):  # of single images
            source = DataLoader(source, batch_size=AT_ONCE)
        self.source = list(source)
        self.labels = _as_tensor(labels)
        if not self.source:
            raise HostError(
                "No images were given: the batches are empty. Give a tensor of images, a list of "
                "batches or a DataLoader."
            )

    def __iter__(self) -> Iterator[Batch]:
        """The batches, moved to the host's device.

        Raises:
            HostError: A batch is of no known form, or there are more or fewer labels than images.
        """
        like, taken = first_floating(self.host), 0
        for given in self.source:
            batch = self._read(given, like)
            if self.labels is not None:
                own = self.labels[taken : taken + batch.size].to(like.device)
                batch = Batch(batch.args, batch.kwargs, own, batch.size)
            taken += batch.size
            if batch.labels is not None and batch.labels.shape != (batch.size,):
                raise HostError(
                    f"Labels must be one whole number an image: found {list(batch.labels.shape)} "
                    f"of them beside {batch.size} images. Pass a tensor [{batch.size}] of classes."
                )
            yield batch
        if self.labels is not None and len(self.labels) != taken:
            raise HostError(
                f"There are {len(self.labels)} labels for {taken} images. Give one an image, in "
                "the order of the batches."
            )

    def _read(self, given: Any, like: Tensor) -> Batch:
        labels, args, kwargs = None, tuple[Any, ...](), dict[str, Any]()
        if isinstance(given, tuple | list) and given:
            given, *rest = given
            whole = [x for x in rest if isinstance(x, Tensor) and not x.is_floating_point()]
            labels = next((x for x in whole if x.ndim == 1), None)
        if isinstance(given, Mapping):
            named = dict(given)
            found = [named.pop(key) for key in LABELS if key in named]
            labels = found[0] if found and labels is None else labels
            takes = [k for k in named if self.call.accepts_any or k in self.call.names]
            kwargs = {k: _moved(named[k], like) for k in takes}
        elif isinstance(given, Tensor):
            args = (_moved(given, like),)
        else:
            raise HostError(
                f"A batch is a tensor, a mapping of the host's arguments or a tuple that begins "
                f"with one, found {type(given).__name__}. Pass one of these, or a list of them."
            )
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not tensors:
            raise HostError(
                f"A batch holds none of the arguments that the host takes "
                f"({', '.join(self.call.names)}), found {sorted(map(str, given))}. Name its keys "
                "as the forward names its arguments."
            )
        labels = labels if labels is None else labels.to(like.device)
        return Batch(args, kwargs, labels, tensors[0].shape[0])


def _moved(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _as_tensor(labels: Any) -> Tensor | None:
    if labels is None or isinstance(labels, Tensor):
        return labels
    parts = [torch.as_tensor(part) for part in labels]
    return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)
