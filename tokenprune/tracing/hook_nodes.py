"""What stands in a graph around the stretch of a module that has hooks.

    record = Before(module, *leaves of its arguments)      # pre-hooks
    x = passed(x, record, 0)                               # what the module's own code reads
    ...
    returned = After(record, *leaves of its output)        # forward hooks
    y = passed(y, returned, 0)

At run time `Before` and `After` do what torch's `Module.__call__` does, with the hooks that the
module has then. To all analysis they are identities: they are not run on fake tensors
(`interpret.evaluate`), and where there is no record, `passed` hands on what it was given.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import BackwardHook

from tokenprune.errors import HostError
from tokenprune.notices import warn_once
from tokenprune.tracing.structure import Structure

__all__ = [
    "After",
    "Before",
    "Call",
    "Hook",
    "Told",
    "closing",
    "hooks_told",
    "is_hook_node",
    "name_of",
    "passed",
]

Hook = Callable[..., Any]
LOOKS = 2
"""In how many calls of a new hook values are compared: writes through `.data` are not counted."""


class Told(Protocol):
    """Who is told what hooks do in a call."""

    def before(self, module: nn.Module) -> None:
        """Pre-hooks of a module have run."""

    def is_new(self, number: int) -> bool:
        """Whether no proof has seen a hook of this number."""

    def changed(self, path: str, hook: Hook) -> None:
        """A new hook of the module at a path has changed values."""


class _OpenCalls(threading.local):
    """Records of hooked modules that are running in this thread, outermost first; and who is told
    of their hooks."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.told: list[Told] = []


OPEN = _OpenCalls()


@dataclass(eq=False)
class Record:
    """One call of a hooked module at run time, from `Before` to `After`."""

    call: "Call"
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    backward: Any = None
    leaves: Sequence[Any] = ()
    result: Any = None
    ran: set[int] = field(default_factory=set)

    def __getitem__(self, place: int) -> Any:
        return self.leaves[place]


def passed(original: Tensor, record: Any, place: int) -> Tensor:
    """A tensor that goes in or out of a hooked module, as its hooks leave it."""
    return original if record is None else record[place]


@dataclass(frozen=True, eq=False)
class Call:
    """What a trace knows of one call of a hooked module.

    Attributes:
        path: Of the module.
        host: Numbers of the hooks that are the host's own code, which were traced.
    """

    path: str
    host: frozenset[int]


@dataclass(frozen=True, eq=False)
class _Node:
    """The target of a node.

    Attributes:
        structure: Of the arguments (args, kwargs), or of the output.
        leaves: What they are where they are no nodes; None where a node's value is taken.
        given: Which leaves are values of nodes.
        same: Leaf -> an earlier one that was the same tensor when it was traced.
        looks: Number of a hook -> in how many calls what it leaves was compared by value.
    """

    call: Call
    structure: Structure
    leaves: tuple[Any, ...]
    given: tuple[int, ...]
    same: Mapping[int, int]
    looks: dict[int, int] = field(default_factory=dict)

    def build(self, values: Sequence[Any]) -> tuple[Any, list[Any]]:
        """What the nodes' values stand in, and its leaves."""
        leaves = list(self.leaves)
        for place, value in zip(self.given, values, strict=True):
            leaves[place] = value
        return self.structure.build(leaves), leaves

    def checked(self, value: Any, before: Sequence[Any], hook: Hook) -> list[Any]:
        """The leaves of what a hook has left.

        Raises:
            HostError: They are not of the form that the host's code was traced for.
        """
        found = self.structure.leaves_of(value)
        if found is None:
            self._refuse(hook, "returned another structure", _shapes(before), _shapes(value))
        for one, other in zip(before, found, strict=True):
            if isinstance(one, Tensor):
                fits = isinstance(other, Tensor) and _form(one) == _form(other)
            else:
                fits = one is other or (type(one) is type(other) and bool(one == other))
            if not fits:
                self._refuse(hook, "changed a shape, a type or a flag", _said(one), _said(other))
        return found

    def check_same(self, leaves: Sequence[Any], hook: Hook) -> None:
        """What was one tensor for the host's code must be one."""
        for place, first in self.same.items():
            if leaves[place] is not leaves[first]:
                self._refuse(hook, "made two tensors of one", _said(leaves[first]), "two")

    def telling(self, leaves: Sequence[Any], number: int, hook: Hook) -> Callable[[Any], None]:
        """What tells of a hook that returns other tensors than these, or writes into them; to be
        called with what it leaves."""
        told = OPEN.told[-1] if OPEN.told else None
        if told is None or not told.is_new(number):
            return lambda _: None
        was, looks = _state(leaves), self.looks.get(number, 0)
        self.looks[number] = looks + 1
        values = [x.detach().clone() for x in _tensors(leaves)] if looks < LOOKS else []

        def tell(left: Sequence[Any]) -> None:
            if _state(left) != was or not all(map(_alike, values, _tensors(left))):
                told.changed(self.call.path, hook)

        return tell

    def _refuse(self, hook: Hook, what: str, before: Any, after: Any) -> NoReturn:
        raise HostError(
            f"A hook of module '{self.call.path}' ({name_of(hook)}) {what}: {before} became "
            f"{after}. A pruned model runs what was traced with the shapes, types and flags that "
            "the host gives; a hook may change values. Remove the hook, change the host itself, or "
            "run dense: model.using('dense')."
        )


