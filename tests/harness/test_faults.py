"""What can go wrong around a step is told as it is, stops no other step, and is mended by a later run.

Kills, hangs, damaged steps and runs beside each other are in `test_runner`, `test_launcher` and `test_store`.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mambabench import MambabenchError, Needs
from mambabench.harness import plugins, runner
from mambabench.harness import store as store_module
from mambabench.harness.environment import host
from mambabench.harness.launchers.configs import LocalConfig
from mambabench.harness.launchers.local import Child, LocalLauncher
from mambabench.harness.locks import Lock
from mambabench.harness.plugins import Registry
from mambabench.harness.progress import Silent
from mambabench.harness.runner import Summary, run
from mambabench.harness.steps import Step
from mambabench.harness.store import Store

HERE = Path(__file__).parent
ACTING = HERE / "acting.py"

HOSTILE = """
import sys
from mambabench import hookimpl

def fail(*_):
    sys.exit("no more")

@hookimpl
def mambabench_refuse(step, host): fail()

@hookimpl
def mambabench_step_started(step): fail()

@hookimpl
def mambabench_step_finished(step, outcome): raise RuntimeError("never")

@hookimpl
def mambabench_environment(): fail()
"""


def act(key: str, do: str = "finish", needs: Needs = Needs(), **config: Any) -> Step:  # noqa: B008
    record = {"seed": 5, "model": "", "backend": None, "teacher_backend": None, "inputs": {}, "data": {}, "models": {}}
    record["component"] = {"kind": "source", "name": "act", "config": {"do": do, **config}}
    return Step(key=key, kind="data", labels=(f"data/{key}",), needs=needs, record=record, modules=frozenset())


Go = Callable[..., Summary]


@pytest.fixture
def go(store: Store, launcher: LocalLauncher) -> Go:
    def go(*steps: Step, registry: Registry | None = None, retry: bool = False) -> Summary:
        known = registry or plugins.load([ACTING])
        return run(steps, store, launcher, known, host=host(), retry=retry, progress=Silent())

    return go


def test_memory_that_is_not_there_is_told_as_such(go: Go) -> None:
    summary = go(act("k", "tensor"), act("other"))
    assert summary.counts == {"ok": 1, "out-of-memory": 1}
    assert "DefaultCPUAllocator" in summary.outcomes["k"].reason


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("do", ["full_disk", "full_checkpoint", "full_records"])
def test_a_full_disk_is_told_as_such_and_the_step_is_done_when_there_is_room(go: Go, store: Store, do: str) -> None:
    summary = go(act("k", do), act("other"))
    assert summary.counts == {"ok": 1, "error": 1}
    assert "the disk is full; free some space and run again with --retry" in summary.outcomes["k"].reason
    assert go(act("k"), retry=True).counts == {"ok": 1}
    assert store.state("k") == "ok"


def test_a_run_that_cannot_write_outcomes_ends_with_one_line_and_its_children(
    go: Go, store: Store, loaded: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        if path.name == "outcome.json":
            raise MambabenchError(f"{path}: cannot be written, the disk is full; free some space")
        write_json(path, value)

    write_json = store_module.write_json
    trace = tmp_path / "trace"
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_json", full)
        with pytest.raises(MambabenchError, match=r"outcome\.json: cannot be written, the disk is full"):
            go(act("long", "family", trace=str(trace)), act("k", "kill_beside_family", trace=str(trace)))
    pids = [int(word) for line in trace.read_text().splitlines() for word in line.split()[1:]]
    assert len(pids) == 5
    loaded(HERE.parent / "processes.py").gone_soon(pids)
    assert not any(Lock.is_held(store.path / "locks" / key) for key in ("k", "long"))
    assert go(act("k"), act("long")).counts == {"ok": 2}


@pytest.mark.parametrize("text", [None, "", "[]", '{"kind": "data"}'])
def test_a_failed_step_with_a_damaged_step_file_is_tried_again_and_stops_no_other(
    go: Go, store: Store, text: str | None
) -> None:
    assert go(act("k", "error")).counts == {"error": 1}
    asked = store.partial("k") / "step.json"
    asked.unlink() if text is None else asked.write_text(text)
    assert go(act("k"), act("other")).counts == {"ok": 2}


def test_a_plug_in_that_fails_in_every_hook_stops_nothing(go: Go, tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    registry = plugins.load([ACTING, tmp_path / "hostile.py"])
    registry.environment()
    assert go(act("a"), act("b", "error"), registry=registry).counts == {"ok": 1, "error": 1}
    failed = {(failure.hook, failure.error) for failure in registry.failures if "hostile" in failure.plugin}
    assert failed == {
        ("mambabench_environment", "SystemExit: no more"),
        ("mambabench_refuse", "SystemExit: no more"),
        ("mambabench_step_started", "SystemExit: no more"),
        ("mambabench_step_finished", "RuntimeError: never"),
    }


class SlowToDie:
    """A child that a kill does not end within the time that one waits for it, as where much memory is to be freed."""

    def __init__(self, child: Child) -> None:
        self.child, self.dies = child, math.inf

    def poll(self) -> int | None:
        if time.monotonic() > self.dies:
            self.child.kill()
        return self.child.poll()

    def kill(self) -> None:
        self.dies = time.monotonic() + 1.0
        raise MambabenchError(f"process {self.child.pid} does not end, not even by SIGKILL")


class Lingering(LocalLauncher):
    def start(self, command: Sequence[str], needs: Needs, env: Mapping[str, str], log: Path) -> Any:
        child = super().start(command, needs, env, log)
        return SlowToDie(child) if child else None


def test_a_hanging_step_that_is_slow_to_die_stops_no_other(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    steps = act("k", "hang", needs=Needs(timeout_s=1.0)), act("other", seconds=1.5)
    with closing(Lingering(LocalConfig(jobs=2))) as launcher:
        summary = run(steps, store, launcher, plugins.load([ACTING]), host=host(), progress=Silent())
    assert summary.counts == {"ok": 1, "timeout": 1}
    assert (summary.ran.count("k"), summary.outcomes["k"].reason) == (2, "not done after 1 s")


def test_times_are_true_when_the_clock_jumps_in_a_step(go: Go, store: Store) -> None:
    assert go(act("k", "clock", seconds=0.2)).counts == {"ok": 1}
    outcome = store.outcome("k")
    assert outcome is not None
    detail = outcome["detail"]
    assert 0 <= detail["first_record_s"] < detail["last_record_s"] < outcome["wall_s"] < 60
    assert detail["last_record_s"] - detail["first_record_s"] >= 0.2


def test_a_clock_that_jumps_in_the_run_neither_ends_steps_nor_spares_them(
    go: Go, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, days = time.time, itertools.count(1)
    monkeypatch.setattr(runner.time, "time", lambda: true() - 86400.0 * next(days))
    steps = act("long", seconds=0.5, needs=Needs(timeout_s=30.0)), act("k", "hang", needs=Needs(timeout_s=1.0))
    summary = go(*steps, act("dead", "kill"))
    assert {key: outcome.state for key, outcome in summary.outcomes.items()} == {
        "long": "ok",
        "k": "timeout",
        "dead": "crashed",
    }
    assert all(0 < outcome.wall_s < 60 for outcome in summary.outcomes.values())
