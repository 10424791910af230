"""docs/held_out.md."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.atlas_parts.row import Row
from benchmarks.held_out_parts.host import HeldOut
from benchmarks.held_out_parts.measure import ABSENT, MERGING, RAW
from benchmarks.markdown import table

__all__ = ["as_page"]

PACKAGES = (
    "torch",
    "vit-pytorch",
    "x-transformers",
    "open_clip_torch",
    "kornia",
    "monai",
    "transformers",
)
TITLES = {
    "vit_pytorch": "vit-pytorch",
    "by_hand": "torch's encoders, and hosts written by hand",
    "libraries": "Other libraries",
    "composites": "Composites of transformers",
}


def as_page(
    parts: Mapping[str, Sequence[HeldOut]], rows: Mapping[tuple[str, str], Row], before: str
) -> str:
    """The whole page. Versions of what is not installed here are those of the page `before`."""
    return "\n".join(_lines(parts, rows, before)) + "\n"


def _lines(
    parts: Mapping[str, Sequence[HeldOut]], rows: Mapping[tuple[str, str], Row], before: str
) -> Iterator[str]:
    yield "# Hosts that nothing was written for"
    yield ""
    yield (
        "Classes of other libraries and hosts written by hand, none of them in the tests: built "
        "small, with random weights, and wrapped without an adapter. *Certified* means that "
        "`wrap` has proven: with every token kept it is the host bit for bit, the mask path is the "
        "gather path, an image alone is as in a batch. Made by `python -m benchmarks.held_out` "
        f"({_versions(before)}; one thread of a shared CPU)."
    )
    yield ""
    head = ["part", "hosts measured", "certified", "tokens leave", MERGING, "refused", "raw"]
    yield table(head, [_sums(TITLES[part], _found(h, rows)) for part, h in parts.items()])
    for part, hosts in parts.items():
        if not _found(hosts, rows):
            continue
        yield ""
        yield f"## {TITLES[part]}"
        yield ""
        head = ["host", "result", "blocks", "prefix", "stages at", "merging"]
        yield table(head, [_line(row) for row in _found(hosts, rows)])
        absent = [h.model for h in hosts if _status(h, rows) == ABSENT]
        if absent:
            yield ""
            yield f"Not run, since their library cannot build or run them: {', '.join(absent)}."


def _sums(title: str, found: Sequence[Row]) -> list[str]:
    good = [row for row in found if row.certified]
    leave = sum(row.mode != "bypass" for row in good)
    merged = sum(row.certified_at is not None for row in good)
    raw = sum(row.status == RAW for row in found)
    share = f"{len(good)} ({len(good) / max(len(found), 1):.2f})"
    numbers = (len(found), share, leave, merged, len(found) - len(good) - raw, raw)
    return [title, *map(str, numbers)]


def _line(row: Row) -> list[str]:
    name = f"`{row.model}`" if row.library == "vit-pytorch" else f"{row.library}: {row.model}"
    if not row.certified:
        return [name, f"{row.status}: {_cell(row.reason)}", "", "", "", ""]
    merging, stages = "yes" if row.certified_at else "no", ", ".join(map(str, row.stages))
    return [name, str(row.mode), str(row.blocks), str(row.prefix), stages, merging]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:400]


def _found(hosts: Sequence[HeldOut], rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    known = [rows[h.library, h.model] for h in hosts if (h.library, h.model) in rows]
    return [row for row in known if row.status != ABSENT]


def _status(host: HeldOut, rows: Mapping[tuple[str, str], Row]) -> str:
    row = rows.get((host.library, host.model))
    return row.status if row else ""


def _versions(before: str) -> str:
    def known(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            said = re.search(rf"[( ]({re.escape(name)} [\w.+]+)[,;]", before)
            return said[1] if said else f"{name} absent"

    return ", ".join(map(known, PACKAGES))
