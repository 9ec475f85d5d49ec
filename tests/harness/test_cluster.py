"""On a Ray cluster steps run where there is room, end as at home, and what a lost machine did is done elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from mambabench import MambabenchError, Needs, Unsupported
from mambabench.harness import plugins
from mambabench.harness.environment import host
from mambabench.harness.launchers.configs import RayConfig
from mambabench.harness.launchers.leases import QUIET, runtime_folder
from mambabench.harness.locks import Lock
from mambabench.harness.progress import Silent
from mambabench.harness.runner import Summary, run
from mambabench.harness.steps import Step
from mambabench.harness.store import Store

ray = pytest.importorskip("ray", reason="ray is not installed here")

HERE = Path(__file__).parent
ACTING = HERE / "acting.py"
STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="session")
def processes(loaded: Callable[[Path], ModuleType]) -> ModuleType:
    return loaded(HERE.parent / "processes.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no steps, a machine of two cores, and one of four cores and two GPUs, which are made up."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
        patch.setenv("RAY_ADDRESS", made.address)
        made.add_node(num_cpus=2, **STORE)
        made.add_node(num_cpus=4, num_gpus=2, **STORE)
        yield made
        made.shutdown()


Make = Callable[..., Any]


@pytest.fixture
def launch(cluster: Any) -> Iterator[Make]:
    from mambabench.harness.launchers.cluster import RayLauncher

    made = []

    def make(*modules: str, **config: Any) -> Any:
        launcher = RayLauncher(RayConfig(**config))
        made.append(launcher)
        launcher.prepare(modules)
        return launcher

    yield make
    for launcher in made:
        launcher.close()


@pytest.fixture
def start(processes: ModuleType) -> Callable[..., Any]:
    def start(launcher: Any, what: str, out: Path, needs: Needs = Needs(), **env: str) -> Any:  # noqa: B008
        command = [sys.executable, "-P", "-m", "program", what, str(out)]
        found: list[Any] = []

        def started() -> bool:
            child = launcher.start(command, needs, env, out.with_suffix(".log"))
            found.extend([child] if child else [])
            return bool(found)

        processes.until(started)
        return found[0]

    return start


@pytest.fixture
def ended(processes: ModuleType) -> Callable[[Any], int]:
    def ended(child: Any) -> int:
        processes.until(lambda: child.poll() is not None)
        return child.code

    return ended


@pytest.fixture
def family(processes: ModuleType) -> Callable[[Path], list[int]]:
    def family(out: Path) -> list[int]:
        processes.until(out.exists)
        pids = [int(word) for word in out.read_text().split()]
        assert processes.living(pids) == pids
        return pids

    return family


def machine_of(child: int) -> int:
    """The process of the machine's raylet that a step's child descends from."""
    return next(each.pid for each in psutil.Process(child).parents() if "raylet" in each.name())


def test_a_child_gets_its_arguments_surroundings_and_log(launch, start, ended, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("MAMBABENCH_PLUGINS_BLOCK", "another")
    child = start(launch(threads=2), "tell", tmp_path / "out", GIVEN="yes")
    assert ended(child) == 4
    facts = json.loads((tmp_path / "out").read_text())
    assert facts["argv"] == ["program", "tell", str(tmp_path / "out")]
    assert (facts["OMP_NUM_THREADS"], facts["OMP_WAIT_POLICY"], facts["GIVEN"]) == ("2", "PASSIVE", "yes")
    assert (facts["CUDA_VISIBLE_DEVICES"], facts["group"]) == ("", True)
    assert facts["MAMBABENCH_PLUGINS_BLOCK"] == "another"
    assert os.getcwd() not in facts["path"]
    assert "said on standard output" in (tmp_path / "out.log").read_text()


def test_ray_gives_steps_the_gpus_that_they_need(launch, start, ended, tmp_path):
    launcher = launch(gpus=())
    assert ended(start(launcher, "tell", tmp_path / "both", Needs(gpus=2))) == 4
    assert json.loads((tmp_path / "both").read_text())["CUDA_VISIBLE_DEVICES"] == "0,1"
    one, two = (start(launcher, "hang", tmp_path / name, Needs(gpus=1)) for name in ("one", "two"))
    command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / "out")]
    until_then = time.monotonic() + 1.0
    while time.monotonic() < until_then:
        assert launcher.start(command, Needs(gpus=1), {}, tmp_path / "out.log") is None
    one.kill()
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1))) == 4
    assert json.loads((tmp_path / "out").read_text())["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    two.kill()


def test_steps_may_share_a_gpu(launch, start, ended, tmp_path):
    launcher = launch(share=2)
    hanging = [start(launcher, "hang", tmp_path / str(number), Needs(gpus=1)) for number in range(3)]
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1))) == 4
    assert json.loads((tmp_path / "out").read_text())["MAMBABENCH_SHARE"] == "2"
    for child in hanging:
        child.kill()


def test_steps_run_on_several_machines_at_once_and_places_serve_again(launch, start, ended, family, tmp_path):
    launcher = launch()
    children = [start(launcher, "hang", tmp_path / str(number)) for number in range(5)]
    pids = [family(tmp_path / str(number))[0] for number in range(5)]
    assert len({machine_of(pid) for pid in pids}) == 2
    servers = {psutil.Process(pid).ppid() for pid in pids}
    children[0].kill()
    assert ended(start(launcher, "tell", tmp_path / "out")) == 4
    assert json.loads((tmp_path / "out").read_text())["parent"] in servers


def test_places_of_several_sizes_are_kept_until_they_have_imported(launch, ended, processes, tmp_path, monkeypatch):
    from mambabench.harness.launchers import cluster

    monkeypatch.setattr(cluster, "IDLE_S", 1.5)
    launcher = launch("slow_import")
    kinds = {"small": Needs(), "large": Needs(gpus=1), "both": Needs(gpus=2)}
    children: dict[str, Any] = {}

    def all_ended() -> bool:
        for name, needs in kinds.items():
            if name not in children:
                command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / name)]
                child = launcher.start(command, needs, {}, tmp_path / f"{name}.log")
                children.update({name: child} if child else {})
        codes = [child.poll() for child in children.values()]
        return len(codes) == len(kinds) and None not in codes

    processes.until(all_ended)
    assert [child.code for child in children.values()] == [4, 4, 4]


def test_a_place_that_no_step_waits_for_any_more_takes_nothing_of_the_cluster(
    launch, start, ended, processes, tmp_path, monkeypatch
):
    from mambabench.harness.launchers import cluster

    monkeypatch.setattr(cluster, "IDLE_S", 1.0)
    launcher = launch()
    command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / "out")]
    assert launcher.start(command, Needs(gpus=2), {}, tmp_path / "out.log") is None
    [asked] = launcher._asked.values()
    processes.until(lambda: ray.wait([asked.known], timeout=0)[0])
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1))) == 4


def test_places_that_nothing_waits_for_are_given_back_while_others_work(
    launch, start, ended, processes, tmp_path, monkeypatch
):
    from mambabench.harness.launchers import cluster

    monkeypatch.setattr(cluster, "IDLE_S", 1.0)
    launcher = launch()
    long = start(launcher, "hang", tmp_path / "long", Needs(gpus=1))
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(gpus=1))) == 4
    assert ray.available_resources().get("GPU", 0.0) == 0.0
    processes.until(lambda: long.poll() is None and ray.available_resources().get("GPU") == 1.0, 20.0)
    long.kill()


def test_a_step_says_that_the_cluster_is_full(launch, start, tmp_path, monkeypatch):
    from mambabench.harness.launchers import cluster

    monkeypatch.setattr(cluster, "IDLE_S", 1.0)
    busy = start(launch(), "hang", tmp_path / "busy", Needs(gpus=2))
    launcher = launch()
    command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / "out")]
    until_then = time.monotonic() + 20.0
    while not launcher.waiting and time.monotonic() < until_then:
        assert launcher.start(command, Needs(gpus=1), {}, tmp_path / "out.log") is None
        time.sleep(0.02)
    assert launcher.waiting == "Ray has no room for 1 CPU core and 1 GPU yet"
    busy.kill()


def test_a_step_that_waits_for_a_judge_runs_at_home_with_its_key(launch, start, ended, family, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "a key")
    launcher = launch(jobs=1)
    busy = start(launcher, "hang", tmp_path / "busy")
    judging = start(launcher, "hang", tmp_path / "judging", Needs(light=True))
    process = psutil.Process(family(tmp_path / "judging")[0])
    assert not any("raylet" in each.name() for each in process.parents())
    assert process.environ()["SECRET"] == "a key"
    assert launcher.start([], Needs(light=True), {}, tmp_path / "more.log") is None
    judging.kill()
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(light=True))) == 4
    busy.kill()


def test_kill_and_close_end_all_that_a_child_started(launch, start, family, processes, tmp_path):
    launcher = launch()
    one, two = (start(launcher, "hang", tmp_path / name) for name in ("one", "two"))
    pids = family(tmp_path / "one")
    one.kill()
    assert one.poll() == -signal.SIGKILL
    processes.gone_soon(pids)
    pids = family(tmp_path / "two")
    launcher.close()
    processes.gone_soon(pids)
    assert two.code is None


def test_a_step_whose_worker_is_killed_ends_with_all_that_it_started_and_others_follow(
    launch, start, ended, family, processes, tmp_path
):
    launcher = launch()
    child = start(launcher, "hang", tmp_path / "out")
    pids = family(tmp_path / "out")
    server = psutil.Process(pids[0]).parent()
    server.parent().kill()
    processes.gone_soon([*pids, server])
    assert ended(child) == -signal.SIGKILL
    assert re.fullmatch(r"its worker on \S+ is lost to the cluster \(.*worker process has died.*\)", child.why)
    assert [*launcher._idle, *launcher._busy] == []
    assert ended(start(launcher, "tell", tmp_path / "again")) == 4


def test_the_end_by_a_signal_is_told(launch, start, ended, tmp_path):
    assert ended(start(launch(), "kill", tmp_path / "out")) == -signal.SIGTERM


def test_nothing_lives_two_seconds_after_the_run_was_killed(cluster, family, processes, tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from mambabench.harness.interfaces import Needs
        from mambabench.harness.launchers.cluster import RayLauncher
        from mambabench.harness.launchers.configs import RayConfig
        launcher = RayLauncher(RayConfig())
        for name in ("one", "two"):
            out = Path({str(tmp_path)!r}, name)
            command = [sys.executable, "-P", "-m", "program", "hang", str(out)]
            while launcher.start(command, Needs(), {{}}, out.with_suffix(".log")) is None:
                time.sleep(0.01)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script]) as driver:
        processes.until(lambda: (tmp_path / "two").exists())
        pids = [*family(tmp_path / "one"), *family(tmp_path / "two")]
        servers = [psutil.Process(pids[0]).ppid(), psutil.Process(pids[4]).ppid()]
        driver.kill()
    processes.gone_soon([*pids, *servers])


def test_a_step_that_must_be_alone_waits_for_the_quiet_of_its_machine(launch, start, ended, tmp_path):
    launcher = launch()
    held = Lock.take(runtime_folder() / QUIET, shared=True)
    assert held is not None
    command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / "out")]
    until_then = time.monotonic() + 60.0
    while not launcher.waiting and time.monotonic() < until_then:
        assert launcher.start(command, Needs(alone=True), {}, tmp_path / "out.log") is None
    assert launcher.waiting == "it must be alone, and another run is at work on this machine"
    held.release()
    assert ended(start(launcher, "tell", tmp_path / "out", Needs(alone=True))) == 4


@pytest.fixture
def odd_machine(cluster: Any, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """`odd_machine(code)`: the only machine of eight cores, whose Pythons run some code first."""
    added = []

    def add(code: str) -> Any:
        (tmp_path / "odd").mkdir()
        (tmp_path / "odd" / "sitecustomize.py").write_text(textwrap.dedent(code))
        path = os.pathsep.join([str(tmp_path / "odd"), os.environ["PYTHONPATH"]])
        added.append(cluster.add_node(num_cpus=8, env_vars={"PYTHONPATH": path}, **STORE))
        return added[0]

    yield add
    for node in added:
        cluster.remove_node(node)


def test_speed_is_measured_on_a_machine_of_the_kind_that_plans(
    cluster, launch, start, ended, family, odd_machine, tmp_path
):
    odd = odd_machine("""
        from mambabench.harness import environment
        environment.cpu_model = lambda: "an abacus"
    """)
    launcher = launch(threads=8)
    with pytest.raises(Unsupported, match=r"is another kind of machine than the one that plans: cpu an abacus, not "):
        start(launcher, "tell", tmp_path / "out", Needs(alone=True))
    busy = start(launcher, "hang", tmp_path / "busy")
    assert machine_of(family(tmp_path / "busy")[0]) == odd.all_processes["raylet"][0].process.pid
    busy.kill()
    right = cluster.add_node(num_cpus=8, **STORE)
    child = start(launcher, "hang", tmp_path / "alone", Needs(alone=True))
    assert machine_of(family(tmp_path / "alone")[0]) == right.all_processes["raylet"][0].process.pid
    child.kill()
    launcher.close()
    cluster.remove_node(right)


def test_speed_is_not_measured_where_all_machines_are_of_another_kind(launch, start, ended, tmp_path):
    launcher = launch()
    launcher._facts = {**launcher._facts, "cpu": "an abacus"}
    with pytest.raises(Unsupported, match=r"is another kind of machine than the one that plans: .*not an abacus"):
        start(launcher, "tell", tmp_path / "out", Needs(alone=True))
    assert ended(start(launcher, "tell", tmp_path / "out")) == 4


def test_what_no_machine_has_is_unsupported_at_once(launch, start, tmp_path):
    with pytest.raises(Unsupported, match="needs 1 CPU core and 3 GPUs on one machine, and no machine of the Ray"):
        start(launch(), "tell", tmp_path / "out", Needs(gpus=3))
    with pytest.raises(Unsupported, match="needs 6 CPU cores on one machine"):
        start(launch(threads=2), "tell", tmp_path / "out", Needs(ranks=3))


def test_no_more_children_than_jobs(launch, start, ended, tmp_path):
    launcher = launch(jobs=1)
    child = start(launcher, "hang", tmp_path / "out")
    command = [sys.executable, "-P", "-m", "program", "tell", str(tmp_path / "two")]
    assert launcher.start(command, Needs(), {}, tmp_path / "two.log") is None
    child.kill()
    assert ended(start(launcher, "tell", tmp_path / "two")) == 4


def test_a_store_that_a_machine_does_not_see_is_one_line(launch, start, tmp_path):
    with pytest.raises(MambabenchError, match=r"^\S+: has no folder \S+; the launcher 'ray' needs a store") as e:
        start(launch(), "tell", tmp_path / "nowhere" / "out")
    assert "\n" not in str(e.value)


def test_another_version_on_a_machine_is_one_line(launch, start, tmp_path):
    launcher = launch()
    launcher._code = {"version": "0.0.1", "revision": None, "dirty": None}
    with pytest.raises(MambabenchError, match=r"runs mambabench .*, this is 0\.0\.1$"):
        start(launcher, "tell", tmp_path / "out")


def test_another_version_of_a_package_on_a_machine_is_one_line(launch, start, tmp_path):
    launcher = launch()
    launcher._versions = {**launcher._versions, "torch": "1.0.0+cpu", "abacus": "7"}
    with pytest.raises(
        MambabenchError, match=r": has torch [\d.]+\S*, no abacus; this machine has torch 1.0.0\+cpu, abac"
    ):
        start(launcher, "tell", tmp_path / "out")
    # Builds of one version are for CPU or GPU.
    launcher._versions = {"torch": launch()._versions["torch"].partition("+")[0] + "+another"}
    assert start(launcher, "tell", tmp_path / "out") is not None


def test_a_machine_without_the_package_is_one_line(launch, start, odd_machine, tmp_path):
    odd_machine("""
        import sys
        sys.modules["mambabench"] = None
    """)
    with pytest.raises(MambabenchError, match=r"^[\d.]+ of the Ray cluster cannot run steps: .*mambabench") as e:
        start(launch(threads=8), "tell", tmp_path / "out")
    assert "\n" not in str(e.value)


def act(key: str, do: str = "finish", needs: Needs = Needs(), **config: Any) -> Step:  # noqa: B008
    record = {"seed": 5, "model": "", "backend": None, "teacher_backend": None, "inputs": {}, "data": {}, "models": {}}
    record["component"] = {"kind": "source", "name": "act", "config": {"do": do, **config}}
    return Step(key=key, kind="data", labels=(f"data/{key}",), needs=needs, record=record, modules=frozenset())


def test_time_limits_and_ctrl_c_end_steps_with_all_that_they_started(launch, processes, tmp_path):
    class Stops(Silent):
        """Is Ctrl-C, once the step `b` has its family."""

        def started(self, key, label, attempt):
            if key == "b":
                processes.until((tmp_path / "b").exists)
                processes.until(lambda: (tmp_path / "b").read_text().endswith("\n"))
                raise KeyboardInterrupt

    def go(*steps: Step) -> Summary:
        return run(steps, store, launcher, plugins.load([ACTING]), host=host(), progress=Stops())

    def trace(key: str) -> list[int]:
        return [int(word) for line in (tmp_path / key).read_text().splitlines() for word in line.split()[1:]]

    store, launcher = Store.create(tmp_path / "store"), launch("numpy")
    late = act("a", "family", Needs(timeout_s=5.0), trace=str(tmp_path / "a"))
    assert go(late).counts == {"timeout": 1}
    assert store.status("a").reason == "not done after 5 s"
    processes.gone_soon(trace("a"))
    summary = go(act("b", "family", trace=str(tmp_path / "b")))
    assert (summary.counts, summary.stopped) == ({"cancelled": 1}, True)
    processes.gone_soon(trace("b"))
    assert go(act("c")).counts == {"ok": 1}


def test_what_a_lost_machine_did_is_done_on_another(cluster, launch, processes, tmp_path):
    large = {"num_cpus": 8, **STORE}
    lost = cluster.add_node(**large)
    raylet = lost.all_processes["raylet"][0].process.pid
    ends: list[tuple[str, str]] = []

    class KillsTheMachine(Silent):
        """Kills the only machine that is large enough once it works on a step, and brings another."""

        def __init__(self) -> None:
            self.victims: list[psutil.Process] = []

        def finished(self, key, label, outcome, final):
            ends.append((outcome.state, outcome.reason))

        def started(self, key, label, attempt):
            if not self.victims:
                processes.until(lambda: processes.halt_a_step(raylet))
                self.victims = processes.descendants(raylet)
                cluster.remove_node(lost, allow_graceful=False)
                self.other = cluster.add_node(**large)

    progress, launcher = KillsTheMachine(), launch("numpy", threads=8)
    steps, store = [act(f"k{number}") for number in range(3)], Store.create(tmp_path / "store")
    summary: Summary = run(steps, store, launcher, plugins.load([ACTING]), host=host(), progress=progress)
    assert summary.counts == {"ok": 3}
    assert [state for state, _ in ends] == ["crashed", "ok", "ok", "ok"]
    assert "is lost to the cluster" in ends[0][1]
    assert len(summary.ran) == 4
    processes.gone_soon(progress.victims)
    cluster.remove_node(progress.other)
