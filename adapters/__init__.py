"""Architecture adapters: facts about families of hosts; installed as `tokenprune.adapters`.

Every module here whose name has no leading underscore holds `ADAPTERS`: `timm_families` and
`transformers_families` are tables with one row a family, and a family that needs more has its own
file. None of them imports timm or transformers: a host is known by the names of its classes.
"""

if __name__ != "tokenprune.adapters":
    raise ImportError(
        f"This folder was imported as {__name__!r}. Import `tokenprune.adapters`: under another "
        "name the same files would be loaded a second time."
    )

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from tokenprune.hosts.registry import register_adapter

__all__ = ["register_all"]


@cache
def register_all() -> None:
    """Register the shipped adapters in the order of their names; a second call does nothing."""
    names = [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]
    modules = [import_module(f"{__name__}.{name}") for name in names]
    shipped = [adapter for module in modules for adapter in module.ADAPTERS]
    for adapter in sorted(shipped, key=lambda adapter: adapter.name):
        register_adapter(adapter)
