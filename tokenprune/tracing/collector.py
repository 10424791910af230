"""Python's collector of reference cycles, while a host is traced."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leave automatic collections out.

    A trace makes many objects that stay, so the collector would look through all of the process
    again and again. The switch is the whole process's: where several
    threads pause it, the first that is done ends the pause.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
