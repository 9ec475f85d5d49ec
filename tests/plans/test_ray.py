"""The default plan, made small, on a Ray cluster that loses a machine: it completes, with a local run's numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed here")

HERE = Path(__file__).parent
STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_plan_that_loses_a_machine_has_the_numbers_of_a_local_run(cluster, loaded, mambabench, tmp_path):
    files = (HERE / "test_tiny.py", HERE.parent / "processes.py", HERE.parent / "killing.py")
    tiny, processes, killing = map(loaded, files)
    lost = cluster.add_node(num_cpus=1, **STORE)
    cluster.add_node(num_cpus=1, **STORE)
    raylet = lost.all_processes["raylet"][0].process.pid
    away = tmp_path / "away"
    command = [sys.executable, "-m", "mambabench", *map(str, tiny.words(away)), "--launcher", "ray"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:

        def caught():
            """A step on that machine, some way into the plan, which will not end by itself any more."""
            return len(tiny.finished(away)) >= 6 and processes.halt_a_step(raylet)

        processes.until(lambda: caught() or run.poll() is not None, 240.0)
        victims = processes.descendants(raylet)
        cluster.remove_node(lost, allow_graceful=False)
        said, _ = run.communicate()
    assert run.returncode == 0, said
    assert "is lost to the cluster" in said
    processes.gone_soon(victims)
    here = tmp_path / "here"
    assert mambabench(*tiny.words(here)).returncode == 0
    assert killing.quality(away) == killing.quality(here)
