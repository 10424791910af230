"""Settings that every test shares, and which tests are slow."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

PRODUCT = Path(__file__).parent / "product"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import `product` where slow tests are left out."""
    return True if collection_path == PRODUCT and config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow: all of `product`, and tests over a toy or a row that is not a core one."""
    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        rare = any(getattr(param, "core", True) is False for param in params)
        if rare or PRODUCT in item.path.parents:
            item.add_marker(pytest.mark.slow)
