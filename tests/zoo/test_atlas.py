"""Every family that the atlas calls certified has a tiny host here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from tests.zoo.hosts import ZOO
from tests.zoo.hosts_grid import GRID

ATLAS = Path(__file__).parents[2] / "docs" / "atlas.json"


def families(host: nn.Module) -> set[tuple[str, str]]:
    """The names under which the atlas may know a host: its registry module, or its class's."""
    found = {
        (library, rest.rpartition(".")[2].removeprefix("modeling_"))
        for library, _, rest in (
            kind.__module__.partition(".models.") for kind in type(host).__mro__
        )
        if rest and library in ("timm", "transformers")
    }
    name = (getattr(host, "pretrained_cfg", None) or {}).get("architecture")
    if name and timm.is_model(name):
        found.add(("timm", timm.models.model_entrypoint(name).__module__.rpartition(".")[2]))
    return found


def without_a_row(atlas: Iterable[dict[str, Any]], hosts: Iterable[nn.Module]) -> set[str]:
    """Certified families of the atlas that no host belongs to."""
    covered = {family for host in hosts for family in families(host)}
    certified = {(row["library"], row["module"]) for row in atlas if row["status"] == "certified"}
    return {"/".join(family) for family in certified - covered}


def test_a_family_without_a_row_is_found() -> None:
    deit = timm.create_model("deit_tiny_patch16_224", depth=1)
    rows = [
        {"library": "timm", "module": "deit", "status": "certified"},
        {"library": "timm", "module": "vision_transformer", "status": "certified"},
        {"library": "timm", "module": "focalnet", "status": "refused"},
        {"library": "transformers", "module": "deit", "status": "certified"},
    ]
    assert without_a_row(rows, [deit]) == {"transformers/deit"}


@pytest.mark.slow
def test_every_certified_family_has_a_row() -> None:
    rows = json.loads(ATLAS.read_text())
    missing = without_a_row(rows, (row.build() for row in (*ZOO, *GRID)))
    assert not missing, f"add rows to tests/zoo for {sorted(missing)}"
