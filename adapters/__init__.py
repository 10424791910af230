"""Architecture adapters: facts about hosts, a file a family; installed as `tokenprune.adapters`.

Every module here whose name has no leading underscore holds an `ADAPTER`. None of them imports timm
or transformers: a host is known by the names of its classes.
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
    """Register the shipped adapters; a second call does nothing.

    Raises:
        AdapterError: A name is taken already.
    """
    for module in sorted(module.name for module in iter_modules(__path__)):
        if not module.startswith("_"):
            register_adapter(import_module(f"{__name__}.{module}").ADAPTER)
