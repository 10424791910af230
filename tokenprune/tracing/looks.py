"""How what is watched is looked up: by a table, a name and a value that stands for "absent"."""

import sys
from abc import get_cache_token
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.tracing.asked import can_be_imported
from tokenprune.tracing.contents import state_of

__all__ = [
    "OF_TENSOR",
    "are_one",
    "class_of",
    "dict_of",
    "holds",
    "how_many",
    "imported",
    "is_there",
    "items",
    "itself",
    "lacks",
    "names_in",
    "names_of",
    "none_in",
    "none_of_gradients",
    "numbers_in",
    "of_itself",
    "of_tensor",
    "registered",
    "state_now",
    "subclasses",
]

OF_TENSOR = attrgetter("dtype", "device", "shape")


def items(children: dict[str, nn.Module], _name: str, _absent: Any) -> list[Any]:
    return list(children.items())  # in their order


def of_tensor(table: dict[str, Tensor], name: str, _absent: Any) -> Any:
    tensor = table[name]
    return OF_TENSOR(tensor), _class_of_host(type(tensor))


def numbers_in(table: dict[str, Tensor], name: str, absent: Any) -> Any:
    tensor = table.get(name)
    return absent if tensor is None or tensor.is_meta else (tensor.shape, tensor.tolist())


def _class_of_host(cls: type) -> type | None:
    """A class of the host's own; torch changes those of its own, to shard weights say."""
    return None if str(cls.__module__).partition(".")[0] == "torch" else cls


def itself(table: Any, _name: str, _absent: Any) -> Any:
    return table


def names_in(owner: Any, name: str, _absent: Any) -> list[str]:
    return list(getattr(owner, name))


def of_itself(cls: type, name: str, absent: Any) -> Any:
    """A method that a class itself defines; traces put others into torch's classes."""
    return vars(cls).get(name, absent)


def class_of(owner: Any, _name: str, _absent: Any) -> type:
    return type(owner)


def state_now(value: Any, _name: str, _absent: Any) -> Any:
    return state_of(value)


def is_there(owner: Any, name: str, _absent: Any) -> bool:
    """Whether an object or its class has an attribute, whatever its `__getattr__` makes up."""
    if isinstance(owner, nn.Module) and any(
        name in table for table in (owner._parameters, owner._buffers, owner._modules)
    ):
        return True
    return name in getattr(owner, "__dict__", ()) or hasattr(type(owner), name)


def are_one(places: Sequence[tuple[nn.Module, str]], _name: str, _absent: Any) -> bool:
    """Whether attributes of modules hold the same tensor."""
    held = [getattr(module, name, None) for module, name in places]
    return all(tensor is held[0] for tensor in held)


def holds(place: tuple[Any, Tensor], name: str, _absent: Any) -> bool:
    owner, tensor = place
    return getattr(owner, name, None) is tensor


def none_in(table: dict[str, Any], name: str, _absent: Any) -> bool:
    return not table.get(name)


def none_of_gradients(table: dict[str, Any], name: str, absent: Any) -> bool:
    """Hooks of the backward pass are no matter where there is none."""
    return not torch.is_grad_enabled() or none_in(table, name, absent)


def lacks(place: tuple[dict[str, Any], frozenset[str]], _name: str, _absent: Any) -> bool:
    return place[0].keys().isdisjoint(place[1])


def names_of(table: Mapping[str, Any], _name: str = "", _absent: Any = None) -> list[str]:
    return [name for name in table if name[:2] != "__"]


def imported(name: str, _name: str = "", _absent: Any = None) -> Any:
    """The module of a name; if there is none, whether there is one to be imported."""
    return sys.modules.get(name) or can_be_imported(name)


def subclasses(cls: type, _name: str = "", _absent: Any = None) -> list[type]:
    return type.__subclasses__(cls)


def registered(_cls: Any = None, _name: str = "", _absent: Any = None) -> Any:
    """Another one after any class was declared to be of another (`ABC.register`)."""
    return get_cache_token()


def dict_of(owner: Any, _name: str = "", _absent: Any = None) -> dict[str, Any]:
    """The attributes of an object: it may get another dict."""
    held: dict[str, Any] = vars(owner)
    return held


def how_many(names: Mapping[str, Any], _name: str = "", _absent: Any = None) -> int:
    """How many names a class has: a new one may hide what its objects hold. Less what Python puts
    there when it copies objects or is asked for annotations."""
    return len(names) - ("__slotnames__" in names) - ("__annotations__" in names)
