"""The environment of a run is told fast, without the model stack, and without guesses."""

import subprocess
import sys
from pathlib import Path

import pytest
from mambabench.harness import environment


def test_it_is_told_fast_and_without_torch() -> None:
    script = (
        "import sys, time\nfrom mambabench.harness import environment\nbegan = time.perf_counter()\n"
        "facts, code = environment.capture(), environment.code()\ntook = time.perf_counter() - began\n"
        "assert took < 0.2, took\nassert 'torch' not in sys.modules\nassert facts['torch']\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_fact_is_text_and_not_empty() -> None:
    facts = environment.capture()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert {"python", "platform", "cpu", "cores", "memory_gib", "torch"} <= set(facts)


def test_plug_ins_add_facts_and_overwrite_none() -> None:
    facts = environment.capture({"cluster": "north", "python": "4.0"})
    assert facts["cluster"] == "north"
    assert facts["python"] != "4.0"


def test_settings_of_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    facts = environment.capture()
    assert facts["OMP_NUM_THREADS"] == "7"
    assert "a secret" not in facts.values()


def test_settings_tell_no_paths_since_they_name_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {
        "CUDA_HOME": "/home/someone/cuda",
        "TRITON_CACHE_DIR": "~/cache",
        "TORCH_HOME": "someone",
        "TORCH_LOGS_OUT": r"C:\someone\log.txt",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_PLACES": "",
    }
    for name, value in paths.items():
        monkeypatch.setenv(name, value)
    told = environment.settings()
    assert paths.keys() & told.keys() == {"PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"}


def test_speed_on_equal_gpus_has_equal_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ("NVIDIA H200", "NVIDIA H200", "NVIDIA A100"))
    monkeypatch.setattr(environment, "gpu_facts", lambda: {"driver": "570"})
    one = environment.machine_facts((0,))
    assert one == environment.machine_facts((0, 1)) == environment.machine_facts((1,))
    assert (one["gpu"], one["driver"]) == ("NVIDIA H200", "570")
    assert environment.machine_facts((0, 2))["gpu"] == environment.machine_facts((2, 1))["gpu"] != one["gpu"]


@pytest.mark.parametrize(
    ("change", "dirty"),
    [("", False), ("text.txt", False), ("room/module.py", True), ("with a space.py", True), ("file", True)],
)
def test_code_with_changes_or_new_modules_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, dirty: bool
) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    monkeypatch.setattr(environment, "checkout", lambda: tmp_path)
    if change:
        (tmp_path / change).parent.mkdir(exist_ok=True)
        (tmp_path / change).write_text("two")
    told = environment.code()
    assert len(str(told["revision"])) == 40
    assert told["dirty"] is dirty


def test_without_a_checkout_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "checkout", lambda: None)
    told = environment.code()
    assert (told["revision"], told["dirty"]) == (None, None)
    assert told["version"]
