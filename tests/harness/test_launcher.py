"""Children start in milliseconds, hold what they lease, and are gone when the run is gone, `kill -9` included."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mambabench import MambabenchError, Needs, Unsupported
from mambabench.harness import forkserver
from mambabench.harness.launchers.configs import LocalConfig
from mambabench.harness.launchers.local import Child, LocalLauncher
from mambabench.harness.locks import Lock

PROGRAM = Path(__file__).with_name("program.py")


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of this test meet nobody else's."""
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "program.py").write_text(PROGRAM.read_text())
    path = [str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


Make = Callable[..., LocalLauncher]


@pytest.fixture
def launch() -> Iterator[Make]:
    made: list[LocalLauncher] = []

    def make(*modules: str, **config: object) -> LocalLauncher:
        launcher = LocalLauncher(LocalConfig(**config))
        made.append(launcher)
        launcher.prepare(modules)
        return launcher

    yield make
    for launcher in made:
        launcher.close()


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def start(launcher: LocalLauncher, what: str, out: Path, needs: Needs | None = None, **env: str) -> Child:
    command = [sys.executable, "-P", "-m", "program", what, str(out)]
    found: list[Child] = []

    def started() -> bool:
        child = launcher.start(command, needs or Needs(), env, out.with_suffix(".log"))
        found.extend([child] if child else [])
        return bool(found)

    until(started)
    return found[0]


def ended(child: Child) -> int:
    until(lambda: child.poll() is not None)
    assert child.code is not None
    return child.code


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(out: Path) -> list[int]:
    until(out.exists)
    pids = [int(word) for word in out.read_text().split()]
    assert all(alive(pid) for pid in pids)
    return pids


def test_a_server_without_heavy_modules_is_ready_in_a_second(launch: Make) -> None:
    began = time.perf_counter()
    launcher = launch("json")
    until(lambda: launcher._awaited(), 5.0)
    assert time.perf_counter() - began < 1.0
    assert launcher.ready is not None
    assert launcher.ready["threads"] == 1


def test_a_child_gets_its_arguments_environment_log_and_group(launch: Make, tmp_path: Path) -> None:
    child = start(launch(threads=3), "tell", tmp_path / "out", GIVEN="yes")
    assert ended(child) == 4
    facts = json.loads((tmp_path / "out").read_text())
    assert facts["argv"] == ["program", "tell", str(tmp_path / "out")]
    assert facts["OMP_WAIT_POLICY"] == "PASSIVE"
    assert (facts["MAMBABENCH_THREADS"], facts["OMP_NUM_THREADS"], facts["GIVEN"]) == ("3", "3", "yes")
    assert facts["CUDA_VISIBLE_DEVICES"] == ""
    assert facts["group"]
    assert "" not in facts["path"]
    assert os.getcwd() not in facts["path"]
    assert "said on standard output" in (tmp_path / "out.log").read_text()


def test_steps_that_share_a_gpu_run_side_by_side_and_know_it(launch: Make, tmp_path: Path) -> None:
    launcher = launch(gpus=(3,), share=2)
    assert launcher.jobs == 2
    hanging = start(launcher, "hang", tmp_path / "one", Needs(gpus=1))
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1))) == 4
    facts = json.loads((tmp_path / "out").read_text())
    assert (facts["CUDA_VISIBLE_DEVICES"], facts["MAMBABENCH_SHARE"]) == ("3", "2")
    hanging.kill()
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1, alone=True))) == 4
    assert json.loads((tmp_path / "out").read_text())["MAMBABENCH_SHARE"] is None


def test_a_module_that_cannot_be_imported_is_told_in_the_log_and_stops_nothing(launch: Make, tmp_path: Path) -> None:
    (tmp_path / "modules" / "broken.py").write_text("import absent_from_here")
    launcher = launch("broken", "program")
    assert ended(start(launcher, "tell", tmp_path / "out")) == 4
    assert "broken could not be imported beforehand: ModuleNotFoundError" in (tmp_path / "out.log").read_text()


def test_the_end_by_a_signal_is_told(launch: Make, tmp_path: Path) -> None:
    assert ended(start(launch(), "kill", tmp_path / "out")) == -signal.SIGTERM


