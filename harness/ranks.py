"""Several processes that do one step together, as torchrun would start them, and that end with the first of them.

The step's child forks them before it has threads or a CUDA context of its own, so that nothing is imported again, and
watches over them. It has no part in the work: it alone is left to tell which process failed first, when the others
wait for that one in vain or fail because it is gone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .forkserver import die_with_parent, leave, watch

Work = Callable[[int], Mapping[str, Any] | None]
"""What a rank does; returns None, or how it failed as an outcome.json."""
SECOND_OPINION_S = 0.5
"""A rank that is killed and one that fails because of it may be heard of in any order within this time."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How the first rank that failed did so."""

    rank: int
    record: Mapping[str, Any] | None
    """None where the process was ended from outside or by a crash."""
    code: int
    """The exit code; negative: the signal."""

    def reason(self) -> str:
        """One line about a process that could not speak for itself."""
        if self.code < 0:
            return f"rank {self.rank}: killed by {signal.Signals(-self.code).name}"
        return f"rank {self.rank}: ended by itself with exit code {self.code}"


def surroundings(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables by which torch.distributed and accelerate know a process on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def together(ranks: int, work: Work) -> Failure | None:
    """Runs `work(rank)` in `ranks` processes until rank 0 is done or one has failed, and ends the others then."""
    port = free_port()
    pids: dict[int, int] = {}
    pipes: dict[int, int] = {}
    for rank in range(ranks):
        ours, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            for end in (ours, *pipes):
                os.close(end)
            _become(work, rank, theirs, parent, surroundings(rank, ranks, port))
        os.close(theirs)
        pipes[ours] = rank
        pids[rank] = pid
    watch()
    try:
        return _first_failure(pids, pipes)
    finally:
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids.values():
            os.waitpid(pid, 0)


def _first_failure(pids: dict[int, int], pipes: dict[int, int]) -> Failure | None:
    """Waits for the ranks, which it takes out of `pids` as they end."""
    said: dict[int, bytes] = dict.fromkeys(pids, b"")
    failures: list[Failure] = []
    deadline = None
    while pipes:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(list(pipes), [], [], left)[0]
        if not ready:
            break
        for end in ready:
            data = os.read(end, 65536)
            rank = pipes[end]
            said[rank] += data
            if data:
                continue
            os.close(end)
            del pipes[end]
            code = os.waitstatus_to_exitcode(os.waitpid(pids.pop(rank), 0)[1])
            if rank == 0 and code == 0:
                return None
            if code != 0:
                failures.append(Failure(rank, json.loads(said[rank]) if said[rank] else None, code))
                deadline = deadline or time.monotonic() + SECOND_OPINION_S
    return next((each for each in failures if each.record is None), failures[0] if failures else None)


def _become(work: Work, rank: int, tell: int, parent: int, variables: Mapping[str, str]) -> None:
    """A rank's way from the fork to its end; never returns."""
    code = 1
    try:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        os.environ.update(variables)
        watch(parent)
        failure = work(rank)
        if failure is None:
            code = 0
            while rank:
                # Collectives that it has queued may still be under way, and the first rank wait for them.
                signal.pause()
        else:
            os.write(tell, json.dumps(failure).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)
