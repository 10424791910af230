"""What is tested here looks for objects that this folder's files hold: nothing is frozen."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def unfrozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.freeze()