def test_kill_ends_all_that_a_child_started(launch: Make, tmp_path: Path) -> None:
    child = start(launch(), "hang", tmp_path / "out")
    pids = family(tmp_path / "out")
    child.kill()
    assert child.code == -signal.SIGKILL
    until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_a_child_that_ends_leaves_nothing_behind(launch: Make, tmp_path: Path) -> None:
    child = start(launch(), "leave", tmp_path / "out")
    assert ended(child) == 0
    pids = [int(word) for word in (tmp_path / "out").read_text().split()]
    until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_close_ends_every_child(launch: Make, tmp_path: Path) -> None:
    launcher = launch()
    child = start(launcher, "hang", tmp_path / "out")
    pids = family(tmp_path / "out")
    launcher.close()
    assert child.code == -signal.SIGKILL
    until(lambda: not any(alive(pid) for pid in pids), 2.0)


def test_nothing_lives_two_seconds_after_the_run_was_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from mambabench.harness.interfaces import Needs
        from mambabench.harness.launchers.configs import LocalConfig
        from mambabench.harness.launchers.local import LocalLauncher
        launcher = LocalLauncher(LocalConfig(jobs=2))
        launcher.prepare([])
        for name in ("one", "two"):
            out = Path({str(tmp_path)!r}, name)
            command = [sys.executable, "-P", "-m", "program", "hang", str(out)]
            while launcher.start(command, Needs(), {{}}, out.with_suffix(".log")) is None:
                time.sleep(0.01)
        time.sleep(60)
    """)
    run = subprocess.Popen([sys.executable, "-c", script])
    pids = [*family(tmp_path / "one"), *family(tmp_path / "two")]
    pids += [child.pid for child in psutil.Process(run.pid).children()]
    assert len(pids) == 9
    run.kill()
    killed = time.monotonic()
    run.wait()
    until(lambda: not any(alive(pid) for pid in pids), 2.0)
    assert time.monotonic() - killed < 2.0


def test_a_lease_outlives_a_killed_run_as_long_as_its_child(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from mambabench.harness.interfaces import Needs
        from mambabench.harness.launchers.configs import LocalConfig
        from mambabench.harness.launchers.local import LocalLauncher
        launcher = LocalLauncher(LocalConfig(gpus=(4,)))
        launcher.prepare([])
        out = Path({str(tmp_path)!r}, "out")
        command = [sys.executable, "-P", "-m", "program", "hang", str(out)]
        while launcher.start(command, Needs(gpus=1, alone=True), {{}}, out.with_suffix(".log")) is None:
            time.sleep(0.01)
        time.sleep(60)
    """)
    run = subprocess.Popen([sys.executable, "-c", script])
    child, *_ = pids = family(tmp_path / "out")
    [server] = [
        process for process in psutil.Process(run.pid).children() if process.pid == psutil.Process(child).ppid()
    ]
    locks = [tmp_path / "runtime" / "mambabench" / name for name in ("quiet.lock", "gpu-4.lock")]
    server.suspend()
    try:
        run.kill()
        run.wait()
        time.sleep(0.3)
        assert alive(child)
        assert [Lock.take(lock) for lock in locks] == [None, None]
    finally:
        server.resume()
    until(lambda: Lock.take(locks[0]) is not None, 2.0)
    assert not any(alive(pid) for pid in pids)
    until(lambda: Lock.take(locks[1]) is not None, 2.0)


