"""The children of a wrapped model: those of its host, whoever changes them, and what it added."""

from collections.abc import Iterator, MutableMapping

from torch import nn

__all__ = ["Children"]


class Children(MutableMapping[str, nn.Module | None]):
    """The host's children, then those that `wrap` added."""

    def __init__(self, host: nn.Module, added: dict[str, nn.Module]) -> None:
        self._owner, self._added = host, added

    @property
    def _host(self) -> dict[str, nn.Module | None]:
        return self._owner._modules

    def __getitem__(self, name: str) -> nn.Module | None:
        return self._added[name] if name in self._added else self._host[name]

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        if name not in self._added:
            self._host[name] = module
        elif isinstance(module, nn.Module):
            self._added[name] = module
        else:
            raise TypeError(f"{name!r} is what wrap added: a module, not {module!r}.")

    def __delitem__(self, name: str) -> None:
        if name in self._added:
            raise AttributeError(f"{name!r} is what wrap added; tokenprune.unwrap goes without it.")
        del self._host[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._host, *self._added])

    def __len__(self) -> int:
        return len(self._host) + len(self._added)

    def copy(self) -> dict[str, nn.Module | None]:
        """As a plain dict."""
        return dict(self)
