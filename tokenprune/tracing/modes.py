"""The modes of torch that a host's forward runs in, and those that it asks for.

A trace runs in the modes of its caller, and at each node torch itself says which are on: a `with`
block, a decorator and a plain call are seen in the same way. What differs from the caller's modes
is a part of the program (`node.meta[MODES]`). What Python read or changed is noted, since a trace
then holds only for calls in the same modes (`HostGraph.ambient`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenprune.private import attention_order
from tokenprune.tracing.names import Reached, value_of

__all__ = [
    "LAYOUT",
    "MARKS",
    "MODES",
    "NAMES_IN_SOURCE",
    "REQUIRES_GRAD",
    "Mode",
    "State",
    "ambient_holds",
    "autocast_dtypes",
    "entered",
    "modes_between",
    "modes_hold",
    "modes_named_by",
    "of_call",
    "reads_noted",
    "state",
    "where_predictors_learn",
]

MODES = "modes"
"""Key in a node's `meta`: the modes that the host changed there, outermost first."""
REQUIRES_GRAD = "requires_grad"
LAYOUT = "layout"
MARKS = "marks"
NAMES_IN_SOURCE = {"torch": torch, "sdpa_kernel": sdpa_kernel, "SDPBackend": SDPBackend}
"""What `Mode.source` speaks of."""

_accelerator = torch.accelerator.current_accelerator()
DEVICES = ("cpu",) if _accelerator is None else ("cpu", _accelerator.type)
_backends = {
    "_get_flash_sdp_enabled": "FLASH_ATTENTION",
    "_get_mem_efficient_sdp_enabled": "EFFICIENT_ATTENTION",
    "_get_math_sdp_enabled": "MATH",
    "_get_cudnn_sdp_enabled": "CUDNN_ATTENTION",
    "_get_overrideable_sdp_enabled": "OVERRIDEABLE",
}
_backends = {getter: name for getter, name in _backends.items() if hasattr(torch._C, getter)}
# Bound here, since the names in torch are patched during a trace.
_is_enabled = {getattr(SDPBackend, n): getattr(torch._C, g) for g, n in _backends.items()}
_by_number = {backend.value: backend for backend in _is_enabled}
_autocasts, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


def _autocast() -> tuple[torch.dtype | None, ...]:
    return tuple([_autocast_dtype(d) if _autocasts(d) else None for d in DEVICES])


def _attention() -> tuple[SDPBackend, ...]:
    # torch 2.8 names some twice
    known = dict.fromkeys(
        _by_number[number] for number in attention_order() if number in _by_number
    )
    return tuple([backend for backend in known if _is_enabled[backend]()])


NOW: Mapping[str, Callable[[], Any]] = {
    "inference": torch.is_inference_mode_enabled,
    "grad": torch.is_grad_enabled,
    "autocast": _autocast,
    "attention": _attention,
}
"""What a call's mode is, by name."""

READERS: Mapping[str, tuple[tuple[Any, str], ...]] = {
    "inference": ((torch, "is_inference_mode_enabled"), (torch._C, "_InferenceMode")),
    "grad": ((torch, "is_grad_enabled"),),
    "autocast": tuple(
        (torch, name)
        for name in dir(torch)
        if "autocast" in name and name.startswith(("is_", "get_")) and "cache" not in name
    ),
    "attention": (
        *((torch._C, getter) for getter in _backends),
        (torch._C, "_get_sdp_priority_order"),
    ),
}
"""The functions that tell a mode, by its name; torch's context managers call them as they enter."""


_TELLS = {id(getattr(owner, name)): mode for mode, of in READERS.items() for owner, name in of}


class State(NamedTuple):
    """All modes at one moment.

    Attributes:
        inference: Whether tensors are made without what gradients need.
        grad: Whether gradients are recorded.
        autocast: The dtype that each of `DEVICES` casts to; None where it does not.
        attention: The fused attentions that may be chosen, the preferred ones first.
    """

    inference: bool
    grad: bool
    autocast: tuple[torch.dtype | None, ...]
    attention: tuple[SDPBackend, ...]


class Mode(NamedTuple):
    """One mode that a host sets: its name as in `State`, and what it is set to (for autocast the
    device and its dtype)."""

    name: str
    value: Any

    def context(self) -> AbstractContextManager[Any]:
        """Sets it."""
        if self.name == "inference":
            return torch.inference_mode(self.value)
        if self.name == "grad":
            return torch.set_grad_enabled(self.value)
        if self.name == "attention":
            return sdpa_kernel(list(self.value), set_priority=True)
        device, dtype = self.value
        # no cache: weights that were cast under fake tensors must not stay there
        return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)

    @property
    def source(self) -> str:
        """The same as Python code."""
        if self.name == "inference":
            return f"torch.inference_mode({self.value})"
        if self.name == "grad":
            return "torch.enable_grad()" if self.value else "torch.no_grad()"
        if self.name == "attention":
            backends = ", ".join(f"SDPBackend.{backend.name}" for backend in self.value)
            return f"sdpa_kernel([{backends}], set_priority=True)"
        device, dtype = self.value
        return f"torch.autocast({device!r}, {f'dtype={dtype}' if dtype else 'enabled=False'})"


