"""The page of all messages, from the places in the code that raise or give them."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["page"]

HEAD = """# Every message

What each error and each warning can say, made from the code when this page was built: put a few
words of what you see into the search field. A message says what was asked, what was found, and what
to do. `…` stands for what it names of your model. What each class means is in
[errors and warnings](errors.md).
"""
HOLE = "…"


class Message(NamedTuple):
    """One text and where it is."""

    kind: str
    text: str
    where: str


def page(root: Path) -> str:
    """The page as Markdown."""
    found = sorted(set(_messages(root)))
    grouped: dict[str, list[Message]] = defaultdict(list)
    for message in found:
        grouped[message.kind].append(message)
    parts = [HEAD]
    for kind in sorted(grouped, key=lambda kind: (kind == "Warnings", kind)):
        parts.append(f"\n## {kind}\n")
        parts += [f"- {_escaped(m.text)} <small>`{m.where}`</small>" for m in grouped[kind]]
    return "\n".join(parts) + "\n"


def _messages(root: Path) -> Iterator[Message]:
    kinds = _error_classes(root)
    for folder in ("tokenprune", "adapters"):
        for path in sorted((root / folder).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue  # what `make links` draws
            where = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            constants = _constants(tree)
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                    continue
                name = node.func.id
                if name in kinds and node.args:
                    text = _text(node.args[0], constants)
                    if len(text.replace(HOLE, "").split()) > 2:
                        yield Message(name, text, where)
                elif name == "warn_once" and len(node.args) == 3:
                    head, body = (_text(argument, constants) for argument in node.args[1:])
                    yield Message("Warnings", f"{head}: {body}", where)


def _error_classes(root: Path) -> set[str]:
    trees = [root / "tokenprune" / "errors.py", root / "tokenprune" / "train" / "folders.py"]
    return {
        node.name
        for path in trees
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a file gives a name."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """What an expression says, with a hole for each value that the code puts in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return constants.get(node.id, HOLE)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants) if isinstance(node.value, ast.Name) else HOLE
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "format":
            return re.sub(r"\{[^{}]*\}", HOLE, _text(node.func.value, constants))
        if node.func.attr == "join" and node.args and isinstance(node.args[0], ast.List):
            parts = [part for part in node.args[0].elts if not isinstance(part, ast.Starred)]
            return " ".join([*(_text(part, constants) for part in parts), HOLE])
    return HOLE


def _escaped(text: str) -> str:
    """As Markdown that shows the very text, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))
