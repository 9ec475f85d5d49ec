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


def test_code_tells_a_revision_with_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    monkeypatch.setattr(environment, "checkout", lambda: tmp_path)
    clean = environment.code()
    assert len(str(clean["revision"])) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert environment.code()["dirty"] is True


def test_without_a_checkout_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "checkout", lambda: None)
    told = environment.code()
    assert (told["revision"], told["dirty"]) == (None, None)
    assert told["version"]
