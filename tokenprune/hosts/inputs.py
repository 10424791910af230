"""Example inputs: drawn from an adapter's facts, or given by the caller in one of several forms."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import HostError, UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.arguments import Arguments, flatten

__all__ = [
    "CallSignature",
    "ExampleInputs",
    "draw_inputs",
    "first_floating",
    "named_inputs",
    "parameters_of",
    "zeros_of",
]

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Any]


def first_floating(module: nn.Module) -> Tensor:
    """The parameter that says where a model is and of what type; an empty tensor if none does."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))


def draw_inputs(spec: ArchSpec, host: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Random inputs of the shapes in `spec.inputs`, on the host's device and in its dtype.

    Draws from a generator of its own: the caller's random state stays as it is.
    """
    if not spec.inputs:
        raise UnsupportedHostError(
            f"Adapter {spec.adapter!r} knows no input shape of {type(host).__name__}. Pass "
            "example_inputs=, a tensor or a dict of the arguments its forward takes."
        )
    like = first_floating(host)
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


def parameters_of(
    function: Any, host: type[nn.Module], name: str = "forward"
) -> list[inspect.Parameter]:
    """The parameters of a method of a host.

    Raises:
        UnsupportedHostError: Python cannot tell: its `__wrapped__` is no function, say.
    """
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise UnsupportedHostError(
            f"Which arguments {host.__name__}.{name} takes cannot be told: {error}. Define it by "
            "`def` with its arguments, and let no decorator hide them."
        ) from error


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a host's forward.

    Attributes:
        host: Class of the host.
        names: Of those that a caller can give by position, in order, then keyword-only ones.
        num_positional: How many of `names` can be given by position.
        num_unnamed: How many of them cannot be given by name.
        optional: Those of `names` whose default is None.
        rest: Name of `*args`; None if there is none.
        accepts_any: Whether it takes `**kwargs`.
    """

    host: str
    names: tuple[str, ...]
    num_positional: int
    num_unnamed: int
    optional: frozenset[str]
    rest: str | None
    accepts_any: bool

    @staticmethod
    def now(host: Any, method: str = "forward") -> "CallSignature":
        """`of`, computed once for each function that a class has there."""
        return _signature(host, method, getattr(host, method))

    @classmethod
    def of(cls, host: type[nn.Module], method: str = "forward") -> "CallSignature":
        """The signature of a method of a class."""
        accepted = parameters_of(getattr(host, method), host, method)
        own = [p for p in accepted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = own[1:] + [p for p in accepted if p.kind is p.KEYWORD_ONLY]
        rest = next((p.name for p in accepted if p.kind is p.VAR_POSITIONAL), None)
        return cls(
            host=host.__name__,
            names=tuple(p.name for p in named),
            num_positional=max(len(own) - 1, 0),
            num_unnamed=sum(p.kind is p.POSITIONAL_ONLY for p in own[1:]),
            optional=frozenset(p.name for p in named if p.default is None),
            rest=rest,
            accepts_any=any(p.kind is p.VAR_KEYWORD for p in accepted),
        )

    def bind(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        handed: Collection[int | str] = (),
    ) -> Arguments:
        """The arguments of a call, however they were given, without those that are None anyway;
        containers of `handed` stay as they are.

        Raises:
            HostError: The host takes no such call.
        """
        names, many = self.names, len(args) > self.num_positional
        # no set operations on dict keys: torch 2.11 cannot compile them
        known = self.accepts_any or all(name in names[self.num_unnamed :] for name in kwargs)
        twice = any(name in kwargs for name in names[: min(len(args), self.num_positional)])
        if (many and self.rest is None) or not known or twice:
            given = [*names[: len(args)], *(["..."] if len(args) > len(names) else []), *kwargs]
            raise HostError(
                f"The host's forward takes ({', '.join(names)}), but was called with "
                f"({', '.join(given)}). Call it with the arguments that it takes."
            )
        # no `zip(strict=...)` either: torch 2.8 cannot compile it
        given_here = names[: min(len(args), self.num_positional)]
        named = {name: args[at] for at, name in enumerate(given_here)} | dict(kwargs)
        bound: dict[int | str, tuple[str, Any]] = {}
        for place, name in enumerate(names):
            by_place = place < self.num_unnamed or (many and place < self.num_positional)
            omitted = not by_place and name in self.optional and named.get(name) is None
            if name not in named or omitted:
                continue
            bound[place if by_place else name] = name, named[name]
        for place in range(self.num_positional, len(args)):
            bound[place] = f"{self.rest}_{place - self.num_positional}", args[place]
        for name, value in kwargs.items():
            if name not in names:
                bound[name] = name, value
        return flatten(self.host, bound, handed)


@lru_cache(maxsize=64)
def _signature(host: Any, method: str, _function: Any) -> CallSignature:
    return CallSignature.of(host, method)


def named_inputs(
    call: CallSignature,
    spec: ArchSpec,
    host: nn.Module,
    given: ExampleInputs | None,
    wrapped: Callable[[], Arguments] | None = None,
) -> Arguments:
    """The arguments of a call of a host.

    If none are given they are drawn: a batch of two of the shapes that the adapter knows, or else
    inputs like those that the host was wrapped with.
    """
    like = wrapped() if given is None and wrapped is not None and not spec.inputs else None
    if like is not None and all(x.is_floating_point() for x in like.tensors.values()):
        arguments = _drawn_like(like)
    elif given is None:
        drawn = draw_inputs(spec, host, batch_size=2)
        unnamed = [drawn.pop(call.rest)] if call.rest in drawn else []  # of `forward(*args)`
        arguments = call.bind(unnamed, drawn)
    elif isinstance(given, Arguments):
        arguments = given
    elif isinstance(given, Mapping):
        arguments = call.bind((), given)
    else:
        arguments = call.bind((given,) if isinstance(given, Tensor) else tuple(given), {})
    if not arguments.tensors:
        raise HostError(
            "example_inputs must hold at least one tensor, found "
            f"{sorted(arguments) or 'nothing'}. Pass a batch of images, or a dict of arguments."
        )
    empty = [name for name, tensor in arguments.tensors.items() if tensor.shape[:1] == (0,)]
    if empty:
        raise HostError(
            f"example_inputs hold an empty batch ({', '.join(empty)}). Give at least one image; "
            "the wrapped model takes empty batches too."
        )
    return arguments


def zeros_of(example: Arguments, shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> Arguments:
    """Zeros like an example, of the dtype and device of `like`; `shapes` holds those of one image
    that are others now."""
    made = dict[str, Tensor]()
    for name, value in example.tensors.items():
        shape = (value.shape[0], *shapes[name]) if name in shapes else value.shape
        dtype = like.dtype if value.is_floating_point() else value.dtype
        made[name] = torch.zeros(shape, dtype=dtype, device=like.device)
    return example.with_tensors(made)


def _drawn_like(example: Arguments) -> Arguments:
    """Random inputs like an example of real numbers; of others it does not tell the range."""
    generator = torch.Generator().manual_seed(0)
    return example.with_tensors(
        {
            name: torch.randn(value.shape, generator=generator, device="cpu").to(value)
            for name, value in example.tensors.items()
        }
    )
