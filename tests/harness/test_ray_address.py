"""What keeps a run from joining a Ray cluster is one line, at once."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
from mambabench import MambabenchError

ray = pytest.importorskip("ray", reason="ray is not installed here")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address where something else than Ray listens, which is told to be Ray's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address


def refusal() -> str:
    from mambabench.harness.launchers.cluster import connect

    with pytest.raises(MambabenchError) as error:
        connect()
    return str(error.value)


def test_a_machine_that_is_no_part_of_the_cluster_is_told_how_to_become_one(elsewhere, monkeypatch):
    monkeypatch.setattr(psutil, "process_iter", lambda *_: [])
    assert refusal() == (
        f"RAY_ADDRESS={elsewhere}: this machine is no part of that cluster; `ray start --address={elsewhere} "
        "--num-cpus=0` makes it one, without steps of its own"
    )


def test_a_wrong_address_is_refused_with_the_right_one(elsewhere, monkeypatch):
    raylet = SimpleNamespace(info={"name": "raylet", "cmdline": ["raylet", "--gcs-address=10.0.0.1:1"]})
    monkeypatch.setattr(psutil, "process_iter", lambda *_: [raylet])
    assert refusal() == f"RAY_ADDRESS={elsewhere}: this machine is a part of 10.0.0.1:1 instead"


def test_an_address_for_clients_of_ray_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert refusal() == "RAY_ADDRESS=ray://head:10001: an address for clients of Ray; HEAD:6379 would be right"


def test_a_cluster_of_another_python_is_told_whole(monkeypatch):
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50\n    Python: 3.9.1\nThis")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    assert refusal() == "Version mismatch: The cluster was started with: Ray: 2.50 Python: 3.9.1 This"


def test_without_a_cluster_there_is_one_line(mambabench, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('schema = 1\nname = "x"\n[teacher]\npath = "teacher"\n')
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    words = ("run", plan, "--store", tmp_path / "store", "--launcher", "ray")
    done = mambabench(*words, RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="disabled")
    assert done.returncode == 1
    assert "mambabench: no Ray cluster was found" in done.stderr
    assert "Traceback" not in done.stderr
