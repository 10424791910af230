"""Things that recipes call by name, which anybody can add to."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from tokenprune.errors import PlanError, RegistrationError, did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> thing.

    Args:
        what: What to call one in messages.
        group: Entry points of installed packages that name more of them; loaded by the first
            look-up, so that importing tokenprune imports none of these packages.
    """

    def __init__(self, what: str, group: str | None = None) -> None:
        self.what, self._group = what, group
        self._known: dict[str, T] = {}

    def register(self, name: str, *, replace: bool = False) -> Callable[[T], T]:
        """Decorator: make a thing known.

        Raises:
            RegistrationError: The name is taken, and `replace` is False.
        """

        def add(thing: T) -> T:
            if name in self._known and not replace:
                raise RegistrationError(
                    f"A {self.what} named {name!r} is registered already: {self._known[name]!r}. "
                    "Choose another name, or pass replace=True to put yours in its place."
                )
            self._known[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        """The thing of that name.

        Raises:
            PlanError: There is none; names the nearest.
        """
        self._load()
        if name not in self._known:
            hint = did_you_mean(name, self._known)
            raise PlanError(f"There is no {self.what} named {name!r}. {hint}")
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._known)

    def values(self) -> list[T]:
        """All things, in the order they were registered."""
        self._load()
        return list(self._known.values())

    def _load(self) -> None:
        """Once: add what other packages name, unless their import has added it."""
        group, self._group = self._group, None  # before loading, which may look things up itself
        for entry in entry_points(group=group) if group else ():
            try:
                thing = entry.load()
                if thing not in self._known.values():
                    self.register(entry.name)(thing)
            except Exception as error:  # of code that somebody else wrote
                self._group = group
                raise RegistrationError(
                    f"The {self.what} {entry.name!r} of an installed package ({entry.value}) "
                    f"cannot be loaded: {type(error).__name__}: {error}. Install another version "
                    "of that package, or remove it."
                ) from error
