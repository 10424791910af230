"""Hosts that no adapter and no test of this project knows: how many can be wrapped and proven.

    pip install --no-deps vit-pytorch einops einx x-transformers open_clip_torch kornia \
        kornia_rs monai segment-anything ftfy wcwidth loguru frozendict torch-einops-utils
    python -m benchmarks.held_out                            all parts, about an hour on one core
    python -m benchmarks.held_out --part vit_pytorch --only 'cait*'
    python -m benchmarks.held_out --render-only              write the page from the rows so far

Each host is built small with random weights and wrapped with the default recipe and with
`merge-k0.7`. `wrap` proves: with every token kept it is the host, bit for bit; the mask path is the
gather path; an image alone is as in a batch. Rows are saved in a work folder one by one.
"""

import argparse
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks.atlas import Store, published
from benchmarks.atlas_parts.page import as_json
from benchmarks.atlas_parts.pool import Limits, run
from benchmarks.held_out_parts.host import HeldOut
from benchmarks.held_out_parts.measure import ABSENT, measure
from benchmarks.held_out_parts.page import as_page

__all__ = ["PARTS", "main"]

ROOT = Path(__file__).parents[1]
PARTS = ("vit_pytorch", "by_hand", "libraries", "composites")


def hosts(parts: Sequence[str]) -> dict[str, list[HeldOut]]:
    """Part -> its hosts; a part whose library is missing says so when it is measured."""
    return {p: list(import_module(f"benchmarks.held_out_parts.{p}").hosts()) for p in parts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="one part; all if left out")
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--again", action="store_true", help="measure rows that are there too")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "held_out")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args(arguments)
    console, store = Console(), Store(asked.work)
    everything = hosts(PARTS)
    if not asked.render_only:
        wanted = [h for part in asked.part or PARTS for h in everything[part]]
        wanted = [h for h in wanted if fnmatch(h.model, asked.only)]
        if not asked.again:
            wanted = [h for h in wanted if (h.library, h.model) not in store.rows]
        console.print(f"{len(wanted)} hosts to measure, {len(store.rows)} rows are there")
        for row in run(wanted, asked.jobs, Limits(seconds=300.0), work=measure):
            store.add(row)
            console.print(f"{row.status:<10} {row.library} {row.model} {row.reason[:120]}")
    before = published(ROOT / "docs" / "held_out.json")  # stays where a library is missing here
    new = {k: row for k, row in store.rows.items() if row.status != ABSENT or k not in before}
    rows = before | new
    page = ROOT / "docs" / "held_out.md"
    page.write_text(as_page(everything, rows, page.read_text() if page.exists() else ""))
    ordered = [rows.get((h.library, h.model)) for found in everything.values() for h in found]
    known = [row for row in ordered if row is not None]
    (ROOT / "docs" / "held_out.json").write_text(as_json(known))
    console.print("docs/held_out.md and .json are written; the atlas reads them")


if __name__ == "__main__":
    main()
