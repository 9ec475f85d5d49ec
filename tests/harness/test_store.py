"""A store never shows half a step as a whole one, and says in one line what is wrong."""

import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from mambabench import MambabenchError
from mambabench.harness import store as module
from mambabench.harness.store import SCHEMA, Store

OK = {"state": "ok", "reason": "", "attempt": 1, "wall_s": 1.5, "started": 0.0, "detail": {"device": "cpu"}}


def whole(store: Store, key: str = "k") -> Path:
    store.prepare(key, {"kind": "measure"})
    store.begin(key)
    (store.partial(key) / "events.jsonl").write_text('{"kind":"fact"}\n')
    (store.partial(key) / "artifact" / "model.bin").write_bytes(b"12345")
    store.finish(key, OK)
    return store.finished(key)


def test_what_runs_of_one_store_add_to_its_run_file_at_once_is_all_there(store: Store) -> None:
    def add(label: int) -> None:
        with store.holding_run():
            run = store.run()
            store.write_run({**run, "asked": [*run.get("asked", []), label]})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(32)))
    assert sorted(store.run()["asked"]) == list(range(32))


def test_a_step_goes_from_absent_through_interrupted_to_ok(store: Store) -> None:
    assert store.state("k") == "absent"
    store.prepare("k", {"kind": "data"})
    assert store.state("k") == "absent"
    store.begin("k")
    (store.partial("k") / "events.jsonl").write_text("")
    assert store.state("k") == "interrupted"
    store.finish("k", OK)
    assert store.state("k") == "ok"
    assert store.keys() == ("k",)
    assert store.outcome("k")["detail"] == {"device": "cpu"}
    assert not store.partial("k").exists()
    assert not (store.finished("k") / "scratch").exists()


def test_a_failure_keeps_its_state_and_reason_until_the_next_attempt(store: Store) -> None:
    store.prepare("k", {})
    store.fail("k", {**OK, "state": "timeout", "reason": "not done after 3 s", "attempt": 2})
    assert (store.status("k").state, store.status("k").reason) == ("timeout", "not done after 3 s")
    assert store.outcome("k")["attempt"] == 2
    store.begin("k")
    assert store.state("k") == "absent"


def test_events_whose_bytes_changed_are_no_records_any_more(store: Store) -> None:
    file = whole(store) / "events.jsonl"
    assert store.records("k", "events.jsonl") == file
    # Read on its own, this would be taken for a line that a kill cut short.
    file.write_text('{"kind":"fact"]\n')
    assert store.state("k") == "ok"
    with pytest.raises(MambabenchError, match=r"events\.jsonl: damaged; delete the folder"):
        store.records("k", "events.jsonl")


@pytest.mark.parametrize(
    "text", ["", '{"state": "o', "[]", '{"state": "fine"}', '{"state": "ok"}', '{"state": "error"}']
)
def test_a_finished_step_with_a_damaged_outcome_is_not_done(store: Store, text: str) -> None:
    folder = whole(store)
    (folder / "outcome.json").write_text(text)
    status = store.status("k")
    assert status.state == "interrupted"
    assert str(folder) in status.reason
    assert store.outcome("k") is None
    assert store.keys() == ()


@pytest.mark.parametrize("name", ["events.jsonl", "artifact/model.bin"])
def test_a_finished_step_with_a_cut_or_missing_file_is_not_done(store: Store, name: str) -> None:
    file = whole(store) / name
    os.truncate(file, 2)
    assert store.state("k") == "interrupted"
    assert f"{name}: 2 bytes, where" in store.status("k").reason
    file.unlink()
    assert store.status("k").reason.endswith("missing")


def test_a_damaged_step_can_be_done_anew(store: Store) -> None:
    (whole(store) / "outcome.json").unlink()
    whole(store)
    assert store.state("k") == "ok"