class Before(_Node):
    """(module, *values) -> record: all that torch does before a module's forward."""

    __name__ = "run_hooks_before"

    def __call__(self, module: nn.Module, *values: Any) -> Record:
        """Run them; what is compiled has those that only look forward inside of its graph."""
        if not (torch.compiler.is_dynamo_compiling() and _only_forward(module)):
            return self.in_eager_mode(module, *values)  # type: ignore[no-any-return]
        record = Record(self.call, module, *self.build(values)[0])
        record.leaves = self.structure.leaves_of((record.args, record.kwargs)) or []
        for number, hook in _called(self.call, *_forward_pre_hooks(module)):
            record.args, record.kwargs = given = _call_before(record, number, hook)
            record.leaves = self.checked(given, record.leaves, hook)
        return record

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def in_eager_mode(self, module: nn.Module, *values: Any) -> Record:
        """The same, with all that is known of hooks."""
        (args, kwargs), leaves = self.build(values)
        record = Record(self.call, module, args, kwargs)
        OPEN.records.append(record)
        called = _called(self.call, *_forward_pre_hooks(module))
        for number, hook in called:
            tell = self.telling(leaves, number, hook)
            record.args, record.kwargs = args, kwargs = _call_before(record, number, hook)
            leaves = self.checked((args, kwargs), leaves, hook)
            self.check_same(leaves, hook)
            tell(leaves)
        for told in OPEN.told[-1:] if called else ():
            told.before(module)
        running: Any = module
        full, pre = running._get_backward_hooks()[0], running._get_backward_pre_hooks()
        if full or pre:
            record.backward = BackwardHook(module, full, pre)
            args = record.backward.setup_input_hook(args)
            leaves = self.structure.leaves_of((args, kwargs)) or []
        placed = vars(module).get("_hf_hook")
        if placed is not None:
            args, kwargs = placed.pre_forward(module, *args, **kwargs)
            leaves = self.checked((args, kwargs), leaves, placed.pre_forward)
        record.args, record.kwargs, record.leaves = args, kwargs, leaves
        return record


class After(_Node):
    """(record, *values) -> leaves: all that torch does after a module's forward."""

    __name__ = "run_hooks_after"

    def __call__(self, record: Record, *values: Any) -> Sequence[Any]:
        """As `Before`."""
        module = record.module
        if not (torch.compiler.is_dynamo_compiling() and _only_forward(module)):
            return self.in_eager_mode(record, *values)  # type: ignore[no-any-return]
        record.result, leaves = self.build(values)
        for number, hook in _called(self.call, *_forward_hooks(module)):
            given = _call_forward(record, number, hook)
            record.result = record.result if given is None else given
            leaves = self.checked(record.result, leaves, hook)
        return leaves

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def in_eager_mode(self, record: Record, *values: Any) -> Sequence[Any]:
        """The same, with all that is known of hooks."""
        module = record.module
        result, leaves = self.build(values)
        placed = vars(module).get("_hf_hook")
        if placed is not None:
            result = placed.post_forward(module, result)
            leaves = self.checked(result, leaves, placed.post_forward)
        record.result = result
        for number, hook in _called(self.call, *_forward_hooks(module)):
            record.ran.add(number)
            tell = self.telling(leaves, number, hook)
            given = _call_forward(record, number, hook)
            if given is not None:
                record.result = given
            leaves = self.checked(record.result, leaves, hook)
            tell(leaves)
        result, backward = record.result, record.backward
        if backward is not None:
            if not isinstance(result, Tensor | tuple):
                warn_once(
                    module,
                    "backward hooks",
                    f"For them to be called, the output of module '{self.call.path}' has to be a "
                    f"tensor or a tuple of tensors, but it is {type(result)}.",
                )
            result = backward.setup_output_hook(result)
            leaves = self.structure.leaves_of(result) or []
        running: Any = module
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if first is not None and first.grad_fn is not None:
            for old in running._get_backward_hooks()[1]:  # register_backward_hook
                first.grad_fn.register_hook(partial(old, module))
        if record in OPEN.records:  # not where two programs run in step, to be compared
            del OPEN.records[OPEN.records.index(record) :]
        return leaves


