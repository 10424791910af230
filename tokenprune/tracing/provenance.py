"""Where in the host a node comes from; what error messages speak of."""

import sys
import sysconfig
from functools import cache
from linecache import getline
from traceback import walk_tb
from types import CodeType, FrameType
from typing import NamedTuple

__all__ = ["Drawn", "Provenance", "failed_at", "frame_of_host", "of_host", "of_python"]

OWN_FILES = ("/torch/", "/tokenprune/", "numpy/")
STANDARD, INSTALLED = sysconfig.get_paths()["stdlib"], ("site-packages", "dist-packages")


class Provenance(NamedTuple):
    """A line of the host's source, in the forward of `module` ("" for the host itself)."""

    module: str
    file: str
    line: int

    def __str__(self) -> str:
        where = f"module '{self.module}'" if self.module else "the host's own forward"
        return f"{where} ({self.file}:{self.line}: {getline(self.file, self.line).strip()})"


def frame_of_host(caller: CodeType) -> tuple[FrameType, bool]:
    """The innermost frame of the host's source that is running, and whether `caller`, which calls
    the host, is further out: else it is that of who called us."""
    frame, inside = sys._getframe(1), True
    while frame.f_back is not None and not of_host(frame.f_code.co_filename):
        inside = inside and frame.f_code is not caller
        frame = frame.f_back
    return frame, inside


def failed_at(error: BaseException, module: str) -> Provenance:
    """The innermost line of the host's source that led to `error`, in the forward of `module`."""
    frames = [(f.f_code.co_filename, n) for f, n in walk_tb(error.__traceback__)]
    file, line = next((f for f in reversed(frames) if of_host(f[0])), frames[-1])
    return Provenance(module, file, line)


@cache
def of_host(file: str) -> bool:
    """Whether a source file is not Python's, NumPy's, torch's or ours."""
    ours = any(part in file for part in OWN_FILES)
    return not (ours or of_python(file) or file.startswith("<"))


@cache
def of_python(file: str) -> bool:
    """Whether a source file is of Python's own library."""
    return file.startswith(STANDARD) and not any(part in file for part in INSTALLED)


class Drawn(NamedTuple):
    """Which generator a host drew from, and the line that did."""

    generator: str
    where: tuple[str, int]
