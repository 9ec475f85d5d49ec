"""Locks for parts of the host lie in the user's own folder and vanish with their holder."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mambabench import MambabenchError, Needs
from mambabench.harness.launchers import leases
from mambabench.harness.locks import Lock


def test_the_runtime_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = leases.runtime_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(leases.os, "getuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setattr(leases.os, "access", lambda *_: True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(MambabenchError, match="belongs to another user; set XDG_RUNTIME_DIR"):
        leases.runtime_folder()


def test_gpus_are_taken_all_or_none(tmp_path: Path) -> None:
    one = leases.take(Needs(gpus=2), (0, 1, 2), tmp_path)
    assert one is not None
    assert one.gpus == (0, 1)
    assert leases.take(Needs(gpus=2), (0, 1, 2), tmp_path) is None
    two = leases.take(Needs(gpus=1), (0, 1, 2), tmp_path)
    assert two is not None
    assert two.gpus == (2,)
    one.release()
    assert leases.take(Needs(gpus=2), (0, 1, 2), tmp_path) is not None


def test_a_gpu_is_shared_by_as_many_steps_as_may(tmp_path: Path) -> None:
    held = [leases.take(Needs(gpus=1), (0, 1), tmp_path, share=2) for _ in range(5)]
    assert held[4] is None
    some = [lease for lease in held if lease is not None]
    assert [lease.gpus for lease in some] == [(0,), (1,), (0,), (1,)]
    assert {lease.share for lease in some} == {2}
    # Those that want a GPU for themselves wait for all who share it, and the other way round.
    for needs in (Needs(gpus=1, alone=True), Needs(gpus=2)):
        assert leases.take(needs, (0, 1), tmp_path, share=2) is None
    assert leases.take(Needs(gpus=1), (0, 1), tmp_path) is None
    for lease in some:
        lease.release()
    both = leases.take(Needs(gpus=2), (0, 1), tmp_path, share=2)
    assert both is not None
    assert both.share == 1
    assert leases.take(Needs(gpus=1), (0, 1), tmp_path, share=2) is None
    both.release()
    assert leases.take(Needs(gpus=1), (0, 1), tmp_path, share=2) is not None


def test_quiet_is_shared_by_all_and_held_by_one_alone(tmp_path: Path) -> None:
    some = [leases.take(Needs(), (), tmp_path) for _ in range(2)]
    assert leases.take(Needs(alone=True), (), tmp_path) is None
    for lease in some:
        assert lease is not None
        lease.release()
    alone = leases.take(Needs(alone=True), (), tmp_path)
    assert alone is not None
    assert leases.take(Needs(), (), tmp_path) is None
    assert leases.take(Needs(alone=True), (), tmp_path) is None
    alone.release()
    assert leases.take(Needs(), (), tmp_path) is not None


def test_a_lock_vanishes_with_its_holder_and_not_before(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom mambabench.harness.locks import Lock\n"
        "held = Lock.take(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert Lock.take(tmp_path / "lock") is None
    holder.kill()
    holder.communicate()
    assert Lock.take(tmp_path / "lock") is not None
