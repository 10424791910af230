"""What is traced in place of tensors that are no plain ones.

Under torch.func a host's inputs and parameters are wrappers; FSDP2 and tensor parallel make
DTensors of its parameters, torchao quantized ones. A trace needs the (global) shape, dtype and
device of a tensor, so a plain fake tensor serves. A graph finds the real ones by their path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from tokenprune.private import (
    FakeTensor,
    FakeTensorMode,
    is_functorch_wrapped_tensor,
    temporarily_clear_interpreter_stack,
)
from tokenprune.tracing.proxy import CLASS

__all__ = [
    "fake_near",
    "fake_of",
    "forget_weights",
    "is_away",
    "is_plain",
    "is_plain_subclass",
    "mark",
    "original",
    "stand_ins",
    "with_fakes",
]
STANDS_FOR = "stands for"  # no name that Python could write
WEIGHTS = "weights of the host"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is `torch.Tensor` or `nn.Parameter` itself, and nothing wraps it."""
    own = type(tensor) in (Tensor, nn.Parameter)
    return own and not is_functorch_wrapped_tensor(tensor)


def is_plain_subclass(cls: Any) -> bool:
    """Whether a class is made of `torch.Tensor` and computes as that does."""
    plain = cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    return issubclass(cls, Tensor) and plain and cls not in (Tensor, nn.Parameter)


def is_away(held: Any) -> bool:
    """Whether a weight is not where it will be when its module runs: hooks of accelerate's bring it
    from elsewhere, hooks of FSDP from all processes."""
    return isinstance(held, Tensor) and (held.is_meta or hasattr(held, "full_tensor"))


def fake_of(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of `mode` for a tensor of any kind."""
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
        return tensor
    if is_plain(tensor):
        if tensor.grad_fn is not None:  # torch warns where it reads the gradient of no leaf
            tensor = tensor.detach().requires_grad_()
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)


def with_fakes(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A module of the same attributes, whose weights are fake: torch keeps the results of an
    operator only where all its inputs are."""
    alike = object.__new__(type(module))
    vars(alike).update(vars(module) | {STANDS_FOR: module})
    for kind in ("_parameters", "_buffers"):
        held: dict[str, Any] = vars(module)[kind]
        plain = {name: t for name, t in held.items() if isinstance(t, Tensor) and is_plain(t)}
        fakes = {name: fake_of(mode, t) for name, t in plain.items()}
        # the converter remembers them as long as somebody holds them
        vars(mode).setdefault(WEIGHTS, []).extend(fakes.values())
        vars(alike)[kind] = held | fakes
    return alike


def original(module: Any) -> Any:
    """The module that one of `with_fakes` stands for; any other thing itself."""
    if not isinstance(module, nn.Module):
        return module
    return object.__getattribute__(module, "__dict__").get(STANDS_FOR, module)  # no read of a host


def fake_near(mode: FakeTensorMode, tensor: Tensor, example: Tensor) -> Tensor:
    """`fake_of`; of a weight that is kept elsewhere, what it is where its module runs, beside
    `example`."""
    if is_away(tensor) and not example.is_meta:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=example.device)
    return fake_of(mode, tensor)


@contextmanager
def stand_ins(root: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Put fake tensors of `mode` in place of what is no plain tensor in `root`, and leave the
    transforms of torch.func that are running; all is put back afterwards."""
    with temporarily_clear_interpreter_stack():
        held: list[tuple[dict[str, Any], str, Tensor]] = [
            (tensors, name, tensor)
            for module in root.modules()
            for tensors in (module._parameters, module._buffers, vars(module))
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor) and not is_plain(tensor)
        ]
        made: dict[int, Any] = {}  # what is tied stays tied
        try:
            for tensors, name, tensor in held:
                if is_lazy(tensor):
                    continue  # it has no shape yet: the host itself cannot run
                if id(tensor) not in made:
                    fake = fake_of(mode, tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, False) if is_parameter else fake
                    if is_plain_subclass(type(tensor)):
                        vars(made[id(tensor)]).update(vars(tensor) | {CLASS: type(tensor)})
                tensors[name] = made[id(tensor)]
            yield
        finally:
            for tensors, name, tensor in held:
                tensors[name] = tensor


def forget_weights(mode: FakeTensorMode) -> None:
    """Let go of the weak references to the host's weights, with which torch cannot swap them."""
    vars(mode).pop(WEIGHTS, None)
    converter = mode.fake_tensor_converter.meta_converter
    converter.tensor_memo.clear()
    converter.describer.lookup_tensor.clear()


def mark(node: fx.Node, tensor: Tensor) -> None:
    """Give the fake tensor of a node an owner's marks on the real one, and the node its class."""
    stand_in, marks = node.meta["val"], vars(tensor)
    vars(stand_in).update({name: marks[name] for name in marks.keys() - vars(stand_in).keys()})
    cls = marks.get(CLASS, type(tensor))
    if is_plain_subclass(cls):
        node.meta[CLASS] = cls