def test_a_new_attempt_keeps_scratch_and_begins_the_artifact_anew(store: Store) -> None:
    store.prepare("k", {})
    store.begin("k")
    (store.partial("k") / "scratch" / "checkpoint").write_text("half")
    (store.partial("k") / "artifact" / "rubbish").write_text("half")
    store.begin("k")
    assert (store.partial("k") / "scratch" / "checkpoint").read_text() == "half"
    assert list((store.partial("k") / "artifact").iterdir()) == []


def stopped(store: Store, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A step that was killed at its end: as one of the functions that put it on disk was called."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    store.prepare("k", {})
    store.begin("k")
    (store.partial("k") / "scratch" / "checkpoint").write_text("whole")
    (store.partial("k") / "artifact" / "model.bin").write_bytes(b"12345")
    with monkeypatch.context() as patch:
        patch.setattr(module, where, stop) if hasattr(module, where) else patch.setattr(module.os, where, stop)
        with pytest.raises(KeyboardInterrupt):
            store.finish("k", OK)


def test_a_step_that_was_stopped_before_its_rename_is_completed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(store, monkeypatch, "rename")
    assert store.state("k") == "interrupted"
    store.complete("k")
    assert store.state("k") == "ok"
    assert (store.artifact("k") / "model.bin").read_bytes() == b"12345"
    assert not (store.finished("k") / "scratch").exists()
    assert not store.partial("k").exists()


@pytest.mark.parametrize("where", ["sync_tree", "write_json"])
def test_a_step_keeps_its_scratch_until_its_outcome_is_on_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stopped(store, monkeypatch, where)
    store.complete("k")
    assert store.state("k") == "absent"
    store.begin("k")
    assert (store.partial("k") / "scratch" / "checkpoint").read_text() == "whole"


@pytest.mark.parametrize("file", ["outcome.json", "artifact/model.bin"])
def test_a_step_that_is_damaged_is_not_completed(store: Store, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    stopped(store, monkeypatch, "rename")
    os.truncate(store.partial("k") / file, 3)
    store.complete("k")
    assert store.state("k") == "interrupted"
    assert not store.finished("k").exists()


class OldView:
    """A network file system on a machine that knows what it once saw of a folder, until it opens the folder anew."""

    def __init__(self) -> None:
        self.seen: dict[str, os.stat_result | OSError] = {}
        self.stat, self.open = os.stat, os.open

    @contextmanager
    def here(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.os, "stat", self.look)
            patch.setattr(module.os, "open", self.open_anew)
            yield

    def look(self, path: Any, *args: Any, **options: Any) -> os.stat_result:
        name = os.fspath(path)
        if name not in self.seen:
            try:
                self.seen[name] = self.stat(path, *args, **options)
            except OSError as error:
                self.seen[name] = error
        found = self.seen[name]
        if isinstance(found, OSError):
            raise found
        return found

    def open_anew(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECTORY:
            self.seen = {name: found for name, found in self.seen.items() if Path(name).parent != Path(path)}
        return self.open(path, flags, *args, **options)


def test_what_another_machine_finished_is_seen_by_who_takes_over(store: Store) -> None:
    store.prepare("k", {})
    view = OldView()
    with view.here():
        assert store.state("k") == "absent"
    whole(store)
    with view.here():
        assert store.state("k") == "absent"
        assert store.complete("k")
        assert store.state("k") == "ok"


def test_a_child_sees_what_another_machine_finished(store: Store) -> None:
    view = OldView()
    with view.here():
        assert store.state("input") == "absent"
    whole(store, "input")
    store.prepare("k", {})
    with view.here():
        store.begin("k")
        assert store.state("input") == "ok"


def test_a_step_that_failed_is_not_completed(store: Store) -> None:
    store.complete("k")
    store.prepare("k", {})
    store.complete("k")
    store.fail("k", {**OK, "state": "error"})
    store.complete("k")
    assert store.state("k") == "error"


def test_a_newer_schema_is_refused_in_one_line(store: Store) -> None:
    store.write_run({"schema": SCHEMA + 1})
    with pytest.raises(
        MambabenchError, match=rf"run\.json: written in schema {SCHEMA + 1}, .* up to {SCHEMA}; update"
    ) as e:
        Store.create(store.path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["{}", '{"schema": true}', '{"schema": "1"}', '{"sch', "[]"])
def test_a_strange_run_file_is_refused_by_name(store: Store, text: str) -> None:
    store.run_file.write_text(text)
    with pytest.raises(MambabenchError, match=r"run\.json: "):
        Store.open(store.path)


def test_a_folder_of_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for open_or_create in (Store.open, Store.create):
        with pytest.raises(MambabenchError, match=r"no run\.json"):
            open_or_create(tmp_path)
    assert Store.create(tmp_path / "new").run() == {"schema": SCHEMA}


def test_stores_that_are_created_at_the_same_moment_are_one(tmp_path: Path) -> None:
    together = Barrier(8)

    def create(path: Path) -> Store:
        together.wait()
        return Store.create(path)

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(10):
            stores = list(pool.map(create, [tmp_path / str(attempt)] * 8))
            assert [store.run() for store in stores] == [{"schema": SCHEMA}] * 8


def test_creating_a_store_beside_another_run_keeps_what_that_run_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = module.Lock.take

    def meanwhile(path: Path, **how: bool) -> module.Lock | None:
        Store(tmp_path).write_run({"plan": {"name": "first"}})
        return take(path, **how)

    monkeypatch.setattr(module.Lock, "take", meanwhile)
    assert Store.create(tmp_path).run()["plan"] == {"name": "first"}


def test_a_creation_that_was_killed_can_be_done_anew(tmp_path: Path) -> None:
    (tmp_path / ".run.json.123-0a1b2c3d.tmp").write_text('{"sch')
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "run").touch()
    assert Store.create(tmp_path).run() == {"schema": SCHEMA}


@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/nope", "file", "x" * 300])
def test_a_path_where_no_store_can_be_is_one_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for open_or_create in (Store.open, Store.create):
        with pytest.raises(MambabenchError) as e:
            open_or_create(path)
        assert str(e.value).startswith(f"{path}: ")
        assert "\n" not in str(e.value)


def test_run_json_is_read_back_as_written(store: Store) -> None:
    store.write_run({"plan": {"name": "tiny", "seeds": [0]}, "cells": []})
    assert Store.open(store.path).run() == {"schema": SCHEMA, "plan": {"name": "tiny", "seeds": [0]}, "cells": []}


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_run({"plan": {"name": "old"}})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.write_run({"plan": {"name": "new"}})
    assert store.run()["plan"] == {"name": "old"}


def test_a_full_disk_is_one_line_that_names_the_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(MambabenchError, match=r"run\.json: cannot be written, the disk is full; free some space") as e:
        store.write_run({})
    assert "\n" not in str(e.value)
    assert sorted(file.name for file in store.path.iterdir()) == ["locks", "run.json"]


def test_a_step_is_claimed_once_and_not_while_its_child_lives(store: Store) -> None:
    claim = store.claim("k")
    assert claim is not None
    assert store.claim("k") is None
    assert store.claim("other") is not None
    claim.release()
    child = module.Lock.take(store.child_lock("k"))
    assert child is not None
    assert store.claim("k") is None
    child.release()
    assert store.claim("k") is not None


def test_a_step_whose_child_lives_is_running(store: Store) -> None:
    store.prepare("k", {})
    child = module.Lock.take(store.child_lock("k"))
    assert child is not None
    assert store.state("k") == "running"
    store.begin("k")
    (store.partial("k") / "events.jsonl").write_text("")
    assert store.state("k") == "running"
    child.release()
    assert store.state("k") == "interrupted"


def test_outcomes_are_plain_json(store: Store) -> None:
    folder = whole(store)
    assert json.loads((folder / "outcome.json").read_text())["files"] == {
        "artifact/model.bin": 5,
        "events.jsonl": 16,
        "step.json": (folder / "step.json").stat().st_size,
    }
