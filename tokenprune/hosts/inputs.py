"""Example inputs: drawn from an adapter's facts, or given by the caller in one of several forms."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import HostError, UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec

__all__ = ["CallSignature", "ExampleInputs", "draw_inputs", "named_inputs"]

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Any]


def draw_inputs(spec: ArchSpec, host: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Random inputs of the shapes in `spec.inputs`, on the host's device and in its dtype.

    Draws from a generator of its own: the caller's random state stays as it is.
    """
    if not spec.inputs:
        raise UnsupportedHostError(
            f"Adapter {spec.adapter!r} knows no input shape of {type(host).__name__}. Pass "
            "example_inputs=, a tensor or a dict of the arguments its forward takes."
        )
    like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, example in spec.inputs.items():
        shape = (batch_size, *example.shape)
        if example.ones:
            value = torch.ones(shape, dtype=torch.long)
        elif example.high is not None:
            value = torch.randint(0, example.high, shape, generator=generator, device="cpu")
        else:
            value = torch.randn(shape, generator=generator, device="cpu").to(like.dtype)
        drawn[name] = value.to(like.device)
    return drawn


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a host's forward, in order, and whether it takes **kwargs."""

    host: str
    names: tuple[str, ...]
    accepts_any: bool

    @classmethod
    def of(cls, host: type[nn.Module]) -> "CallSignature":
        """The signature of a class's forward."""
        accepted = inspect.signature(host.forward).parameters.values()
        named = [p.name for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in accepted)
        return cls(host.__name__, tuple(named)[1:], accepts_any)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without those that are None."""
        names = self.names
        known = kwargs.keys() <= set(names) or self.accepts_any
        if (
            len(args) > len(names)
            or not known
            or any(name in kwargs for name in names[: len(args)])
        ):
            given = [*names[: len(args)], *(["..."] if len(args) > len(names) else []), *kwargs]
            raise HostError(
                f"The host's forward takes ({', '.join(names)}), but was called with "
                f"({', '.join(given)})."
            )
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        return {name: value for name, value in named.items() if value is not None}


def named_inputs(
    call: CallSignature, spec: ArchSpec, host: nn.Module, given: ExampleInputs | None
) -> dict[str, Any]:
    """The arguments of a call of a host, by name; a batch of two is drawn if none are given."""
    if given is None:
        return draw_inputs(spec, host, batch_size=2)
    if isinstance(given, Mapping):
        arguments = dict(given)
    else:
        several = (given,) if isinstance(given, Tensor) else tuple(given)
        arguments = dict(zip(call.names, several, strict=False))
    if not any(isinstance(value, Tensor) for value in arguments.values()):
        raise HostError(
            f"example_inputs must hold at least one tensor, found {sorted(arguments) or 'nothing'}."
        )
    return call.named((), arguments)
