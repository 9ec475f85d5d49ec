"""A step can be run by hand, and what goes wrong inside becomes a state with one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError, Unsupported
from mambabench.harness import child
from mambabench.harness.child import classify
from mambabench.harness.ranks import Failure
from mambabench.harness.store import Store

ACTING = Path(__file__).with_name("acting.py")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "state", "says"),
    [
        (Unsupported("no such mixer"), "unsupported", "no such mixer"),
        (MambabenchError("x.json: bad"), "error", "x.json: bad"),
        (MemoryError(), "out-of-memory", "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out-of-memory", "CUDA out of memory. Tried"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "out-of-memory", "allocate"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "out-of-memory", "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out-of-memory", "CUBLAS_STATUS"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out-of-memory", "Cannot allocate memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.bin"), "error", "the disk is full; free some space"),
        (Exception("I/O error: No space left on device (os error 28)"), "error", "the disk is full; free some space"),
        (KeyError("width"), "error", "KeyError: 'width'"),
        (SystemExit(2), "error", "SystemExit: 2"),
    ],
)
def test_an_exception_means_a_state_and_one_line(error: BaseException, state: str, says: str) -> None:
    found, reason = classify(raised(error))
    assert found == state
    assert says in reason
    assert "\n" not in reason


def by_hand(store: Store, do: str) -> subprocess.CompletedProcess[str]:
    component = {"kind": "source", "name": "act", "config": {"do": do}}
    step = {"kind": "data", "seed": 0, "labels": ["data/x"], "inputs": {}, "component": component}
    store.prepare("k", {**step, "needs": {"gpus": 0, "alone": False, "timeout_s": 9.0}})
    command = [sys.executable, "-P", "-m", "mambabench.harness.child", str(store.path), "k", "--plugin", str(ACTING)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_step_runs_by_hand(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    failed = by_hand(store, "error")
    assert failed.returncode == 0
    assert failed.stderr.splitlines()[-1] == "error: ValueError: a bug with two lines"
    assert store.state("k") == "error"
    assert by_hand(store, "finish").returncode == 0
    assert store.state("k") == "ok"
    outcome = store.outcome("k")
    assert outcome is not None
    assert outcome["code"]["version"]


def test_a_step_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "store")
    store.prepare("k", {"kind": "data", "seed": 0, "labels": ["a/b"], "needs": {"gpus": 0, "timeout_s": 9.0}})
    (store.partial("k") / "events.jsonl").mkdir()
    assert child.main([str(store.path), "k"]) == 0
    assert store.state("k") == "error"
    assert "events.jsonl: cannot be written, Is a directory" in store.status("k").reason


def test_a_rank_that_died_is_said_to_have_died_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "together", lambda ranks, work: Failure(1, None, -9))
    for gpus, device in ((2, "cuda:1"), (0, "cpu")):
        store = Store.create(tmp_path / device)
        step = {"kind": "train", "seed": 0, "labels": ["a/b"], "needs": {"gpus": gpus, "ranks": 2, "timeout_s": 9.0}}
        store.prepare("k", step)
        assert child.main([str(store.path), "k"]) == 0
        outcome = store.outcome("k")
        assert outcome is not None
        assert (outcome["reason"], outcome["detail"]["device"]) == ("rank 1: killed by SIGKILL", device)


def test_a_step_on_a_gpu_says_by_which_kernels_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"scan": {"fused": False, "reasons": ["mamba-ssm is not installed"]}}
    monkeypatch.setattr("mambabench.backends.hybrid.TeacherBackend.kernels", lambda self: told)
    for device, kernels in (("cuda:0", told), ("cpu", None)):
        monkeypatch.setattr(child, "_device", lambda step, rank, device=device: device)
        store = Store.create(tmp_path / device)
        component = {"kind": "source", "name": "act", "config": {"do": "finish"}}
        step = {"kind": "data", "seed": 0, "labels": ["data/x"], "inputs": {}, "component": component}
        backend = {"kind": "backend", "name": "teacher", "config": {}}
        step |= {"backend": backend, "needs": {"gpus": 1, "timeout_s": 9.0}}
        store.prepare("k", step)
        store.begin("k")
        failure = child.work_on(store, "k", step, [ACTING], child.Attempt())
        assert failure is None
        assert store.outcome("k")["detail"].get("kernels") == kernels
