"""Markdown for the pages that the benchmarks write."""

import re
from pathlib import Path

__all__ = ["carry", "put", "table"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(page: Path, part: str, content: str) -> None:
    """Replace what is between the marks of a part, `<!-- part -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {part} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{page.name} has not exactly one part marked '{part}'")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text))


def carry(old: str, new: str) -> str:
    """A new page with the marked parts of the old one, which other benchmarks have written."""
    pattern = re.compile(r"<!-- (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
    parts = dict(pattern.findall(old))
    return pattern.sub(
        lambda match: f"<!-- {match[1]} -->\n{parts.get(match[1], match[2])}<!-- end -->", new
    )
