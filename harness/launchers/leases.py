"""Leases on parts of a host: its GPUs and its quiet.

Every step holds the host's quiet lock, shared; a step that must be alone holds it exclusively, so that nothing of the
same user runs beside a measurement of speed, from whichever run it comes. GPUs are taken all or none.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..interfaces import MambabenchError, Needs
from ..locks import Lock


class Lease:
    """What a step holds until `release`."""

    def __init__(self, locks: list[Lock], gpus: tuple[int, ...]) -> None:
        self._locks = locks
        self.gpus = gpus

    def release(self) -> None:
        while self._locks:
            self._locks.pop().release()


def runtime_folder() -> Path:
    """The user's own folder for locks on this host."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and os.access(given, os.W_OK):
        folder = Path(given) / "mambabench"
    else:
        folder = Path(tempfile.gettempdir()) / f"mambabench-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise MambabenchError(f"{folder}: belongs to another user; set XDG_RUNTIME_DIR to a folder of your own")
    return folder


def take(needs: Needs, gpus: Sequence[int], folder: Path) -> Lease | None:
    """Leases what a step needs out of `gpus`, all or nothing; None while some of it is taken."""
    quiet = Lock.take(folder / "quiet.lock", shared=not needs.alone)
    if quiet is None:
        return None
    locks: list[Lock] = [quiet]
    taken: list[int] = []
    for index in gpus:
        if len(taken) == needs.gpus:
            break
        lock = Lock.take(folder / f"gpu-{index}.lock")
        if lock is not None:
            locks.append(lock)
            taken.append(index)
    lease = Lease(locks, tuple(taken))
    if len(taken) < needs.gpus:
        lease.release()
        return None
    return lease
