"""A report in one HTML file, with its pictures and style embedded."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tokenprune.report.table import Table

__all__ = ["Bars", "Picture", "Text", "write_html"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --line: #d8dce2; --fill: #2f6fb7;
        --pale: #c9d6e6; --ground: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3af; --line: #3a4049; --fill: #6aa5e8; --pale: #33465c;
          --ground: #16191d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; } .note { color: var(--soft); font-size: .9rem; white-space: pre-line; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.wide { overflow-x: auto; } img { max-width: 100%; background: #fff; border-radius: 4px; }
.bar { position: relative; width: 16rem; max-width: 40vw; height: .8rem; }
.bar span { position: absolute; left: 0; top: 0; bottom: 0; background: var(--pale); }
.bar span + span { background: var(--fill); }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Picture:
    """The contents of a PNG file, with a heading and a description, also its alternative text."""

    title: str
    png: bytes
    description: str


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on one scale; the value before is pale."""

    title: str
    rows: tuple[tuple[str, float, float, str], ...]  # label, value, value before, text beside it
    note: str = ""


def write_html(
    path: str | os.PathLike[str], title: str, blocks: Sequence[Text | Table | Picture | Bars]
) -> Path:
    """Write a report, of which all text is escaped, and return its path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(_block(block) for block in blocks)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    target.write_text(page, encoding="utf-8")
    return target


def _block(block: Text | Table | Picture | Bars) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    heading = f"<h2>{escape(block.title)}</h2>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        shown = f'<img src="data:image/png;base64,{data}" alt="{escape(block.description)}">'
        return f'{heading}\n{shown}\n<p class="note">{escape(block.description)}</p>'
    inside = _table(block) if isinstance(block, Table) else _bars(block)
    note = f'\n<p class="note">{escape(block.note)}</p>' if block.note else ""
    return f'{heading}\n<div class="wide"><table>\n{inside}\n</table></div>{note}'


def _table(table: Table) -> str:
    return "\n".join([_row("th", table.columns), *(_row("td", row) for row in table.rows)])


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _bars(bars: Bars) -> str:
    longest = max((max(value, before) for _, value, before, _ in bars.rows), default=0) or 1
    lines = []
    for label, value, before, text in bars.rows:
        pale, full = (f"{100 * part / longest:.1f}%" for part in (before, value))
        lines.append(
            f'<tr><td>{escape(label)}</td><td><div class="bar"><span style="width:{pale}"></span>'
            f'<span style="width:{full}"></span></div></td><td>{escape(text)}</td></tr>'
        )
    return "\n".join(lines)
