"""Files that several steps use: made by one of them, whole or not at all."""

import threading
import time

import pytest
from mambabench.harness.cache import make_once


def test_of_many_at_once_one_writes(tmp_path):
    writing = []

    def write(file):
        writing.append(file)
        file.write_text("half")
        time.sleep(0.05)
        file.write_text("whole")

    seen = []

    def want():
        assert make_once(tmp_path / "cache" / "a.txt", write)
        seen.append((tmp_path / "cache" / "a.txt").read_text())

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["whole"] * 4
    assert len(writing) == 1


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert not make_once(tmp_path / "file" / "a.txt", lambda file: file.write_text("a"))

    def fill(file):
        file.write_text("half")
        raise OSError(28, "no space left")

    assert not make_once(tmp_path / "a.txt", fill)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["file"]


def test_what_a_kill_left_is_cleared(tmp_path):
    (tmp_path / "a.123.partial").write_text("half")
    assert make_once(tmp_path / "a.txt", lambda file: file.write_text("a"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lock", "a.txt"]


def test_an_error_of_the_maker_is_its_own(tmp_path):
    def fail(file):
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        make_once(tmp_path / "a.txt", fail)
    assert make_once(tmp_path / "a.txt", lambda file: file.write_text("a"))
