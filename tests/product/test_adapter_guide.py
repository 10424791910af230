"""docs/adapters.md: one screen, and true."""

import re
from dataclasses import fields
from pathlib import Path

from torch import nn

from tokenprune.hosts.registry import ENTRY_POINTS, Adapter
from tokenprune.hosts.spec import ArchSpec

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adapters.md").read_text()


def test_it_fits_a_screen() -> None:
    assert len(GUIDE.splitlines()) <= 80


def test_it_explains_every_fact() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE))
    assert explained == {field.name for field in fields(ArchSpec)} - {"adapter"}


def test_its_adapter_is_one() -> None:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "class " in c)
    names: dict[str, object] = {}
    exec(code, names)
    adapter = names["ADAPTER"]
    assert isinstance(adapter, Adapter)
    host = nn.Module()
    host.layers = nn.ModuleList(nn.Identity() for _ in range(2))
    host.num_registers, host.image_size = 4, 32
    assert not adapter.matches(host)
    spec = adapter.describe(host)
    assert spec.blocks == ("layers.0", "layers.1")
    assert spec.num_prefix_tokens == 5
    assert spec.inputs["images"].shape == (3, 32, 32)


def test_it_names_the_entry_point_group_and_files_that_exist() -> None:
    assert f'[project.entry-points."{ENTRY_POINTS}"]' in GUIDE
    for path in re.findall(r"`((?:adapters|tests)/[\w/]+\.py)`", GUIDE):
        assert (ROOT / path).exists(), path