Modes = tuple[Mode, ...]


def state() -> State:
    """The modes that this thread is in."""
    return State(**{name: now() for name, now in NOW.items()})


def modes_between(outer: State, inner: State) -> Modes:
    """What has to be set in `outer` to be in `inner`."""
    if inner == outer:
        return ()
    modes, grad = list[Mode](), outer.grad
    if inner.inference != outer.inference:
        modes.append(Mode("inference", inner.inference))
        grad = not inner.inference  # inference mode sets both
    if inner.grad != grad:
        modes.append(Mode("grad", inner.grad))
    for device, was, dtype in zip(DEVICES, outer.autocast, inner.autocast, strict=True):
        if dtype is not was:
            modes.append(Mode("autocast", (device, dtype)))
    if inner.attention != outer.attention:
        modes.append(Mode("attention", inner.attention))
    return tuple(modes)


def autocast_dtypes(graph: fx.Graph) -> set[torch.dtype]:
    """What autocast casts to where a graph runs: of the caller, and of its nodes."""
    modes = {mode for node in graph.nodes for mode in node.meta.get(MODES, ())}
    inner = [mode.value[1] for mode in modes if mode.name == "autocast"]
    return {dtype for dtype in (*_autocast(), *inner) if dtype is not None}


def where_predictors_learn(modes: Modes) -> Modes:
    """`modes` for what is put in at a stage: a predictor learns in a frozen part of a host too."""
    return tuple(mode for mode in modes if mode != Mode("grad", False))


@contextmanager
def entered(modes: Modes) -> Iterator[None]:
    """Run in modes of a node."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode.context())
        yield


class Recorder(Protocol):
    """A tracer; if `executing`, it is not the host that asks."""

    @property
    def executing(self) -> bool: ...

    def note_ambient(self, name: str) -> None: ...


@contextmanager
def reads_noted(tracer: Recorder) -> Iterator[None]:
    """Tell `tracer` the names of the modes that the host asks for."""
    with ExitStack() as stack:
        for name, places in READERS.items():
            for owner, attribute in places:
                noted = _noted(tracer, name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, noted))
        yield


def modes_named_by(reached: Reached) -> set[str]:
    """The modes that functions may ask for by a name of their own (`from torch import
    is_grad_enabled`), which `reads_noted` does not see."""
    values = [value_of(place, name) for place, name in reached.names if place is not vars(torch)]
    return {_TELLS[id(value)] for value in values if id(value) in _TELLS}


def _noted(tracer: Recorder, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any, **kwargs: Any) -> Any:
        if not tracer.executing:
            tracer.note_ambient(name)
        return original(*args, **kwargs)

    return read


def of_call(name: str, host: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """What Python may ask about the tensors of a call and of the modules: which require gradients
    (`REQUIRES_GRAD`), how they lie in memory (`LAYOUT`), what an owner has set on inputs (`MARKS`).
    """
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    if name == MARKS:
        return tuple([_marks(tensor) for tensor in inputs])
    plain = [v for m in host.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    if name == REQUIRES_GRAD:
        weights = [weight.requires_grad for weight in host.parameters()]
        others = (*inputs, *host.buffers(), *plain)
        return *weights, *[(tensor.requires_grad, tensor.is_leaf) for tensor in others]
    tensors = (*inputs, *host.parameters(), *host.buffers(), *plain)
    return tuple([_layout(tensor) for tensor in tensors if tensor.layout is torch.strided])


def _marks(tensor: torch.Tensor) -> dict[str, Any]:
    held = vars(tensor)
    return {n: id(v) if isinstance(v, torch.Tensor) else v for n, v in held.items()}


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    shared = tensor.is_shared()  # type: ignore[no-untyped-call]
    where = (tensor.storage_offset(), shared, tensor._is_view())
    return tensor.stride(), tensor.is_inference(), *where


def ambient_holds(
    ambient: Mapping[str, Any], host: nn.Module, arguments: Mapping[str, Any]
) -> bool:
    """Whether a call is as a trace depends on (`HostGraph.ambient`)."""
    asked = ((n, value) for n, value in ambient.items() if n not in State._fields)
    return modes_hold(ambient) and all(
        of_call(name, host, arguments) == value for name, value in asked
    )


def modes_hold(ambient: Mapping[str, Any]) -> bool:
    """Whether this thread is in the modes that a trace depends on."""
    return all(NOW[name]() == value for name, value in ambient.items() if name in State._fields)
