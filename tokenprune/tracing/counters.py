"""Attributes that a forward counts up and nothing reads: no reason to trace again."""

from collections.abc import Iterable, Iterator
from dis import Instruction, get_instructions
from types import CodeType

__all__ = ["only_counted"]

NOTHING = ("CACHE", "SWAP")


def only_counted(codes: Iterable[CodeType], name: str) -> bool:
    """Whether these functions read an attribute in `x.name += constant` alone.

    Args:
        codes: All that may have run.
    """
    return all(
        name not in code.co_consts and all(map(_counts, _reads(code, name))) for code in codes
    )


def _reads(code: CodeType, name: str) -> Iterator[list[Instruction]]:
    """Each read of an attribute, with the three steps that follow it."""
    steps = [step for step in get_instructions(code) if step.opname not in NOTHING]
    for place, step in enumerate(steps):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == name:
            yield steps[place : place + 4]


def _counts(steps: list[Instruction]) -> bool:
    names = [step.opname for step in steps]
    in_place = names == ["LOAD_ATTR", "LOAD_CONST", "BINARY_OP", "STORE_ATTR"]
    return in_place and steps[2].argrepr.endswith("=") and steps[3].argval == steps[0].argval
