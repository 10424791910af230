"""Trace a host's forward into a torch.fx graph, without running it for real.

`torch.fx.symbolic_trace` stops at the first `if`. Here proxies carry the value they had on an
example input (`proxy.ValueProxy`), computed under fake tensors: no memory and no arithmetic. Every
tensor operation outside a leaf is caught by a torch function mode, so tensors that a host makes
from plain numbers (`torch.arange(n)`) become nodes as well, not constants.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import CodeType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from tokenprune.private import FakeTensorMode, tree_map
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.calls import NUMBER, RecordedCall
from tokenprune.tracing.checkpoints import CHECKPOINT, Checkpoint, checkpoints_recorded
from tokenprune.tracing.constants import find, look_up, named_tensors
from tokenprune.tracing.decompose import is_leaf, is_torchs
from tokenprune.tracing.draws import DrawRead, is_drawn, possible_number
from tokenprune.tracing.finite import answer
from tokenprune.tracing.functions import calls_let_through
from tokenprune.tracing.gradients import GradientRun
from tokenprune.tracing.handed import HANDED, HandedProxy
from tokenprune.tracing.hooks import Hooks, as_leaf, next_hook, unhooked
from tokenprune.tracing.inside import NEEDS_VALUES, inside
from tokenprune.tracing.interpret import tensor_attribute, tensors_in
from tokenprune.tracing.kept_values import buffers_behind, value_of_buffers
from tokenprune.tracing.modes import (
    MODES,
    REQUIRES_GRAD,
    State,
    modes_between,
    modes_named_by,
    of_call,
    reads_noted,
    state,
)
from tokenprune.tracing.names import Reached, as_function, compared_types
from tokenprune.tracing.node_arguments import argument_of
from tokenprune.tracing.outside import named_by, outside_noted
from tokenprune.tracing.provenance import Provenance, failed_at, frame_of_host
from tokenprune.tracing.proxy import ValueProxy, concrete
from tokenprune.tracing.reads import Reads
from tokenprune.tracing.recording import calls_recorded
from tokenprune.tracing.remains import Remains, let_go, nodes_in, remains_of, taken_out
from tokenprune.tracing.stand_ins import fake_near, fake_of, mark
from tokenprune.tracing.state import attributes_kept, empty_caches

__all__ = ["ValueTracer"]

# Tracing patches torch for the whole process; calls of other threads pass through the patches.
ONE_AT_A_TIME = threading.RLock()
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class ValueTracer(fx.Tracer):
    """Records one call of a host.

    Args:
        root: The host; nothing of it is changed, and patches last only as long as the trace.
    """

    def __init__(self, root: nn.Module, fake_mode: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.fake_mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=True)
        self._executing = False
        self._thread = threading.get_ident()
        self.specialized: list[fx.Node] = []
        self.reads = Reads()
        self.functions: list[Any] = []
        self.reached: Reached | None = None
        self.made: list[nn.Module] = []
        self._ran: dict[CodeType, dict[str, Any]] = {}
        self.left = Remains()
        self.calls: list[RecordedCall] = []
        self.tensor_attrs = {}
        self._paths = {module: name for name, module in root.named_modules()}
        self.submodule_paths = self._paths
        self._names: dict[int, str] = {}
        for module, path, name, tensor in named_tensors(root):
            self._names[id(tensor)] = f"{path}.{name}" if path else name
            self.reads.places.setdefault(id(tensor), []).append((module, name))
        self._attributes: dict[str, ValueProxy] = {}
        self._modules_entered = [""]
        self._failed_in = ""
        self.example: Mapping[str, Any] = {}
        self._reads_draws = False
        self._count = 0
        self._proxies: list[weakref.ref[ValueProxy]] = []
        self.ambient: dict[str, Any] = {}
        self.caller = state()
        self._checkpoint: Checkpoint | None = None
        self._gradients: GradientRun | None = None
        self.hooks = Hooks(root, since=next_hook())
        self.opened: dict[nn.Module, None] = {}

    def record(self, forward: Callable[..., Any], example: Arguments, known: Reached) -> fx.Graph:
        """Trace a call of `forward`, which may reach what is `known`: tensors become inputs, other
        values are specialized on."""
        self.example = example.inputs
        self.reads.inherits(self.root, forward.__name__)
        inputs = self._inputs(example)
        with ONE_AT_A_TIME, attributes_kept(self.root) as kept:
            empty_caches(self.root)
            checkpoints, outside = checkpoints_recorded(self), outside_noted(self.reads.asked)
            calls = calls_recorded(self, known)
            with calls, reads_noted(self), checkpoints, outside:
                output = example.with_tensors(inputs).call(forward)
                result = self.create_arg(output)
            self.reads.forget(lambda value: bool(nodes_in(value)))
            self.reads.forget_made(self.made)
            for module in self.made:
                let_go(module)
            self.functions = [forward, *self.reads.functions()]
            self.functions += [as_function(*ran) for ran in (self._ran | self.reads.ran).items()]
            self.reached = reached = Reached(self.functions)
            for asked in named_by(reached, self.functions):
                self.reads.asked(*asked)
            for mode in modes_named_by(reached):
                self.note_ambient(mode)
            if self.reads.tables:  # all parameters, and what they say
                self.note_ambient(REQUIRES_GRAD)
            self.reads.types = compared_types(reached.codes())
            self.left, effects = remains_of(kept, self.graph, reached, self._ran)
            for target, value in effects:
                node = self.create_node("call_function", target, (self.create_arg(value),), {})
                node.meta["val"] = None
            self.create_node("output", "output", (result,), {})
        return self.graph

    def _inputs(self, example: Arguments) -> dict[str, Any]:
        """Placeholders; what is one tensor is one proxy for the host's code."""
        inputs, tensors = dict[str, Any](), example.tensors
        for name, tensor in tensors.items():
            proxy = self.create_proxy("placeholder", name, (), {}, tensor)
            mark(proxy.node, tensor)
            inputs[name] = next((inputs[n] for n in inputs if tensors[n] is tensor), proxy)
        for name, value in example.handed.items():
            node = self.create_node("placeholder", name, (), {})
            node.meta |= {"val": None, HANDED: type(value)}
            inputs[name] = HandedProxy(node)
        return inputs

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread, which has nothing to do with the trace."""
        return threading.get_ident() != self._thread

    @property
    def executing(self) -> bool:
        """Whether calls run as they are instead of being recorded."""
        return self._executing or self.elsewhere

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Values are computed without gradients, and all of them as tensors of one kind."""
        was, self._executing = self._executing, True
        moved = torch.is_inference_mode_enabled() != self.caller.inference
        try:
            inference = torch.inference_mode(self.caller.inference) if moved else nullcontext()
            with calls_let_through(), inference, torch.no_grad():
                yield
        finally:
            self._executing = was

    def runs_itself(self, module: nn.Module) -> bool:
        return is_leaf(module) and module in self._paths

    def lacks(self, node: fx.Node, name: str) -> None:
        """Python asked a tensor for a mark that it does not have."""
        if node.op == "get_attr" and not self.executing:
            with self.unrecorded():
                self.reads.lacked(tensor_attribute(self.root, str(node.target)), name)

    def note_ambient(self, name: str) -> None:
        """Python reads or changes a mode of torch, or asks about the inputs, so the trace holds
        for what the caller has."""
        of_mode = name in State._fields
        with self.unrecorded():
            now = getattr(self.caller, name) if of_mode else of_call(name, self.root, self.example)
        self.ambient[name] = now

    @contextmanager
    def checkpointed(self, options: Mapping[str, Any]) -> Iterator[None]:
        """The nodes made inside are recomputed in the backward pass; those of a call in another are
        the outer one's."""
        was = self._checkpoint
        self._checkpoint = was or Checkpoint(self._count, options)
        try:
            yield
        finally:
            self._checkpoint = was

    def with_gradients(self, node: fx.Node) -> Any:
        """A node's value as autograd sees it, which Python asks about."""
        for name in ("grad", "inference", REQUIRES_GRAD):
            self.note_ambient(name)
        if self._gradients is None:
            known = (self.root, self.graph, self.fake_mode, self.example, self.caller.grad)
            self._gradients = GradientRun(*known)
        with self.unrecorded():
            return self._gradients.value(node)

    def attribute_proxy(self, tensor: torch.Tensor) -> Any:
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        if name not in self._attributes:
            proxy = self._attributes[name] = self.create_proxy("get_attr", name, (), {})
            mark(proxy.node, tensor)
        return self._attributes[name]

    def forget_attributes(self) -> None:
        """Read parameters and buffers again from here on."""
        self._attributes.clear()

    def _constant(self, thing: Any) -> Any:
        """A node that looks up what no module has as a tensor or child of its own."""
        name = f"constant {id(thing)}"
        if name not in self._attributes:
            with self.unrecorded():
                place = find(self.root, thing)
            found = look_up(self, thing, place)
            with self.unrecorded():
                tensor = isinstance(thing, torch.Tensor)
                found.node.meta["val"] = fake_of(self.fake_mode, thing) if tensor else thing
            self._attributes[name] = found
        return self._attributes[name]

    def specialize(self, node: fx.Node, convert: Callable[[Any], Any]) -> Any:
        """`convert` (bool, int, float, ...) applied to `node`'s value, which Python reads."""
        if self.executing:
            return convert(node.meta["val"])
        known = answer(node, self.create_node)
        if known is not None:
            return convert(known)
        if self._reads_draws and is_drawn(node):
            raise DrawRead()
        self.specialized.append(node)
        try:
            with self.unrecorded():
                return convert(node.meta["val"])
        except NEEDS_VALUES as error:
            found = self._of_buffers(node, convert)
            if found is None:
                raise (DrawRead() if is_drawn(node) else error) from error
            return found

    def _of_buffers(self, node: fx.Node, convert: Callable[[Any], Any]) -> Any:
        """The value of a node that is computed from settings which the host keeps in buffers."""
        with self.unrecorded():
            behind = buffers_behind(self.root, node)
            if behind is None:
                return None
            self.reads.decides(behind)
            return convert(value_of_buffers(self.root, node))

    def proxy(self, node: fx.Node) -> ValueProxy:
        made = ValueProxy(node, self)
        self._proxies.append(weakref.ref(made))
        return made

    def leaked(self) -> Provenance | None:
        """Where in the host the first tensor was made that its code has put into a list or dict
        that no module holds; None if there is none. None stays there."""
        self._attributes.clear()
        if self.left.elsewhere:
            return cast(Provenance, self.left.elsewhere[0].meta["where"])
        return taken_out(self._proxies)

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Args, kwargs: Kwargs, value: Any = None, **options: Any
    ) -> Any:
        """A node and its value: of `value`, a real tensor, or else of what the node calls."""
        proxy = super().create_proxy(kind, target, args, kwargs, **options)
        try:
            proxy.node.meta["val"] = self._evaluate(kind, target, args, kwargs, value)
        except NEEDS_VALUES as error:
            number = possible_number(proxy.node)
            known = answer(proxy.node, self.create_node) if target == "item" else None
            if known is not None:
                return known
            found = self._of_buffers(proxy.node, lambda v: v) if target == "item" else None
            if found is not None:
                proxy.node.meta["val"] = found
                return proxy
            if target != "item" or number is None:
                raise (DrawRead() if is_drawn(proxy.node) else error) from error
            proxy.node.meta["val"], self._reads_draws = number, True
        return proxy

    def _evaluate(self, kind: str, target: Any, args: Args, kwargs: Kwargs, value: Any) -> Any:
        with self.unrecorded():
            if kind == "get_attr":
                value = tensor_attribute(self.root, target)
            if value is not None:
                near = next(iter(self.example.values()), value)
                fake = partial(fake_near, self.fake_mode, example=near)
                return tree_map(lambda v: fake(v) if isinstance(v, torch.Tensor) else v, value)
            args, kwargs = map_aggregate(args, concrete), map_aggregate(kwargs, concrete)
            called = self.root.get_submodule(target) if kind == "call_module" else target
            with self.fake_mode, self.reads.torch_runs(kind == "call_method" or is_torchs(called)):
                if kind == "call_function":
                    return called(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return unhooked(called, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame, inside = frame_of_host(ValueTracer.record.__code__)
        code = frame.f_code
        if inside:
            self._ran[code] = frame.f_globals
        node.meta["where"] = Provenance(self._modules_entered[-1], code.co_filename, frame.f_lineno)
        node.meta[NUMBER] = self._count
        self._count += 1
        node.meta.pop("nn_module_stack", None)
        modes = modes_between(self.caller, state())
        if modes:
            node.meta[MODES] = modes
            for mode in modes:
                self.note_ambient(mode.name)
        if self._checkpoint is not None:
            node.meta[CHECKPOINT] = self._checkpoint
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) in (ValueProxy, HandedProxy):
            return a.node
        unnamed = isinstance(a, nn.Module) and a not in self._paths
        if unnamed or isinstance(a, torch.Tensor | torch.Generator):
            proxy = self.attribute_proxy(a) if isinstance(a, torch.Tensor) else a
            return (proxy if type(proxy) is ValueProxy else self._constant(a)).node
        return argument_of(self, a, super().create_arg)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        path = self._paths.get(m)
        if path is None:  # in a list, or made inside forward (a loss): its own calls are recorded
            return inside(self, m, None, forward, args, kwargs)
        start = self._count
        self._modules_entered.append(path)
        try:
            if self.is_leaf_module(m, path) and tensors_in((args, kwargs)):  # not Identity()(None)
                self.reads.leaves[id(m)] = m
                output = as_leaf(self, m, path, args, kwargs)
            else:
                output = inside(self, m, path, forward, args, kwargs)
            self._failed_in = ""
        except Exception:
            self._failed_in = self._failed_in or path
            raise
        finally:
            self._modules_entered.pop()
        given = (*args, *kwargs.values())
        self.calls.append(RecordedCall.of(path, given, output, start, self._count))
        return output

    def so_far(self) -> tuple[int, int, Checkpoint | None]:
        """How much is recorded."""
        return self._count, len(self.specialized), self._checkpoint

    def forget_since(self, before: tuple[int, int, Checkpoint | None]) -> None:
        """Take back what was recorded since then (`so_far`)."""
        start, specialized, self._checkpoint = before
        for node in reversed(self.graph.nodes):
            if node.meta[NUMBER] < start:
                break
            self.graph.erase_node(node)
        known = set(self.graph.nodes)
        self._attributes = {n: p for n, p in self._attributes.items() if p.node in known}
        self.calls = [call for call in self.calls if call.start < start]
        del self.specialized[specialized:]

    def failed_at(self, error: BaseException, path: str | None = None) -> Provenance:
        """The line of the host's source that led to `error`, in the call of a module."""
        return failed_at(error, self._failed_in or path or "")
