"""Hooks of the modules of a host: which are its own code, and how the others come into a graph.

No hook of the owner's runs while a host is traced. Where one would run, the graph gets the nodes of
`hook_nodes`, which run it with the real tensors. Hooks that are part of the host itself (those with
which transformers collects `hidden_states`) are traced like its forward.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from tokenprune.private import FakeTensor, tree_leaves
from tokenprune.tracing.hook_nodes import After, Before, Call, Hook, name_of, passed
from tokenprune.tracing.proxy import ValueProxy
from tokenprune.tracing.stand_ins import is_away, with_fakes
from tokenprune.tracing.structure import Structure

__all__ = [
    "HOST_HOOKS",
    "UNHOOKED",
    "Hooks",
    "as_leaf",
    "between_hooks",
    "calls_unhooked",
    "forward_of",
    "has_hooks",
    "next_hook",
    "unhooked",
    "would_run_hooks",
]

HOST_HOOKS = {"transformers.utils.output_capturing"}
"""Names of Python modules whose hooks are part of the hosts that have them; others may be added."""

UNHOOKED = "unhooked"
"""Key in the `meta` of a node that is a module whose hooks other nodes run."""
NONE, FORWARD, BACKWARD = range(3)
OF_THREAD = "calls are unhooked in this thread"
GLOBAL_BACKWARD = (torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks)
GLOBAL_FORWARD = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
GLOBAL = (*GLOBAL_BACKWARD, *GLOBAL_FORWARD)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has any hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )


def would_run_hooks(module: nn.Module) -> bool:
    """Whether a call of a module would run any, those of all modules too."""
    return has_hooks(module) or any(GLOBAL)


class Hooks:
    """The hooks of a host's modules.

    The host's own are those that a Python module named in `HOST_HOOKS` defines, methods of one of
    its modules or of an object that one of them holds, and functions made in a method of one of
    their classes. `since` adds those that are registered from then on, while a forward is traced.
    """

    def __init__(self, root: nn.Module, since: int | None = None) -> None:
        self.root, self.since = root, since
        self._known: dict[int, bool] = {}

    def state(self, module: nn.Module) -> int:
        """What a program must know of a module's hooks: 0 if none of the owner's would run, 1 if
        some would, 2 if some of them run in the backward pass."""
        if module._backward_hooks or module._backward_pre_hooks or any(GLOBAL_BACKWARD):
            return BACKWARD
        if any(GLOBAL_FORWARD) or "_hf_hook" in module.__dict__:
            return FORWARD
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(self.of_host(n, hook) for n, hook in hooks.items()):
                return FORWARD
        return NONE

    def of_owner(self, module: nn.Module) -> bool:
        """Whether a module has forward hooks that are neither the host's own code nor torch's
        (`nn.utils.prune`): a module of torch's, one node, then stands between nodes that run its
        hooks."""
        if "_hf_hook" in module.__dict__:
            return False
        tables = (*GLOBAL_FORWARD, module._forward_hooks, module._forward_pre_hooks)
        return any(
            not (self.of_host(n, hook) or name_of(hook).startswith("torch."))
            for hooks in tables
            for n, hook in hooks.items()
        )

    def look(self, module: nn.Module, _name: str, _absent: Any) -> tuple[Any, ...]:
        """For `guards`: the state, whether hooks of a module of torch's are nodes, and the host's
        own hooks, which a trace went through."""
        tables = (module._forward_hooks, module._forward_pre_hooks)
        own = [n for hooks in tables for n, hook in hooks.items() if self.of_host(n, hook)]
        return self.state(module), self.of_owner(module), *own

    def of_host(self, number: int, hook: Hook) -> bool:
        """Whether a hook is the host's own code."""
        if self.since is not None and number >= self.since:
            return True
        if number not in self._known:
            self._known[number] = self._belongs(hook)
        return self._known[number]

    def _belongs(self, hook: Hook) -> bool:
        function = getattr(hook, "func", hook)
        module = getattr(function, "__module__", None)
        if module in HOST_HOOKS:
            return True
        owner = getattr(function, "__self__", None)
        if owner is not None:
            held = (value for each in self.root.modules() for value in dict(vars(each)).values())
            return any(each is owner for each in (*self.root.modules(), *held))
        name = getattr(function, "__qualname__", "")
        classes = {cls for each in self.root.modules() for cls in type(each).__mro__}
        names = {cls.__qualname__ for cls in classes if cls.__module__ == module}
        return any(name.startswith(f"{made_in}.") for made_in in names)

    def own(self, hooks: Mapping[int, Hook]) -> dict[int, Hook]:
        """Those of a module's hooks that are the host's."""
        return {n: hook for n, hook in hooks.items() if self.of_host(n, hook)}

    def host_is_first(self, module: nn.Module) -> bool:
        """Whether the host's own forward hooks come before all others of a module."""
        hooks = {**torch_module._global_forward_hooks, **module._forward_hooks}
        return not hooks or self.of_host(*next(iter(hooks.items())))


class Recorder(Protocol):
    """A tracer."""

    @property
    def hooks(self) -> Hooks: ...

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node: ...

    def create_arg(self, a: Any) -> Any: ...

    def proxy(self, node: fx.Node) -> ValueProxy: ...

    def forget_attributes(self) -> None: ...


def next_hook() -> int:
    """The number that the next hook will get which anybody registers."""
    return RemovableHandle.next_id


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module; where accelerate has put its own on the object, the one beneath."""
    own = vars(module)
    beneath = own.get("_old_forward") if "_hf_hook" in own else None
    return module.forward if beneath is None else beneath


def before_host_hooks(hooks: Hooks, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a module after those of its pre-hooks that are the host's own code."""
    for number, hook in hooks.own(module._forward_pre_hooks).items():
        if number in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        elif (given := hook(module, args)) is not None:
            args = given if isinstance(given, tuple) else (given,)
    return args, kwargs


