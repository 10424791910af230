"""Programs by the signature of the call that they were traced for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.errors import HostError
from tokenprune.runtime.program import Programs
from tokenprune.tracing.arguments import Arguments, plain_key

__all__ = ["ProgramCache", "Signature", "signature_of"]


class Signature(NamedTuple):
    """What a branch of the host's Python code may depend on: the batch size, and all else."""

    key: tuple[Any, ...]
    batch_size: int


def signature_of(arguments: Arguments, watched: list[nn.Module]) -> Signature:
    """The signature of a call, for a host whose Python code reads `training` of `watched` modules.

    Raises:
        HostError: There is no tensor among the arguments.
    """
    tensors = list(arguments.tensors.values())
    if not tensors:
        raise HostError("A wrapped model must be called with at least one tensor.")
    batch_size = tensors[0].shape[0] if tensors[0].ndim else 1
    device = tensors[0].device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    modes = tuple([module.training for module in watched])
    key: list[Any] = [
        arguments.places,
        modes,
        autocast,
        torch.get_autocast_dtype(device) if autocast else None,
    ]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            batched = bool(shape) and shape[0] == batch_size
            key.append((name, batched, shape[1:] if batched else shape, value.dtype, value.device))
        else:
            key.append((name, *plain_key(value)))
    return Signature(tuple(key), batch_size)


class ProgramCache:
    """Signature -> programs. Those that hold for one batch size only are kept under that too."""

    def __init__(self) -> None:
        self._known: dict[Any, Programs] = {}

    def find(self, signature: Signature) -> Programs | None:
        """The programs for calls of this signature, if there are any."""
        found = self._known.get(signature.key)
        analysis = found and found.analysis
        if analysis and analysis.batch_bound and analysis.traced.batch_size != signature.batch_size:
            return self._known.get(signature)
        return found

    def add(self, signature: Signature, programs: Programs) -> None:
        """Keep new programs."""
        self._known[signature if signature.key in self._known else signature.key] = programs

    def all(self) -> list[Programs]:
        """All programs; the first are those that `wrap` traced."""
        return list(self._known.values())

    def clear(self) -> None:
        """Forget them: the next call traces again."""
        self._known.clear()
