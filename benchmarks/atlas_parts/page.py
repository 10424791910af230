"""docs/atlas.json and docs/atlas.md: all rows, and a page to read."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from benchmarks.atlas_parts.row import Row

__all__ = ["as_json", "as_page", "read_json"]

HEAD = """\
# The atlas: every attention model, certified or refused

    python -m benchmarks.atlas

wrote this page and [atlas.json](atlas.json), which has a row for every model ({versions}).

{totals}
How a row is made: the model is built at **full size** without memory for its weights, described,
traced, and its multiply-accumulates are counted for one image (clip, sound, text), dense and with
the default recipe of `tokenprune.wrap(host)`: stages at a quarter, a half and three quarters of the
blocks, which keep 0.7, 0.49 and 0.343 of the tokens (`remove`) or send 0.7, 0.5 and 0.3 of them
through the MLP (`bypass`). Then it is **verified with random weights**: at full size below 30 M
parameters and 6 GMACs, otherwise on a smaller build of the same class with the same options except
those that `certified_at` in the JSON names. Outputs that hold tokens are restored in place
(`restore=True`). Nothing is trained and nothing is downloaded.

| column | what it is |
|---|---|
| certified | models with a certificate, of all models of the family |
| adapter | that described the host; `generic` finds the blocks of any host |
| mode | `remove`: dropped tokens are removed; `bypass`: they skip the MLP |
| tokens, prefix, blocks | patch tokens at the stages, prefix tokens, blocks |
| error | the largest difference of mask and gather path, relative to the output's scale |
| keep 1 | with every token kept, the output is the host's bit for bit |
| certified at | how many at full size, how many reduced |
| GMACs | dense and pruned, of the family's smallest and largest model; counted before predictors \
were made cheaper, pruned ones are up to 0.6 % less now |
| wrap | median CPU seconds of one thread to trace and analyse the full size |
"""


def as_json(rows: Sequence[Row]) -> str:
    """A list of rows, one a line."""
    return "[\n" + ",\n".join(row.to_json() for row in rows) + "\n]\n"


def as_page(
    rows: Sequence[Row],
    expected: Counter[str],
    versions: dict[str, str],
    held_out: Sequence[Row] = (),
) -> str:
    """The page.

    Args:
        rows: In the order of the scope.
        expected: How many rows each library has in the scope.
        versions: Name -> version of what was measured.
        held_out: Rows of hosts that nothing was written for, in the order of their libraries.
    """
    parts = [
        HEAD.format(
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            totals=_totals(rows, expected),
        )
    ]
    for library in expected:
        own = [row for row in rows if row.library == library]
        if own:
            parts.append(_families(library, own))
    refused = [row for row in rows if not row.certified]
    if refused:
        parts.append(_refusals(refused))
    for library in dict.fromkeys(row.library for row in held_out):
        parts.append(_held_out(library, [row for row in held_out if row.library == library]))
    return "\n".join(parts)


def _totals(rows: Sequence[Row], expected: Counter[str]) -> str:
    lines = ["| library | models | certified | refused | share |", "|---|---|---|---|---|"]
    for library, count in expected.items():
        own = [row for row in rows if row.library == library]
        good = sum(row.certified for row in own)
        share = f"{100 * good / len(own):.1f} %" if own else ""
        missing = f" ({count - len(own)} not measured yet)" if len(own) < count else ""
        lines.append(
            f"| {library} | {len(own)}{missing} | **{good}** | {len(own) - good} | {share} |"
        )
    return "\n".join(lines) + "\n"


def _families(library: str, rows: Sequence[Row]) -> str:
    """A row per module of timm, or per class of transformers."""
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.module if library == "timm" else row.model].append(row)
    head = "module" if library == "timm" else "class"
    lines = [
        f"## {library}\n",
        f"| {head} | certified | adapter | mode | tokens | prefix | blocks | error | keep 1 "
        "| certified at | GMACs | wrap |",
        "|---" * 12 + "|",
    ]
    lines += [_family(name, family) for name, family in families.items()]
    return "\n".join(lines) + "\n"


def _family(name: str, rows: Sequence[Row]) -> str:
    good = [row for row in rows if row.certified]
    certificates = [row.certificate for row in good if row.certificate]
    full = sum(row.certified_at == "full" for row in good)
    at = [f"full {full}"] * bool(full) + [f"reduced {len(good) - full}"] * (full < len(good))
    counted = sorted((r.gmacs_dense, r.gmacs_pruned) for r in good if r.gmacs_dense is not None)
    ends = list(dict.fromkeys([*counted[:1], *counted[-1:]]))
    seconds = [row.wrap_seconds for row in good if row.wrap_seconds is not None]
    cells = [
        f"`{name}`",
        f"{len(good)} of {len(rows)}",
        _all(rows, lambda row: row.adapter),
        _all(rows, lambda row: row.mode),
        _range(row.tokens for row in good),
        _range(row.prefix for row in good),
        _range(row.blocks for row in good),
        f"{max(c['max_error'] for c in certificates):.0e}" if certificates else "",
        ("yes" if all(c["keep_one_exact"] for c in certificates) else "NO") if certificates else "",
        ", ".join(at),
        ", ".join(f"{dense:.3g} -> {pruned:.3g}" for dense, pruned in ends),
        f"{median(seconds):.1f} s" if seconds else "",
    ]
    return f"| {' | '.join(cells)} |"


def _all(rows: Iterable[Row], value: Callable[[Row], str | None]) -> str:
    return ", ".join(sorted({found for found in map(value, rows) if found}))


def _range(values: Iterable[int | None]) -> str:
    numbers = sorted({value for value in values if value is not None})
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}"


def _held_out(library: str, rows: Sequence[Row]) -> str:
    """Hosts of a library that nothing was written for: how many, and which are refused."""
    good = [row for row in rows if row.certified]
    leave = sum(row.mode != "bypass" for row in good)
    lines = [
        f"## Held out: {library}\n",
        f"{len(good)} of {len(rows)} hosts that nothing was written for are certified; tokens "
        f"leave {leave} of them. [All rows](held_out.md).",
    ]
    refused = [row for row in rows if not row.certified]
    if refused:
        lines += ["", "| refused | reason |", "|---|---|"]
        lines += [f"| `{row.model}` | {_escaped(row.reason)} |" for row in refused]
    return "\n".join(lines) + "\n"


def _refusals(rows: Sequence[Row]) -> str:
    """One line for the models that share a family and a reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        groups[row.module, row.reason].append(row.model)
    lines = ["## Refused\n", "| family | models | reason |", "|---|---|---|"]
    for (module, reason), models in groups.items():
        names = ", ".join(f"`{model}`" for model in models)
        lines.append(f"| `{module}` | {names} | {_escaped(reason)} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    for mark in ("|", "<", ">", "*", "__"):
        text = text.replace(mark, "".join(f"\\{sign}" for sign in mark))
    return text


def read_json(text: str) -> list[Row]:
    """The rows of docs/atlas.json."""
    return [Row.from_json(json.dumps(held)) for held in json.loads(text)]
