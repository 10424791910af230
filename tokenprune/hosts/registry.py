"""The registry of adapters, and `describe`, which asks the one that matches a host.

Adapters hold facts and never touch a graph. The shipped ones are in `adapters/`; other packages
register theirs through the entry-point group `tokenprune.adapters`.
"""

from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from torch import nn

from tokenprune.errors import AdapterError, UnknownAdapterError, UnsupportedHostError, did_you_mean
from tokenprune.hosts.spec import ArchSpec

__all__ = [
    "Adapter",
    "describe",
    "hints",
    "list_adapters",
    "register_adapter",
    "stated_by",
    "tower_of",
]

ENTRY_POINTS = "tokenprune.adapters"
GENERIC = "generic"
STATED = "num_prefix_tokens"
"""The attribute by which hosts of timm, and others, say how many prefix tokens they have."""


@runtime_checkable
class Adapter(Protocol):
    """Describes the hosts of one family."""

    @property
    def name(self) -> str:
        """Unique, such as `timm/vision_transformer`."""
        ...

    def matches(self, host: nn.Module) -> bool:
        """Whether `host` is of this family; must not import a library the host does not use."""
        ...

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts; raises `UnsupportedHostError` with the reason if it cannot tell them."""
        ...


_registry: dict[str, Adapter] = {}
_loaded = False


def register_adapter(adapter: Adapter, *, replace: bool = False) -> None:
    """Make `adapter` known; adapters registered later are asked first.

    Args:
        adapter: An object with a `name`, `matches(host)` and `describe(host)`.
        replace: Put it in the place of one of that name.

    Raises:
        AdapterError: The name is taken (and `replace` is False), or it is no adapter.
    """
    _load_all()
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"{adapter!r} is no adapter: it needs a `name` and the methods matches(host) and "
            "describe(host)."
        )
    if adapter.name in _registry and not replace:
        raise AdapterError(
            f"An adapter named {adapter.name!r} is registered already. Give yours another name, or "
            "pass replace=True to put it in that one's place."
        )
    _registry.pop(adapter.name, None)
    _registry[adapter.name] = adapter


def _load_all() -> None:
    """Register the shipped and the third-party adapters, once, before any other."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    import tokenprune.adapters

    tokenprune.adapters.register_all()
    try:
        for entry in entry_points(group=ENTRY_POINTS):
            register_adapter(entry.load())
    except BaseException:  # the next look-up says so too, and does not go on with half of them
        _registry.clear()
        _loaded = False
        raise


def list_adapters() -> list[str]:
    """Names of all adapters, shipped and third-party."""
    _load_all()
    return sorted(_registry)


def describe(host: nn.Module, adapter: str | ArchSpec | None = None) -> ArchSpec:
    """The facts about `host` that its modules tell.

    Args:
        adapter: An adapter's name, or the facts themselves; found by itself if None.

    Raises:
        UnknownAdapterError: No adapter has that name.
        UnsupportedHostError: The adapter cannot describe this host, or knows no module that is a
            block of it. `wrap` then looks for blocks in the traced graph.
    """
    spec = _said(host, adapter)
    if not spec.blocks:
        raise UnsupportedHostError(
            f"Adapter {spec.adapter!r} found no stack of transformer blocks in "
            f"{type(host).__name__}: {'; '.join(spec.notes) or 'it names none'}. tokenprune.wrap "
            "looks for them in the traced graph; to name them, pass adapter=ArchSpec(blocks=...)."
        )
    return spec


def hints(host: nn.Module, adapter: str | ArchSpec | None = None) -> ArchSpec:
    """What is known of `host` before it is traced: `describe`, but perhaps without blocks.

    Where the adapter of its family cannot describe it and none was asked for, the generic one does.
    """
    try:
        return _said(host, adapter)
    except UnsupportedHostError:
        if adapter is not None or _adapter(host, None).name == GENERIC:
            raise
        return _said(host, GENERIC)


def _said(host: nn.Module, adapter: str | ArchSpec | None) -> ArchSpec:
    """What an adapter says, if the host has the modules that it names."""
    spec = adapter if isinstance(adapter, ArchSpec) else _adapter(host, adapter).describe(host)
    paths = dict(host.named_modules())
    missing = [path for path in (*spec.blocks, *filter(None, [spec.norm])) if path not in paths]
    if missing:
        raise UnsupportedHostError(
            f"Adapter {spec.adapter!r} names modules that {type(host).__name__} does not have: "
            f"{missing}. Pass adapter=ArchSpec(...) with the right paths."
        )
    return spec


def tower_of(host: nn.Module) -> str:
    """Path of the outermost module inside `host` that an adapter of a family describes and that
    takes images: the tower of a vision-language model. Empty if there is none."""
    for path, module in list(host.named_modules())[1:]:
        try:
            spec = None if _adapter(module, None).name == GENERIC else describe(module)
        except UnsupportedHostError:
            continue
        if spec is not None and any(len(e.shape) == 3 for e in spec.inputs.values()):
            return str(path)
    return ""


def stated_by(host: nn.Module, spec: ArchSpec) -> list[tuple[nn.Module, str]]:
    """Where a host may state a fact that adapters read and its forward need not: the modules
    around its blocks, each with the attribute's name."""
    path, around = next(iter(spec.blocks), ""), [host]
    while path := path.rpartition(".")[0]:
        around.append(host.get_submodule(path))
    return [(module, STATED) for module in around]


def _adapter(host: nn.Module, name: str | None) -> Adapter:
    _load_all()
    if name is None:
        others = (one for one in reversed(_registry.values()) if one.name != GENERIC)
        return next((one for one in others if one.matches(host)), _registry[GENERIC])
    if name not in _registry:
        raise UnknownAdapterError(f"No adapter is named {name!r}. {did_you_mean(name, _registry)}")
    return _registry[name]
