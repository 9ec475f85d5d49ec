"""How suites ask: every judgment is on record, and a failure ends the step rather than its numbers."""

from pathlib import Path
from typing import Any

import pytest
from mambabench.harness.documents import Message
from mambabench.harness.interfaces import Artifact, Bench, Choice, MambabenchError, Subject
from mambabench.harness.judges import Reply, Request, Verdict, ask, asking
from mambabench.harness.judges.configs import RecordedConfig
from mambabench.harness.judges.kept import Kept, question


def read(reply: Reply) -> str:
    if "?" in reply.text:
        raise ValueError("doubts")
    return reply.text


def request(name: str) -> Request:
    return Request(id=name, messages=(Message("user", name),), read=read)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """With a recording of the judge `rule`, which knows `one` and doubts `two`."""
    kept = Kept(tmp_path / "there")
    for name, text in (("one", "fine"), ("two", "fine?")):
        kept.keep(question(request(name), "rule", {}), Reply(text=text, prompt_tokens=2))
    records: list[dict[str, Any]] = []

    def emit(kind: str, /, **fields: Any) -> None:
        records.append({"kind": kind, **fields})

    nothing: Any = records
    subject = Subject(Artifact("model", tmp_path, nothing), "", None, "cpu", "float32")
    return Bench(
        subject=subject, reference=None, data={"there": kept.folder}, seed=0, scratch=tmp_path / "scratch", emit=emit
    )


def records(bench: Bench) -> list[dict[str, Any]]:
    kept: Any = bench.subject.artifact.backend
    return list(kept)


def recorded(**options: Any) -> Choice:
    return Choice("judge", "recorded", RecordedConfig(path="there", **options))


def test_each_judgment_is_on_record_with_what_was_asked_and_said(bench: Bench) -> None:
    verdicts = ask(recorded(), [request("one"), request("two")], bench)
    assert [(verdict.state, verdict.value) for verdict in verdicts] == [("ok", "fine"), ("malformed", None)]
    one, two = (record for record in records(bench) if record["kind"] == "judgment")
    assert one["replies"][0]["question"] == question(request("one"), "rule", {})
    assert one["replies"][0]["reply"]["text"] == "fine"
    assert (two["state"], two["reason"]) == ("malformed", "doubts")
    facts = {record["name"]: record["value"] for record in records(bench) if record["kind"] == "fact"}
    assert (facts["judgments, ok"], facts["judgments, malformed"], facts["judgments, failed"]) == (1, 1, 0)


def test_more_failures_than_allowed_end_the_step_when_all_is_on_record(bench: Bench) -> None:
    asked = [request("one"), request("three")]
    with pytest.raises(MambabenchError, match=r"1 of 2 requests to the judge failed \(three: not in the recording\)"):
        ask(recorded(), asked, bench)
    assert [record["state"] for record in records(bench) if record["kind"] == "judgment"] == ["ok", "failed"]
    assert [verdict.state for verdict in ask(recorded(allow_failed=0.5), asked, bench)] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "of 0 on 2 requests the first that differs is on None in place of 'one'"),
        (None, "of 0 on 2 requests"),
        (("one",), "of 1 on 2 requests the first that differs is on None in place of 'two'"),
        (("two", "one"), "the first that differs is on 'two' in place of 'one'"),
        (("one", "one"), "the first that differs is on 'one' in place of 'two'"),
        (("one", "two", "three"), "of 3 on 2 requests the first that differs is on 'three' in place of None"),
    ],
)
def test_a_judge_gives_one_verdict_on_each_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, given: Any, said: str
) -> None:
    class Careless:
        def judge(self, requests: Any, desk: Any) -> Any:
            return given and [Verdict(id=name, state="ok", value=1.0) for name in given]

    monkeypatch.setattr(asking, "build", lambda choice: Careless())
    with pytest.raises(MambabenchError, match=f"the judge 'careless' must give one verdict on each.*{said}"):
        ask(Choice("judge", "careless", None), [request("one"), request("two")], bench)
    assert not records(bench)


def test_two_requests_of_one_name_are_an_error(bench: Bench) -> None:
    with pytest.raises(MambabenchError, match="'one'"):
        ask(recorded(), [request("one"), request("one")], bench)
