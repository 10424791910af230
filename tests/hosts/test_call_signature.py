"""The arguments of a call, however it is written: flat leaves, and the same call again."""

import enum
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import HostError
from tokenprune.hosts.inputs import CallSignature
from tokenprune.tracing.arguments import Arguments


class Kind(enum.Enum):
    ONE = 1


@dataclass
class Boxes:
    boxes: Tensor
    width: int = 3


class Labels(UserDict):  # type: ignore[type-arg]
    pass


class Named(dict):  # type: ignore[type-arg]
    pass


def bound(forward: Any, *args: Any, **kwargs: Any) -> Arguments:
    host = type("Host", (nn.Module,), {"forward": forward})
    return CallSignature.of(host).bind(args, kwargs)


def received(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


x, y = torch.zeros(2, 3), torch.ones(2)


def test_one_call_written_in_several_ways_has_one_form() -> None:
    def forward(self: Any, x: Tensor, mask: Any = None, scale: float = 1.0) -> None: ...

    ways = [bound(forward, x, y, 2.0), bound(forward, scale=2.0, mask=y, x=x)]
    ways += [bound(forward, x, scale=2.0, mask=y)]
    assert len({way.places for way in ways}) == 1
    assert all(list(way) == ["x", "mask", "scale"] for way in ways)
    left_out = [bound(forward, x), bound(forward, x, None), bound(forward, x=x, mask=None)]
    assert {tuple(way) for way in left_out} == {("x",)}


def test_none_is_given_where_it_is_not_the_default() -> None:
    def forward(self: Any, x: Tensor, pool: str | None = "mean", **more: Any) -> None: ...

    assert bound(forward, x, None, flag=None).call(received) == (
        (),
        {"x": x, "pool": None, "flag": None},
    )


CALLS: dict[str, Any] = {
    "star": (lambda self, *images: 0, (x, y), {}),
    "named_then_star": (lambda self, x, *rest: 0, (x, y, 3), {}),
    "star_of_nested": (lambda self, *images: 0, ([x], {"y": y}), {}),
    "keyword_only": (lambda self, x, *, mask=None: 0, (x,), {"mask": y}),
    "anything": (lambda self, *a, **k: 0, (x,), {"mask": y}),
    "by_place_only": (lambda self, x, y=None, /, z=None: 0, (x, None), {"z": y}),
    "star_and_keyword": (lambda self, x, *rest, mask: 0, (x, y), {"mask": None}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_host_gets_what_the_caller_gave(name: str) -> None:
    forward, args, kwargs = CALLS[name]
    again = bound(forward, *args, **kwargs).call(received)
    if name in ("star_and_keyword", "named_then_star", "star", "anything", "star_of_nested"):
        assert again == (args, kwargs)
    signature = [*again[0], *again[1].values()]
    assert len(signature) == len(args) + len(kwargs)
    for one, other in zip(tree_leaves(signature), tree_leaves([args, kwargs]), strict=True):
        assert one is other


NESTED: dict[str, Any] = {
    "list_of_dicts": [{"boxes": x, "area": 2}, {"boxes": y, "area": 3}],
    "tuple": (x, (y, None)),
    "ordered": OrderedDict(a=x, b=[y]),
    "dataclass": Boxes(x),
    "dataclass_in_a_list": [Boxes(x, 4), Boxes(y)],
    "user_dict": [Labels(boxes=x), Labels(boxes=y, more=[x])],
    "dict_subclass": Named(a=x, b=y),
    "plain": [x, 1, 2.5, "a", True, None, torch.float16, torch.device("cpu"), Kind.ONE, b"a"],
    "empty": [(), {}, [x]],
    "shape": (x, x.shape),
}


@pytest.mark.parametrize("name", NESTED)
def test_containers_are_flattened_and_built_again(name: str) -> None:
    arguments = bound(lambda self, x, labels: 0, x, NESTED[name])
    hash(arguments.places)
    assert all(isinstance(t, Tensor) for t in arguments.tensors.values())
    assert all(leaf.isidentifier() for leaf in arguments)
    _, kwargs = arguments.call(received)
    assert described(kwargs["labels"]) == described(NESTED[name])


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, UserDict | Boxes):
        return type(value), {k: described(v) for k, v in vars(value).items()}
    if isinstance(value, dict):
        return type(value), {k: described(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value), [described(v) for v in value]
    return type(value), value


def test_leaves_have_names_that_code_can_use() -> None:
    leaves = bound(lambda self, labels, **k: 0, [{"a b": x}, {"a_b": y}], **{"class": y})
    assert list(leaves) == ["labels_0_a_b", "labels_1_a_b", "class_"]
    twice = bound(lambda self, labels, labels_0=None: 0, [x], y)
    assert list(twice) == ["labels_0", "labels_0_"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.Generator(), "Generator"),
        ({1, 2}, "set"),
        (iter([]), "list_iterator"),
        (object(), "object"),
        (torch.zeros(2).numpy(), "ndarray"),
        (len, "builtin_function_or_method"),
        (Boxes, "type"),
    ],
)
def test_other_objects_are_refused_by_name(value: Any, kind: str) -> None:
    refused = rf"Argument labels\[1\]\['a'\] of Host is a {kind}\. .*Pass"
    with pytest.raises(HostError, match=refused):
        bound(lambda self, x, labels: 0, x, [x, {"a": value}])


def test_a_call_that_the_host_does_not_take() -> None:
    def forward(self: Any, x: Tensor, y: Any = None) -> None: ...

    for args, kwargs in (((x, y, x), {}), ((x,), {"z": y}), ((x,), {"x": y})):
        with pytest.raises(HostError, match=r"takes \(x, y\), but was called with"):
            bound(forward, *args, **kwargs)
