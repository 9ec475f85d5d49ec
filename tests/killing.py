"""Runs of a plan that are killed at some moment, and what the store holds then: for tests, and for the many kills of
`tests/bench/bench_kills.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "TEST_RUN"
"""A variable of a run and of all that descends from it."""
GRACE_S = 2.0
QUALITY = ("quality", "losslessness", "acceptance", "differences")
"""Tables whose numbers are the same in every run of a plan."""


@dataclass(frozen=True)
class Kill:
    """What a `kill -9` of a run met and left."""

    after_s: float
    finished: int
    """Steps that were finished then."""
    interrupted: int
    """Steps that were running."""
    survivors: tuple[str, ...]
    """Command lines of processes that were alive two seconds later."""
    undone: tuple[str, ...]
    """Steps that had been finished when the run was started, and were lost or done again."""


def began(store: Path) -> dict[str, float]:
    """When each finished step began; another time means that it ran again."""
    folder = store / "steps"
    found = {}
    for step in folder.iterdir() if folder.is_dir() else ():
        found[step.name] = json.loads((step / "outcome.json").read_text())["started"]
    return found


def lost_or_again(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, ...]:
    """Steps that had been finished and are not any more, or began another time since."""
    return tuple(key for key, moment in before.items() if after.get(key) != moment)


def environment(mark: str) -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONSAFEPATH": "1", MARK: mark}


def marked(mark: str) -> tuple[str, ...]:
    """The living processes of a run, wherever they went, with their state."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.status()}: {' '.join(process.cmdline())}")
    return tuple(found)


def underway(store: Path, since: float, finished: int) -> bool:
    """Whether a step has begun since a moment in Unix time, and so many are finished."""
    return len(began(store)) >= finished and any(
        each.stat().st_mtime > since for each in store.glob("*/*/events.jsonl")
    )


def killed(words: Iterable[object], store: Path, after_s: float, *, finished: int | None = 0) -> Kill | None:
    """Runs `mambabench WORDS…` and kills it some time after it began a step and the store has so many finished ones; or
    else (None) some time after its own start. None where it had ended before, which must be well."""
    mark, before, start = uuid.uuid4().hex, began(store), time.time()
    command = [sys.executable, "-m", "mambabench", *map(str, words)]
    with subprocess.Popen(command, env=environment(mark), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while finished is not None and run.poll() is None and not underway(store, start, finished):
            time.sleep(0.05)
        try:
            run.wait(after_s)
        except subprocess.TimeoutExpired:
            run.kill()
    time.sleep(GRACE_S)
    after = began(store)
    undone = lost_or_again(before, after)
    if run.returncode != -signal.SIGKILL:
        assert run.returncode == 0
        assert not undone
        return None
    partial = store / "partial"
    running = [each for each in partial.iterdir() if (each / "events.jsonl").exists()] if partial.is_dir() else []
    return Kill(after_s, len(after), len(running), marked(mark), undone)


def at_once(words: Sequence[object], runs: int = 2) -> list[str]:
    """What several runs of the same words said, which were started together and must end well."""
    command = [sys.executable, "-m", "mambabench", *map(str, words)]
    started = [
        subprocess.Popen(command, env=environment(""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(runs)
    ]
    said = [run.communicate()[0] for run in started]
    assert [run.returncode for run in started] == [0] * runs, said
    return said


def attempts(store: Path) -> dict[str, int]:
    """How often each finished step was begun."""
    found = {}
    for key in began(store):
        lines = (store / "steps" / key / "events.jsonl").read_text().splitlines()
        found[key] = sum(json.loads(line)["kind"] == "attempt" for line in lines)
    return found


def quality(store: Path) -> Mapping[str, str]:
    """The tables of a report that time has no part in, as CSV."""
    command = [sys.executable, "-m", "mambabench", "report", str(store), "--to", "csv"]
    subprocess.run(command, env=environment(""), check=True, stdout=subprocess.DEVNULL)
    return {name: (store / "report" / "csv" / f"{name}.csv").read_text() for name in QUALITY}
