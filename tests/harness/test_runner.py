"""Every way in which a step can end has its state, stops nothing else, and is met rightly by the next run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from mambabench import Needs
from mambabench.harness import environment, plugins
from mambabench.harness.environment import host
from mambabench.harness.interfaces import Outcome
from mambabench.harness.launchers.leases import QUIET
from mambabench.harness.launchers.local import LocalLauncher
from mambabench.harness.locks import Lock
from mambabench.harness.plugins import Registry
from mambabench.harness.progress import Lines, Silent
from mambabench.harness.runner import Summary, run
from mambabench.harness.steps import Step
from mambabench.harness.store import Store

ACTING = Path(__file__).with_name("acting.py")


@pytest.fixture
def acting() -> Registry:
    return plugins.load([ACTING])


def record(component: dict[str, Any], **more: Any) -> dict[str, Any]:
    base = {"seed": 5, "model": "", "backend": None, "teacher_backend": None, "inputs": {}, "data": {}, "models": {}}
    return {**base, "component": component, **more}


def made(key: str, kind: str, component: dict[str, Any], needs: Needs = Needs(), **more: Any) -> Step:  # noqa: B008
    labels = (f"{kind}/{key}",)
    return Step(key=key, kind=kind, labels=labels, needs=needs, record=record(component, **more), modules=frozenset())


def act(key: str, do: str = "finish", *, after: str = "", needs: Needs = Needs(), **config: Any) -> Step:  # noqa: B008
    component = {"kind": "source", "name": "act", "config": {"do": do, **config}}
    return made(key, "data", component, needs, inputs={"before": after} if after else {})


Go = Callable[..., Summary]


@pytest.fixture
def go(store: Store, launcher: LocalLauncher, acting: Registry) -> Go:
    def go(*steps: Step, **options: Any) -> Summary:
        return run(steps, store, launcher, acting, host=host(), **{"progress": Silent(), **options})

    return go


def traced(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("do", "state", "says", "attempts"),
    [
        ("finish", "ok", "", 1),
        ("unsupported", "unsupported", "not in this world", 1),
        ("memory", "out-of-memory", "MemoryError: no more of it", 1),
        ("line", "error", "config.json: hidden = 3 is odd", 1),
        ("error", "error", "ValueError: a bug with two lines", 1),
        ("exit", "error", "SystemExit: 3", 1),
        ("kill", "crashed", "SIGKILL", 2),
        ("segv", "crashed", "SIGSEGV", 2),
        ("leave", "crashed", "exit code 7 without an outcome; the log ends with: last words", 2),
    ],
)
def test_an_end_has_its_state_and_reason(go: Go, store: Store, do: str, state: str, says: str, attempts: int) -> None:
    summary = go(act("k", do))
    assert summary.counts == {state: 1}
    assert says in summary.outcomes["k"].reason
    assert store.status("k").state == state
    assert store.status("k").reason == summary.outcomes["k"].reason
    assert summary.ran == ["k"] * attempts
    assert summary.fine == (state in ("ok", "unsupported"))


def test_a_traceback_is_in_the_log(go: Go, store: Store) -> None:
    go(act("k", "error"))
    assert 'raise ValueError("a bug\\nwith two lines")' in (store.partial("k") / "log.txt").read_text()


def test_what_our_code_says_is_in_the_log_once(go: Go, store: Store) -> None:
    assert go(act("k", "speak")).counts == {"ok": 1}
    assert (store.finished("k") / "log.txt").read_text().count("this and that") == 1


def test_a_hang_ends_at_its_timeout_with_all_it_started(go: Go, store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    summary = go(act("k", "family", trace=str(trace), needs=Needs(timeout_s=1.0)), act("other"))
    assert summary.counts == {"ok": 1, "timeout": 1}
    assert summary.outcomes["k"].reason == "not done after 1 s"
    pids = [int(word) for line in trace.read_text().splitlines() for word in line.split()[1:]]
    assert len(pids) == 8
    gone_soon(pids)


def test_what_is_ok_never_runs_again_and_starts_no_process(go: Go, store: Store, tmp_path: Path) -> None:
    steps = [act("a", trace=str(tmp_path / "trace")), act("b", trace=str(tmp_path / "trace"), after="a")]
    assert go(*steps).counts == {"ok": 2}
    began = time.perf_counter()
    summary = run(steps, store, Refusing(), plugins.load([ACTING]), host=host(), progress=Silent())
    assert (summary.counts, summary.ran) == ({"ok": 2}, [])
    assert time.perf_counter() - began < 1.0
    assert traced(tmp_path / "trace") == ["finish", "finish"]


class Refusing:
    """A launcher that must not be used."""

    def prepare(self, modules: object) -> None:
        raise AssertionError("nothing was to be started")

    start = close = prepare


def test_a_failure_blocks_what_needs_it_and_nothing_else(go: Go, store: Store) -> None:
    summary = go(act("a", "error"), act("b", after="a"), act("c", after="b"), act("d"))
    assert {key: outcome.state for key, outcome in summary.outcomes.items()} == {
        "a": "error",
        "b": "blocked",
        "c": "blocked",
        "d": "ok",
    }
    assert store.status("b").reason == "needs data/a, which is error"
    assert store.status("c").reason == "needs data/b, which is blocked"
    assert not summary.fine


def test_what_only_waits_for_unsupported_steps_is_fine(go: Go) -> None:
    steps = [act("a", "unsupported"), act("b", after="a"), act("c", after="b"), act("d")]
    summary = go(*steps)
    assert summary.counts == {"ok": 1, "unsupported": 1, "blocked": 2}
    assert summary.fine
    mixed = act("e", after="a")
    mixed.record["inputs"]["other"] = "f"
    assert not go(*steps, act("f", "error"), mixed).fine


def test_failures_wait_for_retry_and_the_blocked_follow(go: Go, store: Store, tmp_path: Path) -> None:
    trace = str(tmp_path / "trace")
    failing = act("a", "error", trace=trace)
    go(failing, act("b", after="a"))
    assert go(failing, act("b", after="a")).counts == {"error": 1, "blocked": 1}
    assert traced(tmp_path / "trace") == ["error"]
    mended = act("a", "finish", trace=trace)
    assert go(mended, act("b", after="a"), retry=True).counts == {"ok": 2}
    assert traced(tmp_path / "trace") == ["error", "finish"]


def test_what_failed_is_tried_again_once_it_is_asked_for_otherwise(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, longer = {"trace": str(tmp_path / "trace"), "sets": ((1,),)}, Needs(timeout_s=7.0)
    failing, otherwise = act("a", "memory", **config), act("a", "finish", **config, needs=longer)
    for step in (failing, failing, act("a", "memory", **config, needs=longer)):
        assert go(step).counts == {"out-of-memory": 1}
    places = iter([None])  # it waits for one, and then all is stopped
    with monkeypatch.context() as patch:
        patch.setattr(LocalLauncher, "start", lambda *_: next(places))
        with pytest.raises(StopIteration):
            go(otherwise)
    assert go(otherwise).counts == go(failing).counts == {"ok": 1}
    assert traced(tmp_path / "trace") == ["memory", "memory", "finish"]


def test_a_crash_is_retried_once_over_all_runs(go: Go, tmp_path: Path) -> None:
    step = act("a", "kill", trace=str(tmp_path / "trace"))
    assert go(step).outcomes["a"].attempt == 2
    assert go(step).counts == {"crashed": 1}
    assert len(traced(tmp_path / "trace")) == 2
    go(step, retry=True)
    assert len(traced(tmp_path / "trace")) == 4


def test_unsupported_is_decided_anew_at_every_run(go: Go, tmp_path: Path) -> None:
    assert go(act("a", "unsupported", trace=str(tmp_path / "trace"))).counts == {"unsupported": 1}
    assert go(act("a", "finish", trace=str(tmp_path / "trace"))).counts == {"ok": 1}


def test_a_second_attempt_keeps_scratch_and_losses_and_makes_its_output_anew(go: Go, store: Store) -> None:
    summary = go(act("k", "once"))
    assert (summary.outcomes["k"].state, summary.outcomes["k"].attempt) == ("ok", 2)
    assert sorted(file.name for file in store.artifact("k").iterdir()) == ["artifact.json", "data.jsonl"]
    losses = pyarrow.parquet.read_table(store.finished("k") / "losses.parquet").to_pylist()
    assert [(row["step"], row["loss"]) for row in losses] == [(1, 3.0), (2, 2.5), (3, 2.0)]


def test_a_hook_can_refuse_and_one_that_raises_stops_nothing(go: Go, store: Store, acting: Registry) -> None:
    summary = go(act("refused"), act("angry"), act("after", after="refused"))
    assert summary.counts == {"ok": 1, "unsupported": 1, "blocked": 1}
    assert store.status("refused").reason == "refused by a hook"
    assert "this hook is angry" in acting.failures[-1].error


def test_each_failure_of_a_hook_is_shown_once(go: Go, acting: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    acting.environment()
    go(act("angry"), progress=Lines(sys.stdout))
    lines = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines() if " failed: " in line]
    assert lines == [
        "plug-in acting.py:acting: mambabench_environment failed: RuntimeError: no facts today",
        "plug-in acting.py:acting: mambabench_step_finished failed: RuntimeError: this hook is angry",
    ]


def test_lacking_requirements_and_too_many_gpus_are_unsupported(go: Go) -> None:
    lacking = act("a")
    lacking.lacking = ("mamba-ssm>=2.2 (not installed)",)
    summary = go(lacking, act("b", needs=Needs(gpus=1)))
    assert summary.counts == {"unsupported": 2}
    assert summary.outcomes["a"].reason == "needs mamba-ssm>=2.2 (not installed)"
    assert summary.outcomes["b"].reason == "needs 1 GPU, this run has none (see --gpus)"


def test_a_step_behind_one_that_lacks_the_same_says_what_is_missing(go: Go) -> None:
    first, second = act("a"), act("b", after="a")
    first.absent = second.absent = ("there is no file questions.jsonl",)
    summary = go(first, second, act("c", after="b"))
    assert summary.counts == {"unsupported": 2, "blocked": 1}
    assert summary.outcomes["b"].reason == "there is no file questions.jsonl"


@pytest.mark.parametrize("damage", ["outcome.json", "events.jsonl", "artifact/data.jsonl"])
def test_a_damaged_step_is_done_anew(go: Go, store: Store, tmp_path: Path, damage: str) -> None:
    step = act("a", trace=str(tmp_path / "trace"))
    go(step)
    os.truncate(store.finished("a") / damage, 10)
    assert store.state("a") == "interrupted"
    assert go(step).counts == {"ok": 1}
    assert store.state("a") == "ok"
    assert len(traced(tmp_path / "trace")) == 2


def test_an_artifact_that_is_gone_is_made_anew_only_for_a_step_that_has_yet_to_use_it(go: Go, store: Store) -> None:
    first, second, third = act("a"), act("b", after="a"), act("c", after="b")
    assert go(first, second, third).ran == ["a", "b", "c"]
    for key in ("a", "b"):
        shutil.rmtree(store.artifact(key))
    again = go(first, second, third)
    assert (again.ran, again.counts) == ([], {"ok": 3})
    assert go(first, second, third, act("d", after="b")).ran == ["a", "b", "d"]
    # What nothing uses was made for its own sake.
    shutil.rmtree(store.artifact("c"))
    assert go(first, second, third).ran == ["c"]


def test_a_child_that_died_between_its_outcome_and_the_rename_did_its_step(go: Go, store: Store) -> None:
    summary = go(act("a", "kill_at_rename"))
    assert (summary.counts, summary.ran) == ({"ok": 1}, ["a"])
    assert (store.artifact("a") / "data.jsonl").is_file()


def test_a_run_completes_a_step_that_an_earlier_one_left_before_the_rename(
    go: Go, store: Store, tmp_path: Path
) -> None:
    step = act("a", trace=str(tmp_path / "trace"))
    go(step)
    store.finished("a").rename(store.partial("a"))
    assert store.state("a") == "interrupted"
    summary = go(step)
    assert (summary.counts, summary.ran) == ({"ok": 1}, [])
    assert len(traced(tmp_path / "trace")) == 1


def test_an_outcome_tells_device_times_memory_and_versions(go: Go, store: Store) -> None:
    go(act("a", seconds=0.2))
    outcome = store.outcome("a")
    assert outcome is not None
    detail = outcome["detail"]
    assert (detail["device"], detail["threads"], detail["omp_wait_policy"]) == ("cpu", 1, "PASSIVE")
    assert 0 < detail["first_record_s"] <= detail["last_record_s"] < outcome["wall_s"] - 0.2
    assert detail["first_record_s"] + outcome["wall_s"] - detail["last_record_s"] < 3.0
    assert detail["peak_rss_bytes"] >= detail["rss_at_start_bytes"] > 10**7
    assert outcome["facts"] == [{"name": "seed", "value": 5, "unit": "", "arm": ""}]
    assert {"python", "platform", "cpu", "cores", "memory_gib", "torch"} <= set(outcome["environment"])


def test_steps_tell_the_code_and_machine_that_they_began_with(
    go: Go, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [{"version": "1", "revision": revision, "dirty": False} for revision in ("abc", "def")]
    monkeypatch.setattr(environment, "code", lambda: told[0])
    store.write_run({"code": told[1]})
    go(act("a"), act("b", "error"))
    monkeypatch.setattr(environment, "code", lambda: told[1])
    go(act("a"), act("c", after="a"))
    outcomes = {key: store.outcome(key) or {} for key in "abc"}
    assert [outcomes[key]["code"]["revision"] for key in "abc"] == ["abc", "abc", "def"]
    signed = json.loads((store.artifact("a") / "artifact.json").read_text())
    assert signed["code"] == outcomes["a"]["code"]
    assert signed["environment"] == outcomes["a"]["environment"]


def test_a_whole_chain_gets_its_inputs(go: Go, store: Store, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    toy = {"kind": "backend", "name": "toy", "config": {}}
    decoder = {"plan_name": "plain", "kind": "decoder", "name": "toy-decoder", "config": {}}
    select = {"kind": "selector", "name": "toy-select", "config": {}}
    train = {"kind": "distiller", "name": "toy-train", "config": {"data": "text"}}
    steps = [
        act("text"),
        made("teacher", "convert", toy, backend=toy, model="teacher", path=str(tmp_path / "teacher")),
        made("selection", "select", select, backend=toy, inputs={"parent": "teacher", "teacher": "teacher"}),
        made("half", "convert", toy, backend=toy, model="half", inputs={"parent": "teacher", "selection": "selection"}),
        made(
            "trained",
            "train",
            train,
            backend=toy,
            model="half",
            inputs={"parent": "half", "teacher": "teacher"},
            data={"text": {"step": "text"}},
        ),
        made(
            "measured",
            "measure",
            {"kind": "suite", "name": "toy-measure", "config": {}},
            backend=toy,
            model="half",
            inputs={"subject": "trained"},
            decoder=decoder,
            reference=decoder,
        ),
    ]
    assert go(*steps).counts == {"ok": 6}
    assert json.loads((store.artifact("teacher") / "toy.json").read_text())["keep"] == [0, 1, 2]
    assert json.loads((store.artifact("selection") / "layers.json").read_text()) == {"keep": [0, 2]}
    kept = [fact["value"] for fact in store.outcome("selection")["facts"] if fact["name"] == "keeps_attention"]
    assert kept == [0, 2]
    trained = json.loads((store.artifact("trained") / "toy.json").read_text())
    assert (trained["keep"], trained["teacher"], trained["text"]) == ([0, 2], "teacher", '{"text": "one"}\n')
    assert trained["random"] == pytest.approx(torch_rand(5), abs=0)
    signed = json.loads((store.artifact("trained") / "artifact.json").read_text())
    assert (signed["backend"]["name"], signed["model"], signed["key"]) == ("toy", "half", "trained")
    samples = pyarrow.parquet.read_table(store.finished("measured") / "samples.parquet").to_pylist()
    assert [(row["key"], row["metric"], row["value"]) for row in samples] == [("measured", "kept", 2.0)]
    outcome = store.outcome("measured")
    assert outcome is not None
    assert {fact["name"]: fact["value"] for fact in outcome["facts"]} == {
        "subject": "half",
        "decoder": "plain",
        "dtype": "float32",
    }
    assert not (store.finished("measured") / "artifact").exists()


def torch_rand(seed: int) -> float:
    import torch

    return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))


def test_two_runs_on_one_store_do_every_step_once(go: Go, store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    other = start_run(store, trace, do="finish", seconds=0.3, count=6, runtime=tmp_path)
    until(lambda: traced(trace))
    steps = [act(f"k{index}", trace=str(trace), seconds=0.3) for index in range(6)]
    summary = go(*steps)
    assert other.wait(timeout=20) == 0
    assert summary.counts == {"ok": 6}
    assert len(traced(trace)) == 6
    assert 0 < len(summary.ran) < 6


def test_a_killed_run_leaves_no_process_and_its_running_step_to_the_next(go: Go, store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    go(act("k0", trace=str(trace)))
    other = start_run(store, trace, do="family", seconds=0.0, count=2, runtime=tmp_path)
    until(lambda: len(traced(trace)) == 3)
    tree = [process.pid for process in psutil.Process(other.pid).children(recursive=True)]
    tree += [int(word) for line in trace.read_text().splitlines()[1:] for word in line.split()[1:]]
    assert store.state("k1") == "running"
    other.kill()
    killed = time.monotonic()
    other.wait()
    gone_soon(tree, 2.0 - (time.monotonic() - killed))
    assert store.state("k1") == "interrupted"
    summary = go(*(act(f"k{index}", trace=str(trace)) for index in range(2)))
    assert (summary.counts, summary.ran) == ({"ok": 2}, ["k1"])


def test_ctrl_c_cancels_what_runs_and_the_next_run_takes_it_up(go: Go, store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    other = start_run(store, trace, do="family", seconds=0.0, count=2, runtime=tmp_path)
    until(lambda: len(traced(trace)) == 4)
    tree = [process.pid for process in psutil.Process(other.pid).children(recursive=True)]
    other.send_signal(signal.SIGINT)
    assert other.wait(timeout=10) == 130
    gone_soon(tree)
    assert (store.status("k1").state, store.status("k1").reason) == ("cancelled", "Ctrl-C")
    assert go(act("k0"), act("k1")).counts == {"ok": 2}


def test_a_run_that_ctrl_c_ends_tells_of_the_steps_that_it_did_not_reach(go: Go) -> None:
    class Stops(Silent):
        def note(self, text: str) -> None:
            raise KeyboardInterrupt

    summary = go(act("a"), act("b", after="a"), progress=Stops())
    assert summary.text() == "2 steps: 2 not reached; 0 ran now; stopped by Ctrl-C"


def test_a_step_that_waits_for_another_run_says_so_once(
    go: Go, launcher: LocalLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    go(act("first"))
    alone = Lock.take(launcher._runtime / QUIET)
    assert alone is not None
    later = Timer(0.5, alone.release)
    later.start()
    assert go(act("a"), act("b"), progress=Lines(sys.stdout)).counts == {"ok": 2}
    later.join()
    waits = [line for line in capsys.readouterr().out.splitlines() if " waits: " in line]
    assert waits == ["[0/2] data/a waits: another run has this machine for itself to measure speed"]


def test_lines_tell_starts_and_ends(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    go(act("a"), act("b", "error", after="a"), progress=Lines(sys.stdout))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[0/2] importing what the steps share, once", "[0/2] start data/a"]
    assert lines[2].startswith("[1/2] ok data/a in ")
    assert lines[4].startswith("[2/2] error data/b in ")
    assert lines[4].endswith("s: ValueError: a bug with two lines")


def test_a_summary_is_one_line() -> None:
    outcomes = {"a": Outcome(state="ok"), "b": Outcome(state="error"), "c": Outcome(state="ok")}
    assert Summary(outcomes, ran=["b", "b"]).text() == "3 steps: 2 ok, 1 error; 1 ran now"
    told = "3 steps: 2 ok, 1 error; 0 ran now; 1 failed before, --retry runs it again"
    assert Summary(outcomes).text() == told, "what waits for --retry is not passed over in silence"


def start_run(store: Store, trace: Path, *, do: str, seconds: float, count: int, runtime: Path) -> subprocess.Popen:
    """Another process that runs the steps k0, k1, … of the same store."""
    script = textwrap.dedent(f"""
        import signal
        import sys
        from pathlib import Path
        from mambabench import Needs
        from mambabench.harness import plugins
        from mambabench.harness.environment import host
        from mambabench.harness.launchers.configs import LocalConfig
        from mambabench.harness.launchers.local import LocalLauncher
        from mambabench.harness.progress import Silent
        from mambabench.harness.runner import run
        from mambabench.harness.steps import Step
        from mambabench.harness.store import Store
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
        config = {{"do": {do!r}, "trace": {str(trace)!r}, "seconds": {seconds}}}
        record = {record({"kind": "source", "name": "act"})!r}
        record["component"]["config"] = config
        steps = [
            Step(key=key, kind="data", labels=(f"data/{{key}}",), needs=Needs(), record=record, modules=frozenset())
            for key in {[f"k{index}" for index in range(count)]!r}
        ]
        launcher = LocalLauncher(LocalConfig(jobs=2))
        loaded = plugins.load([Path({str(ACTING)!r})])
        summary = run(steps, Store.open({str(store.path)!r}), launcher, loaded, host=host(), progress=Silent())
        launcher.close()
        sys.exit(130 if summary.stopped else 0)
    """)
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)})


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def gone_soon(pids: list[int], seconds: float = 2.0) -> None:
    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until(lambda: not any(alive(pid) for pid in pids), seconds)
