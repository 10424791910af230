"""One process per model, with a limit of time and of memory.

The libraries are imported once, here; every model is measured in a fork of this process.
"""

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.atlas_parts.measure import Host, measure
from benchmarks.atlas_parts.row import Row

__all__ = ["Limits", "run"]

PATIENCE = 10
PAUSE = 0.05  # seconds between two polls of the processes


@dataclass(frozen=True)
class Limits:
    """Limits of one model.

    Attributes:
        seconds: CPU time. A process that waits is killed after `PATIENCE` times that.
        gigabytes: Resident memory, shared pages included.
    """

    seconds: float = 180.0
    gigabytes: float = 8.0


@dataclass
class _Running:
    host: Host
    process: Any
    result: Connection
    started: float

    def ended(self, limits: Limits) -> Row | None:
        """The row, if the process has sent it, died or exceeded a limit."""
        if self.result.poll():
            try:
                return Row.from_json(self.result.recv())
            except EOFError:  # it closed the pipe and sent nothing
                self.process.join()
                return self._killed(f"its process died with exit code {self.process.exitcode}")
        waited = time.monotonic() - self.started
        if max(_cpu_seconds(self.process.pid), waited / PATIENCE) > limits.seconds:
            return self._killed(f"time limit: not done in {limits.seconds:g} s")
        if _resident_gigabytes(self.process.pid) > limits.gigabytes:
            return self._killed(f"memory limit: more than {limits.gigabytes:g} GB")
        return None

    def stop(self) -> None:
        """End the process and wait for it."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.result.close()

    def _killed(self, reason: str) -> Row:
        row = Row(self.host.library, self.host.model, self.host.module)
        row.refuse(reason)
        row.seconds = round(time.monotonic() - self.started, 1)
        return row


def run(
    hosts: Sequence[Host],
    jobs: int,
    limits: Limits,
    starting: Callable[[Host], None] = lambda host: None,
    work: Callable[[Host], Row] = measure,
) -> Iterator[Row]:
    """Measure hosts and yield their rows as they come.

    Args:
        hosts: In the order in which they are started.
        jobs: Processes at the same time.
        starting: Called with each host when it starts.
        work: Measures one host, in a process of its own.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(hosts), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                host = waiting.pop(0)
                starting(host)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, host, theirs), daemon=True)
                process.start()
                theirs.close()
                running.append(_Running(host, process, ours, time.monotonic()))
            for one in list(running):
                row = one.ended(limits)
                if row is not None:
                    one.stop()
                    running.remove(one)
                    yield row
            time.sleep(PAUSE)
    finally:
        for one in running:
            one.stop()


def _child(work: Callable[[Host], Row], host: Host, result: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    result.send(work(host).to_json())
    result.close()


def _cpu_seconds(pid: int) -> float:
    """0 where /proc is missing or the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_gigabytes(pid: int) -> float:
    """0 where /proc is missing or the process has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
