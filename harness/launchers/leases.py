"""Leases on parts of a host: its GPUs and its quiet.

Every step holds the host's quiet lock, shared, as the server of children does while it imports; a step that must be
alone holds it exclusively, so that nothing of the same user runs beside a measurement of speed, from whichever run it
comes. GPUs are taken all or none: exclusively, or, in a run that lets steps share them, by a step that needs one and
takes a slot on it, next to others like it. The child and its server hold a lease together with the run, so that it
outlives a killed run as long as its child does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..interfaces import MambabenchError, Needs
from ..locks import Lock

QUIET = "quiet.lock"


class Lease:
    """What a step holds until `release`."""

    def __init__(self, locks: list[Lock], gpus: tuple[int, ...], share: int = 1) -> None:
        self._locks = locks
        self.gpus = gpus
        self.share = share
        """How many steps may be on the GPU, this one included."""

    @property
    def descriptors(self) -> list[int]:
        """For the other processes that are to hold this lease as well."""
        return [lock.fileno() for lock in self._locks]

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


def take(needs: Needs, gpus: Sequence[int], folder: Path, share: int = 1) -> Lease | None:
    """Leases what a step needs out of `gpus`, all or nothing; None while some of it is taken. Up to `share` steps that
    need one GPU each may have the same one."""
    quiet = Lock.take(folder / QUIET, shared=not needs.alone)
    if quiet is None:
        return None
    locks: list[Lock] = [quiet]
    taken: list[int] = []
    if share > 1 and needs.gpus == 1 and not needs.alone:
        found = _slot(gpus, folder, share)
        if found is None:
            quiet.release()
            return None
        index, held = found
        return Lease([quiet, *held], (index,), share)
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


def _slot(gpus: Sequence[int], folder: Path, share: int) -> tuple[int, list[Lock]] | None:
    """A GPU that is free or shared, with the locks of a place on it; the emptiest first."""
    for slot in range(share):
        for index in gpus:
            gpu = Lock.take(folder / f"gpu-{index}.lock", shared=True)
            if gpu is None:
                continue
            place = Lock.take(folder / f"gpu-{index}-{slot}.lock")
            if place is not None:
                return index, [gpu, place]
            gpu.release()
    return None


def obstacle(needs: Needs, folder: Path) -> str:
    """What keeps a lease from a step, in words; empty where nothing does any more."""
    quiet = Lock.take(folder / QUIET, shared=not needs.alone)
    if quiet is not None:
        quiet.release()
        return "another run has the GPUs" if needs.gpus else ""
    if needs.alone:
        return "it must be alone, and another run is at work on this machine"
    return "another run has this machine for itself to measure speed"
