"""What tests do with processes: wait for them, find who descends from whom, and see who is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

SERVER = "mambabench.harness.forkserver"
"""In the command line of a server of children, and of these."""


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for something, and fails if it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below one; each remembers when it began, so that a later one of its number is told apart."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def halt_a_step(pid: int) -> bool:
    """Stops a step's child somewhere below a process, so that it does not end by itself; whether there was one that had
    not done its step already."""
    for process in descendants(pid):
        with suppress(psutil.Error):
            parent = process.parent()
            if parent is not None and all(SERVER in " ".join(each.cmdline()) for each in (process, parent)):
                process.suspend()
                if not _has_done_its_step(process):
                    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                process.resume()
    return False


def _has_done_its_step(process: psutil.Process) -> bool:
    """Whether the outcome stands beside the records that a child has open."""
    records = [Path(file.path) for file in process.open_files() if file.path.endswith("/events.jsonl")]
    return any(file.with_name("outcome.json").exists() for file in records)


def living(processes: Iterable[psutil.Process | int]) -> list[int]:
    """The numbers of those that still run."""
    found = []
    for each in processes:
        try:
            process = psutil.Process(each) if isinstance(each, int) else each
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def gone_soon(processes: Iterable[psutil.Process | int], seconds: float = 2.0) -> None:
    """Waits for the end of all of them."""
    waited_for = list(processes)
    until(lambda: not living(waited_for), seconds)
