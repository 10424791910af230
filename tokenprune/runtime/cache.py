"""The programs of a model, each with the call it serves and what its trace depends on."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.errors import HostError
from tokenprune.runtime.program import Programs
from tokenprune.tracing.arguments import Arguments, plain_key
from tokenprune.tracing.modes import ambient_holds
from tokenprune.tracing.stand_ins import is_plain_subclass

__all__ = ["CacheInfo", "ProgramCache", "Signature", "signature_of"]

LIMIT = 16
RESTLESS = 4


class Signature(NamedTuple):
    """What a branch of the host's Python code may depend on: the batch size, and all else."""

    key: tuple[Any, ...]
    batch_size: int


def signature_of(arguments: Arguments, entry: str, training: bool) -> Signature:
    """The signature of a call of the method `entry`.

    Raises:
        HostError: There is no tensor among the arguments.
    """
    tensors = list(arguments.tensors.values())
    if not tensors:
        raise HostError("A wrapped model was called without a tensor. Pass it a batch of images.")
    batch_size = tensors[0].shape[0] if tensors[0].ndim else 1
    device = tensors[0].device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    cast = torch.get_autocast_dtype(device) if autocast else None
    key: list[Any] = [entry, arguments.places, training, autocast, cast]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            batched = len(shape) > 0 and shape[0] == batch_size
            shape = shape[1:] if batched else shape
            key.append((name, _kind(value), batched, shape, value.dtype, value.device))
        else:
            key.append((name, *plain_key(value)))
    if len(tensors) > 1:  # which of them are one: Python may ask `mask is x`
        key.append(tuple([next(i for i, o in enumerate(tensors) if o is t) for t in tensors]))
    return Signature(tuple(key), batch_size)


def _kind(tensor: Tensor) -> type:
    """The class of a tensor, as far as a host's code may ask for it: exporters have their own."""
    kind = type(tensor)
    return kind if kind is not Tensor and is_plain_subclass(kind) else Tensor


class CacheInfo(NamedTuple):
    """The programs of a wrapped model.

    Attributes:
        programs: How many there are now.
        limit: How many there may be; the one not used for longest leaves.
        traced: How many were made since `wrap`.
        frozen: Whether they run unchecked.
    """

    programs: int
    limit: int
    traced: int
    frozen: bool


class Numbered:
    """Programs as attributes: Dynamo compares those that it has read alone."""


class ProgramCache:
    """Programs by signature, then by what their traces depend on; the last used come first.

    Attributes:
        limit: How many are kept.
        frozen: Take the first of a signature, whatever has changed since its trace.
        traced: How many were added.
        proven_next: The next ones are proven by `wrap` or `verify`.
    """

    def __init__(self, limit: int = LIMIT, proven_next: bool = True) -> None:
        self.limit, self.frozen, self.traced, self.proven_next = limit, False, 0, proven_next
        self._known: list[tuple[Signature, Programs]] = []
        self._restless = 0
        self._numbered = Numbered()

    def __iter__(self) -> Iterator[Programs]:
        return iter([programs for _, programs in self._known])

    def info(self) -> CacheInfo:
        """Its size."""
        return CacheInfo(len(self._known), self.limit, self.traced, self.frozen)

    def find(
        self, signature: Signature, host: nn.Module, arguments: Mapping[str, Any]
    ) -> Programs | None:
        """The programs for calls of this signature, if there are any for the host as it is."""
        for place, (known, programs) in enumerate(self._known):
            if known.key != signature.key:
                continue
            if programs.analysis.batch_bound and known.batch_size != signature.batch_size:
                continue
            if not ambient_holds(programs.analysis.traced.ambient, host, arguments):
                continue
            if self.holds(programs):
                if place:
                    self._known.insert(0, self._known.pop(place))
                return programs
        return None

    def numbered(self, number: int, signature: Signature) -> Programs:
        """The programs of a number, for compiled code: the order of all changes with each call.
        Dynamo watches what is compared here."""
        known, programs = getattr(self._numbered, f"of_{number}")
        bound = programs.analysis.batch_bound and known.batch_size != signature.batch_size
        if bound or known.key != signature.key:
            raise HostError(
                f"A compiled {programs.analysis.traced.host} was called with inputs of another "
                "form (shapes, dtypes, flags, or the number of images) than it was compiled for. "
                "Call torch.compiler.reset() and compile it again."
            )
        return programs  # type: ignore[no-any-return]

    def holds(self, programs: Programs) -> bool:
        """Whether what a trace has read is as it was, or nobody is to look; hooks that anybody has
        registered since are looked at even then."""
        now = RemovableHandle.next_id
        if self.frozen and programs.hooks_seen == now:
            return True
        held = programs.guards.hold()
        programs.hooks_seen = now if held else None
        return held

    def add(self, signature: Signature, programs: Programs) -> None:
        """Keep new programs.

        Raises:
            HostError: The host's own forward changes what it reads, in every call.
        """
        self._check_rest(signature)
        self._known.insert(0, (signature, programs))
        for _, old in self._known[self.limit :]:
            delattr(self._numbered, f"of_{old.number}")
        del self._known[self.limit :]
        self.traced, self.proven_next = self.traced + 1, False
        programs.number = self.traced
        setattr(self._numbered, f"of_{self.traced}", (signature, programs))

    def clear(self) -> None:
        """Forget them: the next call traces again."""
        self._known.clear()
        vars(self._numbered).clear()

    def _check_rest(self, signature: Signature) -> None:
        """Count traces that the host itself makes necessary."""
        before = next((p for known, p in self._known if known.key == signature.key), None)
        if before is None or before.changes is None:
            self._restless = 0
            return
        changed = before.changes
        self._restless += 1
        if self._restless > RESTLESS:
            raise HostError(
                f"The forward of {before.analysis.traced.host} changes {changed.name!r} of its "
                f"{type(changed.owner).__name__} in every call and reads it again, so each call "
                "would be traced anew. Keep it in a buffer, or let nothing depend on it."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProgramCache":
        return type(self)(self.limit, False)  # the copy's modules are others

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, False)
