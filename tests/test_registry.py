"""Registries: names of installed packages are found at the first look-up."""

from importlib.metadata import EntryPoint

import pytest

from tokenprune.errors import RegistrationError
from tokenprune.registry import Registry

GROUP = "tokenprune.things"


def installed(monkeypatch: pytest.MonkeyPatch, **entries: str) -> list[str]:
    """Entry points of packages that look installed; what the registry asked for."""
    asked: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint(name, value, group) for name, value in entries.items()]

    monkeypatch.setattr("tokenprune.registry.entry_points", entry_points)
    return asked


def test_entry_points_are_loaded_once_when_something_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = installed(monkeypatch, counter="collections:Counter")
    registry = Registry[object]("thing", group=GROUP)
    registry.register("own")(dict)
    assert asked == []
    assert list(registry) == ["own", "counter"]
    assert registry["counter"] is __import__("collections").Counter
    assert "own" in registry
    assert asked == [GROUP]


def test_an_entry_that_its_own_import_registers_is_there_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, other="builtins:dict")
    registry = Registry[object]("thing", group=GROUP)
    registry.register("own")(dict)
    assert list(registry) == ["own"]


def test_two_packages_with_one_name_are_refused_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("one", f"builtins:{name}", GROUP) for name in ("dict", "list")]
    monkeypatch.setattr("tokenprune.registry.entry_points", lambda group: entries)
    registry = Registry[object]("thing", group=GROUP)
    for _ in range(2):
        with pytest.raises(RegistrationError, match=r"builtins:list.*named 'one' is registered"):
            list(registry)


@pytest.mark.parametrize("value", ["collections:Missing", "no_such_package:thing"])
def test_an_entry_that_cannot_be_loaded_is_named_each_time(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    installed(monkeypatch, broken=value)
    registry = Registry[object]("thing", group=GROUP)
    for _ in range(2):
        with pytest.raises(
            RegistrationError, match=rf"thing 'broken' of an installed package \({value}\) cannot"
        ):
            registry["own"]
