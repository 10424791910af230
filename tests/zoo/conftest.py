"""All tests of this folder are marked `zoo`, and run host by host: each host is wrapped once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort this folder's tests by the row they are about, keeping their order otherwise."""
    places = [i for i, item in enumerate(items) if item.path.parent == HERE]
    ours = [items[i] for i in places]
    rows: dict[str, int] = {}
    for item in ours:
        item.add_marker(pytest.mark.zoo)
        rows.setdefault(_row(item), len(rows))
    for place, item in zip(places, sorted(ours, key=lambda item: rows[_row(item)]), strict=True):
        items[place] = item


def _row(item: pytest.Item) -> str:
    params = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    return params["row"].name if "row" in params else ""


@pytest.fixture(autouse=True, scope="session")
def no_mha_fastpath() -> Iterator[None]:
    """torch's fused kernel for `nn.MultiheadAttention` in eval rounds otherwise than the modules it
    stands for; the graph is compared with the modules, bit for bit."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(was)
