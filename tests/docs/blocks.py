"""The code blocks of a page: which run, and which do not and why.

A block that does not run has a comment on the line before it, which no reader sees:
`<!-- not run: the reason -->`. It must compile all the same.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "blocks_of"]

FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)")
MARK = re.compile(r"\s*<!-- not run: (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        language: `python`, `bash`, `yaml`, ...; empty for plain text.
        code: Without the indentation of the fence.
        line: Of its first line in the page, counted from 1.
        reason: Why it does not run; None if it does.
    """

    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """All blocks in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        indent, first = len(fence["indent"]), number + 1
        mark = MARK.fullmatch(lines[number - 1]) if number else None
        number = next(n for n in range(first, len(lines)) if lines[n].strip() == "```")
        code = "\n".join(line[indent:] for line in lines[first:number]) + "\n"
        yield Block(fence["language"], code, first + 1, mark["reason"] if mark else None)
        number += 1