def locks_of(pid: int) -> list[str]:
    held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    return sorted(Path(file).name for file in held if file.endswith(".lock"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("anew", [False, True])
def test_a_child_holds_its_own_lease_and_no_other(launch: Make, tmp_path: Path, anew: bool) -> None:
    if anew:
        (tmp_path / "modules" / "torch.py").write_text("class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
    launcher = launch(*["torch"] * anew, gpus=(4, 6))
    children = [start(launcher, "hang", tmp_path / str(gpu), Needs(gpus=1)) for gpu in (4, 6)]
    pids = [family(tmp_path / str(gpu))[0] for gpu in (4, 6)]
    assert [locks_of(pid) for pid in pids] == [["gpu-4.lock", "quiet.lock"], ["gpu-6.lock", "quiet.lock"]]
    server = psutil.Process(pids[0]).ppid()
    assert locks_of(server) == ["gpu-4.lock", "gpu-6.lock", "quiet.lock", "quiet.lock"]
    children[0].kill()
    assert locks_of(server) == ["gpu-6.lock", "quiet.lock"]


def test_imports_wait_for_who_measures_alone_and_say_so(launch: Make, tmp_path: Path) -> None:
    alone = Lock.take(tmp_path / "runtime" / "mambabench" / "quiet.lock")
    assert alone is not None
    launcher = launch("program")
    command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / "out")]
    until(lambda: launcher.start(command, Needs(), {}, tmp_path / "out.log") or launcher.waiting)
    assert launcher.waiting == "another run has this machine for itself to measure speed"
    time.sleep(0.5)
    assert launcher.ready is None
    alone.release()
    assert ended(start(launcher, "tell", tmp_path / "out")) == 4
    assert launcher.waiting == ""


def test_nobody_measures_alone_beside_imports(launch: Make, tmp_path: Path) -> None:
    (tmp_path / "modules" / "slow.py").write_text(f"import time; open({str(tmp_path / 'began')!r}, 'w'); time.sleep(1)")
    launcher = launch("slow")
    until((tmp_path / "began").exists)
    quiet = tmp_path / "runtime" / "mambabench" / "quiet.lock"
    assert Lock.take(quiet) is None
    until(lambda: launcher._awaited())
    assert Lock.take(quiet) is not None


def test_a_server_that_is_still_importing_dies_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "modules" / "slow.py").write_text("import time; time.sleep(60)")
    script = textwrap.dedent("""
        import time
        from mambabench.harness.launchers.configs import LocalConfig
        from mambabench.harness.launchers.local import LocalLauncher
        launcher = LocalLauncher(LocalConfig())
        launcher.prepare(["slow"])
        print(launcher._server.process.pid, flush=True)
        time.sleep(60)
    """)
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    server = int(run.stdout.readline())
    time.sleep(0.5)
    run.kill()
    run.communicate()
    until(lambda: not alive(server), 2.0)


def test_a_server_does_nothing_of_what_its_imports_would_do_at_the_end(launch: Make, tmp_path: Path) -> None:
    lasting = "import atexit, time; atexit.register(time.sleep, 60)"
    (tmp_path / "modules" / "lasting.py").write_text(lasting)
    launcher = launch("lasting")
    until(lambda: launcher._awaited())
    assert launcher._server is not None
    process = launcher._server.process
    launcher.close()
    assert process.returncode == 0


def test_children_die_with_a_server_that_was_killed_and_the_next_start_gets_a_new_one(
    launch: Make, tmp_path: Path
) -> None:
    launcher = launch()
    child = start(launcher, "hang", tmp_path / "out")
    pids = family(tmp_path / "out")
    assert launcher._server is not None
    launcher._server.process.kill()
    assert ended(child) == -signal.SIGKILL
    until(lambda: not any(alive(pid) for pid in pids), 2.0)
    assert ended(start(launcher, "tell", tmp_path / "again")) == 4


def test_a_server_that_cannot_start_is_one_line(launch: Make, tmp_path: Path) -> None:
    (tmp_path / "modules" / "leaver.py").write_text("import os; print('no room'); os._exit(9)")
    launcher = launch("leaver")
    with pytest.raises(MambabenchError, match="did not start: exit code 9") as e:
        start(launcher, "tell", tmp_path / "out")
    assert "\n" not in str(e.value)


def test_no_more_children_than_jobs(launch: Make, tmp_path: Path) -> None:
    launcher = launch(jobs=1)
    child = start(launcher, "hang", tmp_path / "out")
    command = [sys.executable, "-m", "program", "tell", str(tmp_path / "two")]
    assert launcher.start(command, Needs(), {}, tmp_path / "two.log") is None
    child.kill()
    assert ended(start(launcher, "tell", tmp_path / "two")) == 4


def test_a_step_that_waits_for_a_judge_takes_no_place_of_one_that_computes(launch: Make, tmp_path: Path) -> None:
    launcher = launch(gpus=(0,))
    light = start(launcher, "hang", tmp_path / "a", Needs(light=True))
    command = [sys.executable, "-m", "program", "tell", str(tmp_path / "x")]
    assert launcher.start(command, Needs(light=True), {}, tmp_path / "x.log") is None
    assert ended(start(launcher, "tell", tmp_path / "b", Needs(gpus=1))) == 4
    light.kill()


def test_a_step_alone_waits_for_the_others_and_they_for_it(launch: Make, tmp_path: Path) -> None:
    one, two = launch(jobs=4), launch(jobs=4)
    until(lambda: one._awaited() and two._awaited())
    command = [sys.executable, "-m", "program", "tell", str(tmp_path / "x")]
    shared = start(one, "hang", tmp_path / "a")
    beside = start(two, "hang", tmp_path / "b")
    assert two.start(command, Needs(alone=True), {}, tmp_path / "x.log") is None
    shared.kill()
    assert one.start(command, Needs(alone=True), {}, tmp_path / "x.log") is None
    assert one.waiting == "it must be alone, and another run is at work on this machine"
    beside.kill()
    alone = start(one, "hang", tmp_path / "c", Needs(alone=True))
    assert one.start(command, Needs(), {}, tmp_path / "x.log") is None
    assert two.start(command, Needs(), {}, tmp_path / "x.log") is None
    assert (one.waiting, two.waiting) == ("", "another run has this machine for itself to measure speed")
    alone.kill()
    assert ended(start(two, "tell", tmp_path / "x")) == 4


