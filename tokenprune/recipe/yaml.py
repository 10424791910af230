"""Strict YAML for recipes: safe, no tags, no repeated keys, plain scalars of YAML 1.2.

YAML 1.1 reads `no` as false, `1e-3` as text and `1:30` as ninety. Recipes are read and written by
the YAML 1.2 core schema, where `no` is text and `1e-3` a number; a whole number with a leading zero
is text.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tokenprune.errors import RecipeError

__all__ = ["dump_yaml", "load_yaml"]

# tag, pattern of its plain scalars, their possible first characters
_PLAIN_SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the plain scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML treats these as line ends and folds them into spaces unless they are escaped
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

for _tag, _pattern, _first in _PLAIN_SCALARS:
    _scalar = re.compile(_pattern + r"\Z")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _scalar, _first)


def load_yaml(text: str, where: str = "the recipe") -> Any:
    """Read one YAML document; `where` is what error messages call it.

    Raises:
        RecipeError: it is not YAML, nests too deeply, or holds a tag, a repeated key or more than
            one document. Every tag, or else every repeated key, is reported.
    """
    try:
        if tags := list(_tags(text)):
            raise RecipeError(f"YAML tags are not allowed in {where}; remove them:", tags)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if repeated := list(_repeated_keys(node, (), set())):
                raise RecipeError(f"A key is given twice in {where}; keep one of each:", repeated)
            return _construct(loader, node, where)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise RecipeError(f"No valid YAML in {where}; change it there: {error}") from error
    except RecursionError:
        raise RecipeError(f"Lists or mappings nest too deeply in {where}. Write fewer.") from None


def dump_yaml(value: Any) -> str:
    """Write plain dicts, lists and scalars as YAML that `load_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _tags(text: str) -> Iterator[str]:
    for event in yaml.parse(text, Loader=_Loader):
        if (tag := getattr(event, "tag", None)) is not None:
            yield f"{_line(event.start_mark)}: tag {tag!r}"


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def _repeated_keys(node: yaml.Node, path: tuple[str, ...], done: set[int]) -> Iterator[str]:
    if id(node) in done:  # an alias: the same node again, or a node inside itself
        return
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _repeated_keys(child, (*path, str(index)), done)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            name = str(key.value)
            if name in seen:
                yield f"{'.'.join((*path, name))}: given again in {_line(key.start_mark)}"
            seen.add(name)
            yield from _repeated_keys(child, (*path, name), done)


def _construct(loader: _Loader, node: yaml.Node, where: str) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # a whole number with more digits than int() accepts
        raise RecipeError(f"A number in {where} cannot be read; change it: {error}") from error
