"""The rows of the zoo are counted: one that is lost would be tested by nothing, and say nothing."""

from tests.zoo.hosts import NEWER_BLOCKS, ZOO
from tests.zoo.hosts_grid import GRID
from tokenprune.hosts.registry import list_adapters


def test_no_row_is_lost() -> None:
    for rows, count in ((ZOO, 106 + len(NEWER_BLOCKS)), (GRID, 37)):
        assert len({row.name for row in rows}) == len(rows) == count


def test_three_rows_are_refused() -> None:
    refused = {row.name for row in (*ZOO, *GRID) if row.refused}
    assert refused == {"clip_tower", "dinov3_tower", "siglip_tower"}


def test_eight_rows_are_core() -> None:
    core = {row.name for row in (*ZOO, *GRID) if row.core}
    assert core == {
        *("deit", "dinov3", "beit", "swin"),  # timm: plain, rotary, relative bias, windows
        *("vit", "siglip2", "modernbert"),  # transformers: plain, padded images, padded texts
        "visformer",  # channels first, with the recipe that `wrap` makes
    }


def test_every_adapter_has_a_row() -> None:
    assert {row.family for row in (*ZOO, *GRID)} == set(list_adapters())
