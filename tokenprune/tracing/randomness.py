"""Python's and NumPy's random numbers: a trace would freeze those that a host draws.

Generators that a trace moved are put back, and the line of the host that drew is found by tracing
once more.
"""

import gc
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import compress
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from tokenprune.private import DisableTorchFunction, without_modes
from tokenprune.tracing.contents import within
from tokenprune.tracing.names import Reached
from tokenprune.tracing.provenance import Drawn, of_host
from tokenprune.tracing.reads import OF_TORCH

__all__ = ["Generators", "torch_generators_kept"]

SYSTEM = random.SystemRandom
"""The operating system's, which has no state. By this name: a trace puts another class there."""
KINDS = (random.Random, np.random.Generator, np.random.RandomState)
# Those behind `random.random` and `np.random.rand`: named, since `gc.freeze` hides them.
DEFAULTS = [cast(Any, draw).__self__ for draw in (random.random, np.random.get_state)]


DRAWS = ("random", "getrandbits", "seed", "setstate")
"""Methods of Python's generators, written in C, through which all others draw."""


class Generators:
    """The states of all generators of this process, as they are now; torch's as far as they are
    the default one of the CPU, or an attribute of a module."""

    def __init__(self, root: nn.Module, known: Reached | None = None) -> None:
        """Find them; `known` is what the host's code may reach."""
        kinds = {found for kind in KINDS for found in _subclasses(kind)}
        kinds.discard(SYSTEM)
        found = [*_objects_of(kinds), *_held_by(root, known, kinds)]
        objects = [*DEFAULTS, *{id(one): one for one in found if one not in DEFAULTS}.values()]
        # torch's are not collected
        objects += [torch.default_generator, *_torchs_in(root)]
        self._states: list[tuple[Any, Any]] = [(thing, _state(thing)) for thing in objects]

    def moved(self) -> list[Any]:
        """Those that have another state by now."""
        return [generator for generator, state in self._states if _state(generator) != state]

    def restore(self) -> None:
        """Give those that have moved their state back."""
        for generator, state in self._states:
            if _state(generator) != state:
                _set_state(generator, state)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Give them their states back afterwards."""
        try:
            yield
        finally:
            self.restore()

    def first_draw(self, call: Callable[[], Any]) -> Drawn | None:
        """The first line of the host that moves a generator in `call`, which may fail; None if
        none does.

        Calls of Python's own generators are seen where they are made: other threads may draw from
        them meanwhile.
        """
        old, last, found = sys.gettrace(), ("", 0), list[Drawn]()
        profiled = sys.getprofile()

        def watch(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if found or not of_host(frame.f_code.co_filename):
                return None
            moved = (g for g in self.moved() if not isinstance(g, random.Random))
            found.extend(Drawn(_name(generator), last) for generator in moved)
            last = frame.f_code.co_filename, frame.f_lineno
            return watch

        def profile(frame: FrameType | None, event: str, called: Any) -> None:
            if event != "c_call" or found:
                return
            generator = getattr(called, "__self__", None)
            if not isinstance(generator, random.Random) or called.__name__ not in DRAWS:
                return
            while frame is not None and not of_host(frame.f_code.co_filename):
                frame = frame.f_back
            if frame is not None:
                found.append(Drawn(_name(generator), (frame.f_code.co_filename, frame.f_lineno)))

        sys.setprofile(profile)
        sys.settrace(watch)
        try:
            with suppress(Exception):  # it has run once, so its errors are known
                call()
        finally:
            sys.settrace(old)
            sys.setprofile(profiled)
            self.restore()
        return found[0] if found else None


@contextmanager
def torch_generators_kept(root: nn.Module | None = None) -> Iterator[None]:
    """Give torch's generators their states back, those too that are attributes of a model's
    modules: of what runs for real in a trace."""
    own = [] if root is None else _torchs_in(root)
    states = [(generator, generator.get_state()) for generator in own]
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if cuda else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def _torchs_in(root: nn.Module) -> list[torch.Generator]:
    """Torch's generators that are attributes of modules."""
    held = (value for module in root.modules() for value in dict(vars(module)).values())
    return [value for value in held if type(value) is torch.Generator]


def _objects_of(kinds: set[type]) -> list[Any]:
    """All objects of these very classes that Python's collector knows.

    Its list is dropped at once: a tuple that another thread is building is in it too, and cannot be
    finished while two hold it.
    """
    everything = gc.get_objects()
    found = list(compress(everything, map(kinds.__contains__, map(type, everything))))
    del everything
    return found


def _held_by(root: nn.Module, known: Reached | None, kinds: set[type]) -> list[Any]:
    """Those in attributes of modules, and in what is `known`: `gc.freeze` hides objects from the
    collector."""
    tables = (vars(module) for module in root.modules())
    held = [value for table in tables for name, value in table.items() if name not in OF_TORCH]
    if known is not None and kinds.intersection(known.classes):
        held += known.values()
    return [v for value in held for v in within(value) if type(v) in kinds]


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    narrower: list[type] = kind.__subclasses__()
    for found in narrower:
        yield from _subclasses(found)


def _state(generator: Any) -> Any:
    """The state of a generator, in a form that compares."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state(legacy=False))
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    with without_modes(), DisableTorchFunction():  # a trace may be running
        return generator.get_state().numpy().tobytes()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    else:
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _name(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return "torch's generator, or seeds it"
    own = "Python's random" if isinstance(generator, random.Random) else "NumPy's"
    return f"{own} generator"
