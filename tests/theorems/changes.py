"""What owners do to a model after `wrap`: each a function of the model (through either handle) and
the path of one of its blocks; None if the host has nothing of that kind."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

__all__ = ["CHANGES", "UNDONE", "Change", "LowRank", "NotHereError"]

Change = Callable[[Any, str], Any]
CHANGES: dict[str, Change] = {}
UNDONE: dict[str, Callable[[Any, str], Any]] = {}
"""Changes outside of the model, as context managers."""


class NotHereError(Exception):
    """The host has nothing that could be changed in this way."""


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


def inside(model: Any, path: str, kind: type | tuple[type, ...]) -> tuple[nn.Module, str, Any]:
    """The parent, the name and the first module of a kind in a block."""
    block = model.get_submodule(path)
    for name, module in block.named_modules():
        if name and isinstance(module, kind) and len(list(module.parameters())):
            parent, _, last = name.rpartition(".")
            return block.get_submodule(parent), last, module
    raise NotHereError


def container(model: Any, path: str) -> tuple[Any, int]:
    parent, _, last = path.rpartition(".")
    found = model.get_submodule(parent)
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        raise NotHereError
    return found, int(last)


class LowRank(nn.Module):
    """A linear layer with a low-rank term that can be turned off, as adapters are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.active, self.scaling = base, True, {"default": 2.0}
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Parameter(torch.full((2, base.in_features), 0.1, **like))
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.1, **like))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.active:
            y = y + F.linear(F.linear(x, self.down), self.up) * self.scaling["default"]
        return y


