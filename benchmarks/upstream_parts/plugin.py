"""A pytest plugin: the constructor of the host under test returns the wrapped model."""

import os
from fnmatch import fnmatch
from typing import Any

import pytest

HOST, WRAPPED = os.environ.get("UPSTREAM_HOST", ""), os.environ.get("UPSTREAM_WRAPPED") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deselect-named", action="append", default=[])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = config.getoption("--deselect-named")
    names = {item: item.name.partition("[")[0] for item in items}
    items[:] = [i for i, name in names.items() if not any(fnmatch(name, p) for p in left_out)]


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("timeout", "base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript"):
        config.addinivalue_line("markers", mark)
    config.addinivalue_line("markers", "features")
    if WRAPPED and os.environ["UPSTREAM_FILE"].endswith("test_models.py"):
        import timm

        import tokenprune
        from benchmarks.upstream_parts.hosts import TIMM, recipe_of

        made = timm.create_model

        def create_model(name: str, *args: Any, **options: Any) -> Any:
            host = made(name, *args, **options)
            if name.partition(".")[0] != HOST:
                return host
            return tokenprune.wrap(host, recipe_of(TIMM[HOST]), restore=True, verify=False)

        timm.create_model = create_model
