"""Records are on disk before `emit` returns, are what they say they are, and become one parquet file per kind."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench import MambabenchError
from mambabench.harness.events import Recorder, events, plain

SAMPLE = {"task": "t", "item": "i", "metric": "acc", "value": 1.0}
BURST = {"arm": "subject", "block": 0, "row": 0, "burst": 0, "at_s": 0.5, "tokens": 3}


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, "key")


def rows(folder: Path, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


def test_each_record_is_a_line_on_disk_when_emit_returns(recorder: Recorder, tmp_path: Path) -> None:
    for done in range(1, 4):
        recorder("progress", done=done, total=3, unit="steps")
        lines = (tmp_path / "events.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["done"] == done
        assert len(lines) == done + 1


def test_scalars_of_torch_and_numpy_become_numbers(recorder: Recorder, tmp_path: Path) -> None:
    recorder("sample", **SAMPLE | {"value": torch.tensor(0.5)})
    recorder("sample", **SAMPLE | {"value": np.float32(0.25), "batch": np.int64(4), "cluster": "c"})
    recorder("burst", **BURST | {"at_s": 1, "tokens": torch.tensor(4), "content": "prose"})
    assert recorder.finish() == []
    one, two = rows(tmp_path, "samples")
    assert (one["value"], one["weight"], one["cluster"], one["better"], one["key"]) == (0.5, 1.0, "i", "higher", "key")
    assert (two["value"], two["batch"], two["cluster"]) == (0.25, 4, "c")
    assert rows(tmp_path, "timings")[0]["at_s"] == 1.0
    assert not (tmp_path / "rounds.parquet").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan")), np.float64("-inf")])
def test_a_quality_that_is_no_number_is_an_error_that_names_the_metric(recorder: Recorder, value: object) -> None:
    with pytest.raises(MambabenchError, match="metric 'acc' of t, item i is not a finite number"):
        recorder("sample", **SAMPLE | {"value": value})


def test_a_loss_that_diverged_is_kept_as_null(recorder: Recorder, tmp_path: Path) -> None:
    recorder("loss", step=1, tokens=1, loss=2.0, kl=0.1)
    recorder("loss", step=2, tokens=2, loss=float("nan"), kl=float("inf"))
    recorder.finish()
    assert [(row["loss"], row["kl"]) for row in rows(tmp_path, "losses")] == [(2.0, 0.1), (None, None)]


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("sample", {"task": "t"}, "lacks 'item'"),
        ("sample", SAMPLE | {"value": "1"}, "'value' of a 'sample' record is '1'"),
        ("burst", BURST | {"tokens": 1.5}, "'tokens' of a 'burst' record is 1.5, where int"),
        ("burst", BURST | {"row": True}, "'row' of a 'burst' record is True"),
        ("mine", {"what": object()}, "cannot hold a object"),
        ("attempt", {}, "the harness's own"),
    ],
)
def test_a_record_that_lies_is_refused_in_one_line(recorder: Recorder, kind: str, fields: dict, says: str) -> None:
    with pytest.raises(MambabenchError, match=says) as e:
        recorder(kind, **fields)
    assert "\n" not in str(e.value)


def test_unknown_kinds_are_kept(recorder: Recorder, tmp_path: Path) -> None:
    recorder("profile", path=Path("/x"), nested={"a": [torch.tensor([1, 2])]})
    recorder.finish()
    last = list(events(tmp_path / "events.jsonl"))[-1]
    assert (last["kind"], last["path"], last["nested"]) == ("profile", "/x", {"a": [[1, 2]]})


def test_facts_are_told_once_each_with_their_last_value(recorder: Recorder) -> None:
    recorder("fact", name="rounds", value=1, arm="subject")
    recorder("fact", name="rounds", value=2, arm="subject", unit="1")
    recorder("fact", name="rounds", value=3, arm="reference")
    assert [(fact["arm"], fact["value"], fact["unit"]) for fact in recorder.finish()] == [
        ("subject", 2, "1"),
        ("reference", 3, ""),
    ]


def test_first_and_last_record_are_timed_and_progress_is_one(recorder: Recorder) -> None:
    assert recorder.first is recorder.last is None
    recorder("progress", done=0, total=1)
    began = recorder.first
    assert began is not None
    recorder("fact", name="a", value=1)
    assert recorder.first == began
    assert recorder.last is not None
    assert recorder.last > began


def test_an_interrupted_attempt_gives_only_the_losses_before_the_next_took_over(tmp_path: Path) -> None:
    first = Recorder(tmp_path, "key", attempt=1)
    first("sample", **SAMPLE)
    for step in (1, 2, 3):
        first("loss", step=step, tokens=step, loss=float(step))
    first.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"kind":"loss","step":4,"tok')
    second = Recorder(tmp_path, "key", attempt=2)
    second("loss", step=3, tokens=3, loss=30.0)
    second.finish()
    assert [row["loss"] for row in rows(tmp_path, "losses")] == [1.0, 2.0, 30.0]
    assert not (tmp_path / "samples.parquet").exists()


def test_an_attempt_with_nothing_left_to_train_keeps_the_losses_of_the_earlier_ones(tmp_path: Path) -> None:
    for attempt, steps in enumerate([(1, 2, 3), (3, 4), (), ()], 1):
        recorder = Recorder(tmp_path, "key", attempt=attempt)
        for step in steps:
            recorder("loss", step=step, tokens=step, loss=float(attempt))
        recorder.close()
    Recorder(tmp_path, "key", attempt=5).finish()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path, "losses")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(recorder: Recorder, tmp_path: Path) -> None:
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"kind":"los\n')
    recorder("fact", name="a", value=1)
    with pytest.raises(MambabenchError, match=r"events\.jsonl: line 2 is not a whole record"):
        recorder.finish()


def test_nothing_follows_a_record_that_the_disk_had_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, "key")
    recorder("loss", step=1, tokens=1, loss=1.0)
    write, room = os.write, iter([10])

    def full(descriptor: int, data: bytes) -> int:
        try:
            return write(descriptor, data[: next(room)])
        except StopIteration:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(MambabenchError, match="the disk is full"):
            recorder("loss", step=2, tokens=2, loss=2.0)
    # There is room again, but this attempt lacks a record.
    for more in (lambda: recorder("loss", step=3, tokens=3, loss=3.0), recorder.finish):
        with pytest.raises(MambabenchError, match="the disk is full"):
            more()
    again = Recorder(tmp_path, "key", attempt=2)
    again("loss", step=2, tokens=2, loss=20.0)
    again.finish()
    assert [row["loss"] for row in rows(tmp_path, "losses")] == [1.0, 20.0]


def test_a_column_of_mixed_types_is_kept_as_text(recorder: Recorder, tmp_path: Path) -> None:
    recorder("sample", **SAMPLE, note=1)
    recorder("sample", **SAMPLE, note="two")
    recorder("sample", **SAMPLE)
    recorder.finish()
    assert [row["note"] for row in rows(tmp_path, "samples")] == ["1", '"two"', None]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"))


@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_every_plain_value_is_strict_json(value: object) -> None:
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == plain(value)
