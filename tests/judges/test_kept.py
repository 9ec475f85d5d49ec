"""Replies on disk: whole or not there, and found by what was asked alone."""

import json
from pathlib import Path

import pytest
from mambabench.harness.documents import Message
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.judges import Desk, Reply, Request
from mambabench.harness.judges.configs import RecordedConfig
from mambabench.harness.judges.kept import Kept, cleaned, question, recorded
from mambabench.harness.judges.recording import RecordedJudge

SAID = Reply(
    text="Ünïcode, and a [[7]]",
    top_logprobs=({"m": -0.1, "M": -2.5},),
    finish="stop",
    model="rule-0613",
    prompt_tokens=3,
    completion_tokens=4,
)


def read(reply: Reply) -> int:
    if "[[7]]" not in reply.text:
        raise ValueError("no seven")
    return 7


def request(text: str = "Grade this.") -> Request:
    return Request(id=text, messages=(Message("user", text),), read=read)


def test_a_reply_is_found_again_as_it_was(tmp_path: Path) -> None:
    kept, asked = Kept(tmp_path), question(request(), "rule", {})
    assert kept.find(asked) is None
    kept.keep(asked, SAID)
    assert kept.find(asked) == SAID
    for other in (question(request(), "other", {}), question(request(), "rule", {"seed": 1}), {**asked, "again": 1}):
        assert kept.find(other) is None


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_short_counts_as_none(part: float, tmp_path: Path) -> None:
    kept, asked = Kept(tmp_path), question(request(), "rule", {})
    kept.keep(asked, SAID)
    whole = kept.path(asked).read_bytes()
    kept.path(asked).write_bytes(whole[: int(len(whole) * part)])
    assert kept.find(asked) is None
    kept.keep(asked, SAID)
    assert kept.find(asked) == SAID


def test_a_file_that_holds_another_question_counts_as_none(tmp_path: Path) -> None:
    kept, asked = Kept(tmp_path), question(request(), "rule", {})
    kept.keep(asked, SAID)
    record = json.loads(kept.path(asked).read_text())
    record["question"]["body"]["messages"][0]["content"] = "Grade that."
    kept.path(asked).write_text(json.dumps(record))
    assert kept.find(asked) is None


def test_what_json_cannot_hold_is_left_out_of_log_probabilities() -> None:
    assert cleaned([{"a": -1.0, "b": float("-inf")}]) == ({"a": -1.0},)


def test_a_recording_is_read_without_a_judge(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "judgments")
    for text, replies in (("one", ["?", "[[7]]"]), ("two", ["[[7]]"]), ("three", ["?", "?", "?"]), ("four", ["?"])):
        for again, said in enumerate(replies):
            asked = question(request(text), "rule", {}, again)
            kept.keep(asked, Reply(text=said))
    judge = RecordedJudge(RecordedConfig(path="there"))
    desk = Desk(folder=tmp_path / "unused", data={"there": kept.folder})
    verdicts = judge.judge([request(text) for text in ("one", "two", "three", "four", "five")], desk)
    assert [verdict.state for verdict in verdicts] == ["ok", "ok", "malformed", "malformed", "failed"]
    assert [verdict.value for verdict in verdicts] == [7, 7, None, None, None]
    assert verdicts[-1].reason == "not in the recording"
    assert not desk.folder.exists()
    # The same from the records of a step.
    lines = tmp_path / "events.jsonl"
    records = [{"kind": "attempt"}] + [
        {"kind": "judgment", "replies": [{"question": asked, "reply": {"text": reply.text}}]}
        for asked, reply in recorded(kept.folder)
    ]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "judg')
    again = judge.judge([request("one")], Desk(folder=tmp_path / "unused", data={"there": lines}))
    assert again[0].value == 7


def test_a_recording_of_several_judges_needs_a_name(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for model, text in (("good", "[[7]]"), ("bad", "?")):
        asked = question(request(), model, {})
        kept.keep(asked, Reply(text=text))
    desk = Desk(folder=tmp_path, data={"there": tmp_path})
    with pytest.raises(MambabenchError, match="`model` must name one"):
        RecordedJudge(RecordedConfig(path="there")).judge([request()], desk)
    with pytest.raises(MambabenchError, match="none of 'worse'"):
        RecordedJudge(RecordedConfig(path="there", model="worse")).judge([request()], desk)
    (verdict,) = RecordedJudge(RecordedConfig(path="there", model="good")).judge([request()], desk)
    assert verdict.value == 7


def test_a_damaged_recording_is_named(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "abc.json").write_text('{"question": {}}')
    with pytest.raises(MambabenchError, match=r"abc\.json: not a judgment that was kept"):
        list(recorded(tmp_path))
