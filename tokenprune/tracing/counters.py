"""What code says of attributes: that they are counted up and nothing reads them, so are no reason
to trace again; that lists only grow."""

from collections.abc import Callable, Iterable, Iterator
from dis import Instruction, get_instructions, opmap
from itertools import pairwise
from types import CodeType

__all__ = ["only_counted", "only_grown", "sets_around", "sets_globally", "takes_out", "trims"]

TAKE = {"clear", "pop", "popleft", "popitem", "remove", "discard"}
MOVE = {"insert", "appendleft", "extendleft", "reverse", "sort", "rotate"}
GROW = {"append", "add", "extend", "update"}
KEY = ("LOAD_CONST", "LOAD_FAST")
NOTHING = ("CACHE", "SWAP")


def only_counted(codes: Iterable[CodeType], name: str) -> bool:
    """Whether these functions read an attribute in `x.name += constant` alone.

    Args:
        codes: All that may have run.
    """
    return _only(_counts, codes, name)


def only_grown(codes: Iterable[CodeType], name: str) -> bool:
    """Whether these functions read an attribute in `x.name.append(...)`, `x.name[key] = ...` and
    the like alone.

    Args:
        codes: All that may have run.
    """
    return _only(_grows, codes, name)


def trims(codes: Iterable[CodeType], name: str) -> bool:
    """Whether any of these functions takes single things out of `x.name`, or changes its order."""
    return any(_takes(steps) for code in codes for steps in _reads(code, name))


def sets_around(code: CodeType) -> list[str]:
    """The names of the functions around it that some code sets (`nonlocal`)."""
    return [n for n in _set_by(code, "STORE_DEREF") if n in code.co_freevars]


def sets_globally(code: CodeType) -> list[str]:
    """The names of its file that some code sets (`global`)."""
    return _set_by(code, "STORE_GLOBAL")


def _set_by(code: CodeType, step: str) -> list[str]:
    if opmap[step] not in code.co_code[::2]:  # most code: it is not taken apart
        return []
    return [one.argval for one in get_instructions(code) if one.opname == step]


def _takes(steps: list[Instruction]) -> bool:
    called = len(steps) > 1 and steps[1].argval in (TAKE | MOVE) - {"clear"}
    names = [step.opname for step in steps[1:]]
    if "DELETE_SUBSCR" not in names:
        return called
    before = names[: names.index("DELETE_SUBSCR")]
    return called or all(name in (*KEY, "BUILD_SLICE", "UNARY_NEGATIVE") for name in before)


def _only(fits: Callable[[list[Instruction]], bool], codes: Iterable[CodeType], name: str) -> bool:
    return all(name not in code.co_consts and all(map(fits, _reads(code, name))) for code in codes)


def takes_out(codes: Iterable[CodeType]) -> bool:
    """Whether any of these functions may take something out of a list, dict or set."""
    return any(
        not TAKE.isdisjoint(code.co_names)
        or any(a == "BUILD_SLICE" and b.startswith("STORE") for a, b in pairwise(_steps(code)))
        or not {"DELETE_SUBSCR", "STORE_SLICE"}.isdisjoint(_steps(code))
        for code in codes
    )


def _steps(code: CodeType) -> list[str]:
    return [step.opname for step in get_instructions(code)]


def _reads(code: CodeType, name: str) -> Iterator[list[Instruction]]:
    """Each read of an attribute, with the five steps that follow it."""
    steps = [step for step in get_instructions(code) if step.opname not in NOTHING]
    for place, step in enumerate(steps):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == name:
            yield steps[place : place + 6]


def _grows(steps: list[Instruction]) -> bool:
    follows = steps[1:3]
    if len(follows) < 2:
        return False
    called = follows[0].opname in ("LOAD_METHOD", "LOAD_ATTR") and follows[0].argval in GROW
    return called or (follows[0].opname in KEY and follows[1].opname == "STORE_SUBSCR")


def _counts(steps: list[Instruction]) -> bool:
    names = [step.opname for step in steps]
    in_place = names[:4] == ["LOAD_ATTR", "LOAD_CONST", "BINARY_OP", "STORE_ATTR"]
    return in_place and steps[2].argrepr.endswith("=") and steps[3].argval == steps[0].argval