class Doubles(nn.Module):
    """A module around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        returned = self.inner(*args, **kwargs)
        return returned * 2 if isinstance(returned, Tensor) else (returned[0] * 2, *returned[1:])


@change
def eps_of_a_norm(model: Any, path: str) -> None:
    inside(model, path, nn.LayerNorm)[2].eps = 0.5


@change
def another_norm(model: Any, path: str) -> None:
    parent, name, norm = inside(model, path, nn.LayerNorm)
    setattr(parent, name, nn.LayerNorm(norm.normalized_shape, eps=0.1).to(norm.weight))


@change
def an_identity_for_a_norm(model: Any, path: str) -> None:
    parent, name, _ = inside(model, path, nn.LayerNorm)
    setattr(parent, name, nn.Identity())


@change
def a_lora_layer(model: Any, path: str) -> None:
    parent, name, linear = inside(model, path, nn.Linear)
    setattr(parent, name, LowRank(linear))


@change
def a_lora_layer_turned_off(model: Any, path: str) -> None:
    a_lora_layer(model, path)
    inside(model, path, LowRank)[2].active = False


@change
def a_dict_of_scales(model: Any, path: str) -> None:
    a_lora_layer(model, path)
    model(model.example)
    inside(model, path, LowRank)[2].scaling["default"] = 0.25


@change
def a_module_around_a_block(model: Any, path: str) -> None:
    blocks, place = container(model, path)
    blocks[place] = Doubles(blocks[place])


@change
def the_last_block_deleted(model: Any, path: str) -> None:
    blocks, _ = container(model, path)
    del blocks[-1]


@change
def the_last_block_twice(model: Any, path: str) -> None:
    blocks, _ = container(model, path)
    blocks.append(blocks[-1])


@change
def blocks_in_another_order(model: Any, path: str) -> None:
    blocks, place = container(model, path)
    blocks[place], blocks[place - 1] = blocks[place - 1], blocks[place]


@change
def a_copied_block(model: Any, path: str) -> None:
    blocks, place = container(model, path)
    blocks[place] = copy.deepcopy(blocks[place - 1])


@change
def a_block_restored_from_another(model: Any, path: str) -> None:
    block = model.get_submodule(path)
    other = copy.deepcopy(block)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    block.__dict__.update(other.__dict__)


@change
def an_own_forward_of_a_block(model: Any, path: str) -> None:
    block = model.get_submodule(path)
    run = block.forward
    block.forward = lambda x, *args, **kwargs: run(x * 1.5, *args, **kwargs)


@change
def another_class_of_a_block(model: Any, path: str) -> None:
    block = model.get_submodule(path)
    kind = type(block)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, x * 0.5, *args, **kwargs)

    block.__class__ = type("Halved", (kind,), {"forward": forward})


@change
def an_activation(model: Any, path: str) -> None:
    block = model.get_submodule(path)
    for parent in block.modules():
        for name, child in parent.named_children():
            if "act" in name or isinstance(child, nn.GELU):
                setattr(parent, name, nn.Tanh())
                return
    raise NotHereError


@change
def an_unused_child(model: Any, path: str) -> None:
    model.get_submodule(path).add_module("spare", nn.Linear(2, 2))


@change
def an_attribute_that_decides(model: Any, path: str) -> None:
    attention = next(
        (m for m in model.get_submodule(path).modules() if hasattr(m, "fused_attn")), None
    )
    if attention is None:
        raise NotHereError
    attention.fused_attn = False
    attention.scale = attention.scale * 3


@change
def scaling_of_attention(model: Any, path: str) -> None:
    for module in model.get_submodule(path).modules():
        if isinstance(vars(module).get("scaling"), float):
            module.scaling = module.scaling * 3
            return
    raise NotHereError


@change
def a_weight_normed_layer(model: Any, path: str) -> None:
    parametrizations.weight_norm(inside(model, path, nn.Linear)[2])


@change
def a_pruned_layer(model: Any, path: str) -> None:
    prune.l1_unstructured(inside(model, path, nn.Linear)[2], "weight", amount=0.5)


@change
def another_parameter(model: Any, path: str) -> None:
    linear = inside(model, path, nn.Linear)[2]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


@change
def no_bias(model: Any, path: str) -> None:
    inside(model, path, nn.Linear)[2].bias = None


@change
def weights_in_place(model: Any, path: str) -> None:
    with torch.no_grad():
        inside(model, path, nn.Linear)[2].weight.mul_(2)


@change
def frozen_weights(model: Any, path: str) -> None:
    model.get_submodule(path).requires_grad_(False)


@change
def tied_weights(model: Any, path: str) -> None:
    blocks, place = container(model, path)
    left, right = inside(model, path, nn.Linear)[2], None
    for module in blocks[place - 1].modules():
        if isinstance(module, nn.Linear) and module.weight.shape == left.weight.shape:
            right = module
            break
    if right is None:
        raise NotHereError
    left.weight = right.weight


@change
def loaded_weights(model: Any, path: str) -> None:
    block = model.get_submodule(path)
    block.load_state_dict({name: value * 1.25 for name, value in block.state_dict().items()})


@change
def a_hook_that_edits(model: Any, path: str) -> None:
    def double(module: Any, args: Any, returned: Any) -> Any:
        return returned * 2 if isinstance(returned, Tensor) else (returned[0] * 2, *returned[1:])

    model.get_submodule(path).register_forward_hook(double)


@change
def a_hook_before(model: Any, path: str) -> None:
    model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: (args[0] * 0.5, *args[1:]) if args else None
    )


@change
def a_hook_of_a_leaf(model: Any, path: str) -> None:
    norm = inside(model, path, nn.LayerNorm)[2]
    norm.register_forward_hook(lambda module, args, returned: returned + 0.5)


@change
def one_block_in_training(model: Any, path: str) -> None:
    block = model.get_submodule(path)
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    block.train()


@change
def double_precision(model: Any, path: str) -> None:
    model.double()


@change
def a_new_head(model: Any, path: str) -> None:
    for name in ("head", "classifier", "fc"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            setattr(model, name, nn.Linear(head.in_features, 3).to(head.weight))
            return
    raise NotHereError


@change
def a_composite_head(model: Any, path: str) -> None:
    for name in ("head", "classifier", "fc"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            model.add_module(name, nn.Sequential(nn.Tanh(), head, nn.ReLU()))
            return
    raise NotHereError


@change
def another_pooling(model: Any, path: str) -> None:
    if getattr(model, "global_pool", None) not in ("token", "avg"):
        raise NotHereError
    model.global_pool = "avg" if model.global_pool == "token" else "token"


@change
def outputs_asked_for_by_the_config(model: Any, path: str) -> None:
    if not hasattr(model, "config"):
        raise NotHereError
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


@change
def other_attention(model: Any, path: str) -> None:
    if not hasattr(model, "set_attn_implementation"):
        raise NotHereError
    model.set_attn_implementation("eager")


@change
def a_frozen_norm_at_the_end(model: Any, path: str) -> None:
    for name in ("norm", "layernorm", "fc_norm"):
        if isinstance(getattr(model, name, None), nn.LayerNorm):
            setattr(model, name, nn.Identity())
            return
    raise NotHereError


@change
def a_buffer(model: Any, path: str) -> None:
    model.get_submodule(path).register_buffer("unread", torch.ones(3))


@change
def an_attribute_gone(model: Any, path: str) -> None:
    model.unread = 1
    model(model.example)
    del model.unread


def outside(function: Callable[[Any, str], Iterator[None]]) -> Callable[[Any, str], Any]:
    made = contextmanager(function)
    UNDONE[function.__name__] = made
    return made


@outside
def a_class_patched(model: Any, path: str) -> Iterator[None]:
    kind = type(model.get_submodule(path))
    before = kind.forward
    kind.forward = lambda self, x, *a, **k: before(self, x * 1.25, *a, **k)
    try:
        yield
    finally:
        kind.forward = before


@outside
def a_function_of_torch_patched(model: Any, path: str) -> Iterator[None]:
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *a, **k: before(*a, **k) * 2  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


@outside
def a_hook_on_every_module(model: Any, path: str) -> Iterator[None]:
    kind = type(model.get_submodule(path))

    def double(module: Any, args: Any, returned: Any) -> Any:
        if type(module) is not kind:
            return None
        return returned * 2 if isinstance(returned, Tensor) else (returned[0] * 2, *returned[1:])

    added = nn.modules.module.register_module_forward_hook(double)
    try:
        yield
    finally:
        added.remove()
