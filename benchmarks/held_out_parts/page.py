"""docs/held_out.md."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.atlas_parts.row import Row
from benchmarks.held_out_parts.host import HeldOut
from benchmarks.held_out_parts.measure import ABSENT, MERGING, RAW

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


def as_page(parts: Mapping[str, Sequence[HeldOut]], rows: Mapping[tuple[str, str], Row]) -> str:
    """The whole page."""
    return "\n".join(_lines(parts, rows)) + "\n"


def _lines(
    parts: Mapping[str, Sequence[HeldOut]], rows: Mapping[tuple[str, str], Row]
) -> Iterator[str]:
    yield "# Hosts that nothing was written for"
    yield ""
    yield (
        "Classes of other libraries and hosts written by hand, none of them in the tests: built "
        "small, with random weights, and wrapped without an adapter. *Certified* means that "
        "`wrap` has proven: with every token kept it is the host bit for bit, the mask path is the "
        "gather path, an image alone is as in a batch. Made by `python -m benchmarks.held_out` "
        f"({_versions()}; one thread of a shared CPU)."
    )
    yield ""
    yield f"| part | hosts | certified | tokens leave | {MERGING} | refused | raw |"
    yield "|---|---|---|---|---|---|---|"
    for part, hosts in parts.items():
        found = _found(hosts, rows)
        good = [row for row in found if row.certified]
        leave = sum(row.mode != "bypass" for row in good)
        merged = sum(row.certified_at is not None for row in good)
        raw = sum(row.status == RAW for row in found)
        refused = len(found) - len(good) - raw
        share = f"{len(good)} ({len(good) / max(len(found), 1):.2f})"
        yield f"| {TITLES[part]} | {len(found)} | {share} | {leave} | {merged} | {refused} | {raw} |"
    for part, hosts in parts.items():
        yield ""
        yield f"## {TITLES[part]}"
        yield ""
        yield "| host | result | blocks | prefix | stages at | merging |"
        yield "|---|---|---|---|---|---|"
        for row in _found(hosts, rows):
            name = (
                f"`{row.model}`" if row.library == "vit-pytorch" else f"{row.library}: {row.model}"
            )
            if row.certified:
                merging = "yes" if row.certified_at else "no"
                stages = ", ".join(map(str, row.stages))
                yield f"| {name} | {row.mode} | {row.blocks} | {row.prefix} | {stages} | {merging} |"
            else:
                yield f"| {name} | {row.status}: {_cell(row.reason)} | | | | |"
        absent = [h.model for h in hosts if _status(h, rows) == ABSENT]
        if absent:
            yield ""
            yield f"Not run, since the library itself cannot build or run them: {', '.join(absent)}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:400]


def _found(hosts: Sequence[HeldOut], rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    known = [rows[h.library, h.model] for h in hosts if (h.library, h.model) in rows]
    return [row for row in known if row.status != ABSENT]


def _status(host: HeldOut, rows: Mapping[tuple[str, str], Row]) -> str:
    row = rows.get((host.library, host.model))
    return row.status if row else ""


def _versions() -> str:
    def known(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} absent"

    return ", ".join(map(known, PACKAGES))
