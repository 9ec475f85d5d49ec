"""What steps of one store make once and use together: files named after all that decides them. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .interfaces import MambabenchError
from .locks import Lock


def make_once(file: Path, write: Callable[[Path], None]) -> bool:
    """Has `write` make a file (under another name, which is then renamed), unless it stands there; of processes that
    want it at once, one writes and the others wait. Returns whether the file is there: False where nothing can be
    written, which must cost a step no more than time."""
    try:
        lock = Lock.take(file.with_suffix(".lock"), wait=True)
    except MambabenchError:
        return False
    assert lock is not None
    unfinished = file.with_suffix(f".{os.getpid()}.partial")
    try:
        if not file.is_file():
            for left in file.parent.glob(f"{file.stem}.*.partial"):
                # Of a process that was killed: no other writes while the lock is held.
                left.unlink(missing_ok=True)
            write(unfinished)
            unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        return False
    finally:
        lock.release()
    return True