def after_host_hooks(hooks: Hooks, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The output of a module after those of its hooks that are the host's own code."""
    for number, hook in hooks.own(module._forward_hooks).items():
        named = (kwargs,) if number in module._forward_hooks_with_kwargs else ()
        given = hook(module, args, *named, output)
        output = output if given is None else given
    return output


def between_hooks(
    tracer: Recorder,
    module: nn.Module,
    path: str,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Trace `forward(*args, **kwargs)` of `module`, with nodes that run its hooks around it."""
    hooks, call, record = tracer.hooks, None, None
    state = hooks.state(module)
    if state:
        own = hooks.own(module._forward_hooks), hooks.own(module._forward_pre_hooks)
        call = Call(path, frozenset().union(*own))
        one = state != BACKWARD  # torch makes another tensor of each argument for a backward hook
        given = tracer.create_arg(module), (args, kwargs)
        record, (args, kwargs) = _around(tracer, Before, call, *given, one)
        tracer.forget_attributes()  # a hook may have put others there
    args, kwargs = before_host_hooks(hooks, module, args, kwargs)
    output = forward(*args, **kwargs)
    first = hooks.host_is_first(module)
    if first:
        output = after_host_hooks(hooks, module, args, kwargs, output)
    if call is not None:
        _, output = _around(tracer, After, call, record, output, False)
        tracer.forget_attributes()
    return output if first else after_host_hooks(hooks, module, args, kwargs, output)


def as_leaf(tracer: Recorder, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
    """A module of torch's as one node, which runs its hooks too; where the owner has put some
    there, nodes around it run all of them."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        output = tracer.create_proxy("call_module", path, args, kwargs)
        output.node.meta[UNHOOKED] = True
        return output

    if tracer.hooks.of_owner(module):
        return between_hooks(tracer, module, path, alone, args, kwargs)
    output = tracer.create_proxy("call_module", path, args, kwargs)
    # what they return is not taken here: they run with the module
    before_host_hooks(tracer.hooks, module, args, kwargs)
    after_host_hooks(tracer.hooks, module, args, kwargs, output)
    return output


def _around(
    tracer: Recorder, kind: type[Before | After], call: Call, first: Any, value: Any, one: bool
) -> tuple[fx.Node, Any]:
    """A node that runs hooks on `value`, and `value` as it passes them; tensors that are one stay
    one if `one`."""
    structure, leaves = Structure.of(value, _holds_proxies)
    constants, nodes, same = list[Any](), dict[int, Any](), dict[int, int]()
    places: dict[fx.Node, int] = {}
    for place, leaf in enumerate(leaves):
        node = tracer.create_arg(leaf) if _is_node(leaf) else None
        constants.append(leaf if node is None else None)
        if node is None:
            continue
        nodes[place] = node
        if one and places.setdefault(node, place) != place and _is_tensor(node):
            same[place] = places[node]
    target = kind(call, structure, tuple(constants), tuple(nodes), same)
    record = tracer.create_node("call_function", target, (first, *nodes.values()), {})
    record.meta["val"] = None
    handed = tracer.proxy(record)
    made: dict[int, Any] = {}
    for place, node in nodes.items():
        if _is_tensor(node) and place not in same:
            given = (tracer.proxy(node), handed, place)
            made[place] = tracer.create_proxy("call_function", passed, given, {})
    for place, leaf in enumerate(leaves):
        leaves[place] = made.get(same.get(place, place), leaf)
    return record, structure.build(leaves)


def _is_node(leaf: Any) -> bool:
    return type(leaf) is ValueProxy or isinstance(leaf, Tensor | nn.Module)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _holds_proxies(entry: Any) -> bool:
    """Whether an object that is no container has tensors of the trace as attributes."""
    plain = type(entry) is ValueProxy or isinstance(entry, Tensor | nn.Module | type)
    if plain or not hasattr(entry, "__dict__"):
        return False
    return any(type(leaf) is ValueProxy for leaf in tree_leaves(dict(vars(entry))))


def unhooked(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a module returns, without any hook; where accelerate keeps its weights elsewhere, fake
    tensors are computed with weights that seem to be where the arguments are."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    fake = next((tensor for tensor in given if isinstance(tensor, FakeTensor)), None)
    if fake is None:
        shapes_alone = any(tensor.is_meta for tensor in given)
        with calls_unhooked():
            return (forward_of(module) if shapes_alone else module.forward)(*args, **kwargs)
    held = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    alone = not vars(module)["_modules"]
    if alone and (fake.is_meta or not any(map(is_away, held.values()))):
        return forward_of(with_fakes(module, fake.fake_mode))(*args, **kwargs)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    away = {} if fake.is_meta else {name: t for name, t in held.items() if is_away(t)}
    there = {n: torch.empty(t.shape, dtype=t.dtype, device=fake.device) for n, t in away.items()}
    with calls_unhooked():
        return functional_call(module, there, args, kwargs)


@contextmanager
def calls_unhooked() -> Iterator[None]:
    """Modules that this thread calls run their forward alone."""
    thread, before = threading.get_ident(), nn.Module.__call__
    if getattr(before, OF_THREAD, None) == thread:
        yield
        return

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return before(module, *args, **kwargs)
        return forward_of(module)(*args, **kwargs)

    setattr(call, OF_THREAD, thread)
    with mock.patch.object(nn.Module, "__call__", call):  # slow: each class in the process is told
        yield