def test_gpus_are_leased_all_or_none_and_named_to_the_child(launch: Make, tmp_path: Path) -> None:
    one, two = launch(gpus=(4, 6)), launch(gpus=(6, 7, 4))
    until(lambda: one._awaited() and two._awaited())
    held = start(one, "hang", tmp_path / "a", Needs(gpus=1))
    command = [sys.executable, "-m", "program", "tell", str(tmp_path / "x")]
    assert one.start(command, Needs(gpus=2), {}, tmp_path / "x.log") is None
    assert two.start(command, Needs(gpus=3), {}, tmp_path / "x.log") is None
    assert (one.waiting, two.waiting) == ("", "another run has the GPUs")
    assert ended(start(two, "tell", tmp_path / "x", Needs(gpus=2))) == 4
    assert json.loads((tmp_path / "x").read_text())["CUDA_VISIBLE_DEVICES"] == "6,7"
    held.kill()
    assert ended(start(two, "tell", tmp_path / "x", Needs(gpus=3))) == 4
    assert json.loads((tmp_path / "x").read_text())["CUDA_VISIBLE_DEVICES"] == "6,7,4"


def test_more_gpus_than_the_run_has_are_unsupported_at_once(launch: Make, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"needs 2 GPUs, this run has 1 \(see --gpus\)"):
        start(launch(gpus=(0,)), "tell", tmp_path / "out", Needs(gpus=2))


def test_a_gpu_step_starts_anew_where_an_import_made_a_cuda_context(launch: Make, tmp_path: Path) -> None:
    (tmp_path / "modules" / "torch.py").write_text("class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
    launcher = launch("program", "torch", gpus=(0,))
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1))) == 4
    assert "started anew, since importing torch made a CUDA context" in (tmp_path / "out.log").read_text()
    facts = json.loads((tmp_path / "out").read_text())
    assert (facts["CUDA_VISIBLE_DEVICES"], facts["OMP_WAIT_POLICY"], facts["group"]) == ("0", "PASSIVE", True)
    assert ended(start(launcher, "tell", tmp_path / "two")) == 4
    assert "started anew" not in (tmp_path / "two.log").read_text()
    # The interpreter of the machine that plans may be another.
    child = launcher.start(
        ["/nowhere/python", "-P", "-m", "program", "tell", str(tmp_path / "three")],
        Needs(gpus=1),
        {},
        tmp_path / "three.log",
    )
    assert child is not None
    assert ended(child) == 4


def test_a_step_that_could_not_be_forked_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(forkserver.os, "fork", fork)
    ours, theirs = os.pipe()
    here, there = socket.socketpair()
    with open(ours, "rb") as replies, here, there:
        server = forkserver.Server(there, theirs, os.getpid())
        server.start({"id": 1, "command": [], "env": {}, "log": str(tmp_path / "log.txt"), "leases": 0})
        os.close(theirs)
        assert [json.loads(line)["event"] for line in replies] == ["started", "ended"]
    assert (tmp_path / "log.txt").read_text() == "mambabench: cannot fork: [Errno 12] Cannot allocate memory\n"


@pytest.mark.gpu
def test_the_server_holds_no_cuda_context_and_a_child_can_make_one(launch: Make, tmp_path: Path) -> None:
    (tmp_path / "modules" / "uses_cuda.py").write_text(
        "import torch\n\n\ndef main(arguments):\n    return int(torch.ones(3, device='cuda:0').sum())\n"
    )
    launcher = launch("torch", "transformers", "uses_cuda", gpus=(0,))
    until(lambda: launcher._awaited(), 120.0)
    assert launcher.ready is not None
    assert launcher.ready["cuda"] is None
    command = [sys.executable, "-P", "-m", "uses_cuda"]
    child = launcher.start(command, Needs(gpus=1), {}, tmp_path / "out.log")
    assert child is not None
    until(lambda: child.poll() is not None, 120.0)
    assert child.code == 3, (tmp_path / "out.log").read_text()
