"""Module calls and attribute reads of a host, told to a tracer while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

from tokenprune.tracing.decompose import decomposed
from tokenprune.tracing.functions import functions_recorded
from tokenprune.tracing.hooks import forward_of, unhooked
from tokenprune.tracing.modes import State
from tokenprune.tracing.names import Reached
from tokenprune.tracing.reads import Reads

__all__ = ["calls_recorded"]

MODULE_CALL = nn.Module.__call__
MODULE_GETATTR = nn.Module.__getattr__
MODULE_INIT = nn.Module.__init__


class Recorder(Protocol):
    """A tracer: in `elsewhere` another thread runs, if `executing` it is not the host that runs."""

    caller: State
    reads: Reads
    made: list[nn.Module]

    @property
    def elsewhere(self) -> bool: ...

    @property
    def executing(self) -> bool: ...

    def attribute_proxy(self, tensor: torch.Tensor) -> Any: ...

    def runs_itself(self, module: nn.Module) -> bool: ...

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any: ...


@contextmanager
def calls_recorded(tracer: Recorder, known: Reached) -> Iterator[None]:
    """Hand calls of modules to `tracer.call_module`, and tensors that the host's code reads from
    its modules to `tracer.attribute_proxy`; what it reads is in `tracer.reads`. What its code may
    name is `known`."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.elsewhere:
            return MODULE_CALL(module, *args, **kwargs)
        if tracer.executing:
            return unhooked(module, args, kwargs)
        opened = decomposed(module)
        if opened is not None:
            tracer.reads.inherits(module, "forward")
        forward = forward_of(module) if opened is None else partial(opened, module)
        return tracer.call_module(module, forward, args, kwargs)

    def getattribute(module: nn.Module, name: str) -> Any:
        try:
            value = MODULE_GETATTR(module, name)
        except AttributeError:
            if not tracer.elsewhere:
                tracer.reads.lacked(module, name)
            raise
        if not tracer.elsewhere:
            tracer.reads.registered(module, name, value)
        return handed(value)

    def made(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not tracer.executing:
            tracer.made.append(module)
        MODULE_INIT(module, *args, **kwargs)

    def handed(value: Any) -> Any:
        recorded = isinstance(value, torch.Tensor) and not tracer.executing
        return tracer.attribute_proxy(value) if recorded else value

    calls = mock.patch.object(nn.Module, "__call__", call)
    attributes = mock.patch.object(nn.Module, "__getattr__", getattribute)
    makes = mock.patch.object(nn.Module, "__init__", made)
    reads = tracer.reads.recorded(known, lambda: tracer.elsewhere, tracer.runs_itself, handed)
    caller = torch.set_grad_enabled(tracer.caller.grad)  # a host may set it and leave it so
    # what watches reads comes last: the patches before it read much
    with caller, functions_recorded(tracer), calls, attributes, makes, reads:  # type: ignore[arg-type]
        yield
