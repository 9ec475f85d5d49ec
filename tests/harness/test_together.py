"""A step of several processes ends as one: with the first one's result, or with the first failure in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mambabench.harness.store import Store

ACTING = Path(__file__).with_name("acting.py")


def prepare(tmp_path: Path, do: str, trace: Path) -> tuple[Store, list[str]]:
    """A store with one step of two ranks, and the command that runs it."""
    store = Store.create(tmp_path / "store")
    component = {"kind": "source", "name": "act", "config": {"do": do, "trace": str(trace)}}
    step = {"kind": "data", "seed": 0, "labels": ["data/x"], "inputs": {}, "component": component}
    store.prepare("k", {**step, "needs": {"gpus": 0, "alone": False, "timeout_s": 9.0, "ranks": 2}})
    module = [sys.executable, "-P", "-m", "mambabench.harness.child"]
    return store, [*module, str(store.path), "k", "--plugin", str(ACTING)]


def processes(trace: Path) -> list[int]:
    """Of the ranks that have begun."""
    return [int(line.split()[1]) for line in trace.read_text().splitlines()] if trace.exists() else []


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("do", "state", "reason"),
    [
        ("finish", "ok", ""),
        ("linger_in_rank_1", "ok", ""),
        ("owe_in_rank_1", "ok", ""),
        ("fail_before_rename", "ok", ""),
        ("fail_after_rename", "ok", ""),
        ("fail_in_rank_1", "error", "rank 1: ValueError: a bug in one rank"),
        ("kill_rank_1", "crashed", "rank 1: killed by SIGKILL"),
        ("line", "error", "config.json: hidden = 3 is odd"),
    ],
)
def test_ranks_end_together(tmp_path: Path, do: str, state: str, reason: str) -> None:
    trace = tmp_path / "trace"
    store, command = prepare(tmp_path, do, trace)
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    outcome = store.status("k").record
    assert outcome is not None
    assert (store.state("k"), outcome["reason"]) == (state, reason)
    assert time.monotonic() - began < 40
    pids = processes(trace)
    assert pids
    assert gone(pids)
    events = [json.loads(line) for line in (store.folder("k") / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] in (["attempt", "fact"], ["attempt"] if state != "ok" else None)


def test_ranks_are_gone_when_the_child_is(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    _, command = prepare(tmp_path, "hang", trace)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 30.0
        while len(processes(trace)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    pids = processes(trace)
    assert len(pids) == 2
    assert gone(pids)