def is_hook_node(node: fx.Node) -> bool:
    """Whether a node runs hooks: it must stay though nobody reads it, and holds a record."""
    return isinstance(node.target, _Node)


@contextmanager
def hooks_told(told: Told) -> Iterator[None]:
    """Tell what hooks do in the calls of this thread."""
    OPEN.told.append(told)
    try:
        yield
    finally:
        OPEN.told.pop()


def closing(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which calls hooked modules: if it fails inside of some, their hooks with `always_call`
    are called, as torch does."""

    @wraps(run)
    def closed(*args: Any, **kwargs: Any) -> Any:
        depth = len(OPEN.records)
        try:
            return run(*args, **kwargs)
        except Exception:
            for record in reversed(OPEN.records[depth:]):
                _call_always(record)
            raise
        finally:
            del OPEN.records[depth:]

    return closed


def _called(call: Call, *known: Mapping[int, Hook]) -> list[tuple[int, Hook]]:
    """The hooks in torch's order, less those that are the host's own code."""
    return [(n, hook) for hooks in known for n, hook in hooks.items() if n not in call.host]


def _only_forward(module: nn.Module) -> bool:
    """Whether a module has no hooks of gradients, and none of accelerate's."""
    backward = module._backward_hooks or module._backward_pre_hooks
    everywhere = torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    return not (backward or everywhere or "_hf_hook" in module.__dict__)


def _forward_pre_hooks(module: nn.Module) -> tuple[Mapping[int, Hook], Mapping[int, Hook]]:
    return torch_module._global_forward_pre_hooks, module._forward_pre_hooks


def _call_before(record: Record, number: int, hook: Hook) -> tuple[Any, Any]:
    """The arguments of a module after a pre-hook."""
    module, args, kwargs = record.module, record.args, record.kwargs
    if number in module._forward_pre_hooks_with_kwargs:
        given: Any = hook(module, args, kwargs)
        return (args, kwargs) if given is None else given
    given = hook(module, args)
    if given is None:
        return args, kwargs
    return given if isinstance(given, tuple) else (given,), kwargs


def _forward_hooks(module: nn.Module) -> tuple[Mapping[int, Hook], Mapping[int, Hook]]:
    return torch_module._global_forward_hooks, module._forward_hooks


def _call_forward(record: Record, number: int, hook: Hook) -> Any:
    """What a forward hook returns."""
    module = record.module
    globally = torch_module._global_forward_hooks_with_kwargs
    if number in module._forward_hooks_with_kwargs or number in globally:
        return hook(module, record.args, record.kwargs, record.result)
    return hook(module, record.args, record.result)


def _call_always(record: Record) -> None:
    """Call the hooks that ask for it after an error, and have not run."""
    module, always = record.module, torch_module._global_forward_hooks_always_called
    for number, hook in _called(record.call, *_forward_hooks(module)):
        asked = number in always or number in module._forward_hooks_always_called
        if not asked or number in record.ran:
            continue
        try:
            _call_forward(record, number, hook)
        except Exception as error:
            warn_once(
                module,
                "always_call",
                f"A forward hook with always_call=True of module '{record.call.path}' raised "
                f"{type(error).__name__}: {error}, while another error was on its way.",
            )


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _state(leaves: Sequence[Any]) -> list[tuple[int, int]]:
    """Which tensors these are, and how often each was written to, as far as torch counts it."""
    return [(id(x), 0 if x.is_inference() else x._version) for x in _tensors(leaves)]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether all values are equal; NaN equals NaN."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype


def _said(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return _said(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_shapes, value))})"
    return type(value).__name__


def name_of(hook: Hook) -> str:
    """The file and the name of a hook's function."""
    function = getattr(hook, "func", hook)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"
