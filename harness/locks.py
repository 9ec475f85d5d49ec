"""Locks on files, for steps of a store and for the parts of a host.

`flock` because the kernel drops it with the process that holds it: nothing is left to clean up after a `kill -9`.
Lock files themselves are never deleted, since deleting one that somebody waits for makes two holders.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from .interfaces import MambabenchError

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class Lock:
    """A held lock. Python's file descriptors are not inherited by the programs that it starts, so neither is this.

    A process that is handed the descriptor (`fileno`) holds the lock as well: it is free once all have closed theirs.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    @classmethod
    def take(cls, path: Path, *, shared: bool = False, wait: bool = False) -> Lock | None:
        """Takes the lock on `path`, or returns None if it is taken and `wait` is off."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise MambabenchError(f"{path}: cannot be locked ({error.strerror})") from error
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in TAKEN:
                return None
            raise MambabenchError(f"{path}: this file system cannot lock files ({error.strerror})") from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether somebody holds the lock on `path` exclusively; leaves nothing behind."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in TAKEN
        finally:
            os.close(descriptor)
        return False

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
