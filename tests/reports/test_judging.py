"""What judges took: sums over models, failures by kind over all attempts, and nothing where nobody was asked."""

import json

import pytest
from mambabench.harness.results import Results
from mambabench.reports.judging import Answers, Judging
from mambabench.reports.options import NoOptions

GPT = {"judge": {"use": "openai", "model": "gpt-4", "prompt_price": 30.0}}


def facts(ok, malformed, replies, cost=None):
    told = {"judgments, ok": ok, "judgments, malformed": malformed, "judgments, failed": 0}
    told |= {"judge: replies": replies, "judge: prompt tokens": 100 * replies, "judge: completion tokens": 10 * replies}
    told |= {} if cost is None else {"judge: cost": cost}
    return [{"name": name, "value": value, "unit": "", "arm": ""} for name, value in told.items()]


@pytest.fixture
def builder(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    for model in ("teacher", "half", "none"):
        builder.model(model, teacher=model == "teacher")
    for model, causes in (("teacher", ["429", "timeout", "429"]), ("half", ["500"])):
        key = builder.step(f"{model}/plain/chat@seed0", "judge", config=GPT, facts=facts(158, 2, 164, 0.5), wall=60.0)
        attempts = [{"kind": "attempt", "t": 0.0, "attempt": 1}, {"kind": "attempt", "t": 0.0, "attempt": 2}]
        lines = [*({"kind": "unanswered", "t": 1.0, "cause": cause} for cause in causes), attempts[1]]
        file = tmp_path / "store" / "steps" / key / "events.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in [attempts[0], *lines]))
    builder.step("none/plain/chat@seed0", "judge", config=GPT, state="error", reason="3 of 160 requests failed")
    return builder


def test_a_judge_of_a_suite_has_one_row_with_its_failures_by_kind(builder):
    frame = Judging(NoOptions()).frame(Results.read([builder.write()]))
    done, failed = frame.to_dict("records")
    assert (done["suite"], done["judge"], done["models"], done["requests"]) == ("chat", "gpt-4", 2, 320)
    assert (done["judged"], done["malformed"], done["failed"], done["replies"]) == (316, 4, 0, 328)
    assert (done["tokens in"], done["tokens out"], done["cost USD"], done["wall s"]) == (32800, 3280, 1.0, 120.0)
    assert done["unanswered"] == "4 (429: 2, timeout: 1, 500: 1)"
    assert (failed["models"], failed["state"]) == ("none", "error")


def test_what_nobody_judged_and_what_was_not_priced_is_not_in_it(builder, stores, tmp_path):
    builder.step("teacher/plain/rule@seed0", "judge", config={"task": "gsm8k"})
    key = builder.step("teacher/plain/again@seed0", "judge", config={"judge": {"use": "recorded", "path": "x"}})
    (tmp_path / "store" / "steps" / key / "events.jsonl").touch()
    frame = Judging(NoOptions()).frame(Results.read([builder.write()]))
    assert set(frame["suite"]) == {"chat", "again"}
    assert set(frame["judge"]) == {"gpt-4", "recorded"}
    empty = stores.Builder(tmp_path / "empty")
    empty.model("teacher", teacher=True)
    empty.step("teacher/-/tasks@seed0")
    assert Judging(NoOptions()).frame(Results.read([empty.write()])) is None


def test_answers_that_were_cut_short_are_shown_beside_those_that_were_not(builder):
    for model, cut in (("teacher", 4), ("half", 120)):
        told = {"answers": 160, "answers cut short": cut, "tokens of answers": 160 * 50}
        told = [{"name": name, "value": value, "unit": "", "arm": ""} for name, value in told.items()]
        builder.step(f"{model}/plain/chat/answer@seed0", "answer", facts=told)
    builder.step("none/plain/chat/answer@seed0", "answer", state="timeout", reason="longer than 180 s")
    frame = Answers(NoOptions()).frame(Results.read([builder.write()]))
    teacher, half, none = frame.to_dict("records")
    assert (teacher["cut short"], teacher["cut short %"], teacher["tokens"]) == (4, 2.5, 50.0)
    assert (half["model"], half["cut short %"], half["state"]) == ("half", 75.0, None)
    assert (none["answers"], none["state"]) == (None, "timeout")
