"""Answers found as ZeroEval finds them: its recorded runs, its prompts, and texts that would harm if they were run."""

import json
import os

import pytest
from mambabench.harness.answering import read_records
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.suites.chat_configs import ReasoningConfig
from mambabench.harness.suites.extraction import find_answer, first_object, same_number
from mambabench.harness.suites.reasoning import PLACES, Reasoning, read_problems, read_wording, score

RUNS = [
    ("gsm8k", "gsm_MambaInLlama_0_50_v1", 67.70, 1.36),
    ("gsm8k", "gsm_falcon-mamba-7b-instruct", 41.32, 8.26),
    ("crux", "crux_MambaInLlama_0_50_v1", 25.50, 3.75),
    ("crux", "crux_falcon-mamba-7b-instruct", 8.88, 62.25),
]
QUESTIONS = {"gsm8k": "gsm8k_test.jsonl.xz", "crux": "cruxeval.jsonl.xz"}
GSM8K = [
    {"question": "What is 6 times 7?", "answer": "It is\n#### 42"},
    {"question": "Half of 3?", "answer": "#### 1.5"},
    {"question": "And the number after 9?", "answer": "#### 10"},
]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in GSM8K))
    return file


@pytest.mark.parametrize(("task", "run", "accuracy", "no_answer"), RUNS)
def test_recorded_runs_score_as_they_did(shared, chats, task, run, accuracy, no_answer):
    file = shared / "data" / "zeroeval" / f"{run}.json.xz"
    chats.play(Reasoning(ReasoningConfig(task=task, answers="run")), run=file)
    assert round(100 * chats.mean("exact_match"), 2) == accuracy
    assert round(100 * chats.mean("no_answer"), 2) == no_answer
    assert chats.mean("malformed") >= chats.mean("no_answer")
    assert chats.backend.loaded == 0


@pytest.mark.parametrize(("task", "run"), [RUNS[0][:2], RUNS[2][:2]])
def test_questions_are_put_as_in_the_recorded_runs(shared, tmp_path, task, run):
    records = read_records(shared / "data" / "zeroeval" / f"{run}.json.xz")
    template = records[0]["model_input"]
    first = read_records(shared / "data" / "eval" / QUESTIONS[task])[0]
    for name in PLACES[task]:
        template = template.replace(first[name], f"{{{name}}}")
    file = tmp_path / "prompt.txt"
    file.write_text(template, encoding="utf-8")
    problems = read_problems(shared / "data" / "eval" / QUESTIONS[task], task, read_wording(file, task))
    assert [problem.id for problem in problems] == [record["id"] for record in records]
    assert [problem.gold for problem in problems] == [record["answer"].removeprefix("# ") for record in records]
    assert all(problem.prompt == record["model_input"] for problem, record in zip(problems, records, strict=True))


def test_a_wording_without_a_place_for_the_problem_is_refused(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("What does {code} return?", encoding="utf-8")
    with pytest.raises(MambabenchError, match=r"prompt.txt: has no \{input\}"):
        read_wording(file, "crux")


def test_a_wording_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("Größe von {code} und {input}".encode("latin-1"))
    with pytest.raises(MambabenchError, match=r"prompt.txt: cannot be read as text in UTF-8"):
        read_wording(file, "crux")


def test_a_wording_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(MambabenchError, match=r"prompt.txt: no such file$"):
        read_wording(tmp_path / "prompt.txt", "crux")


def test_nothing_that_a_model_wrote_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm = "__import__('pathlib').Path('harmed').touch() or 6/1"
    for text in (f'{{"answer": "{harm}"}}', f'"answer": "{harm}"', f"answer: {harm}", f'{{"answer": {harm}}}'):
        score("gsm8k", text, "6")
        score("crux", text, "6")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["{" * 100_000 + "}" * 100_000, '{"answer": ' * 20_000 + "1" + "}" * 20_000, f'{{"answer": {"9" * 5000}}}'],
    ids=["braces", "nested", "digits"],
)
def test_odd_texts_are_wrong_and_harmless(text):
    assert not score("gsm8k", text, "7")["exact_match"]
    assert not score("crux", text, "7")["exact_match"]
    assert first_object(text) is None


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("1,200 dollars", "1200", True),
        ("3/4", "0.75", True),
        ("3/0", "0", False),
        ("9" * 999 + "/1", "9", False),
        ("-5", "5", False),
        ([1, 2], "1", True),
        (None, "0", False),
    ],
)
def test_numbers_are_compared_as_numbers(answer, gold, same):
    assert same_number(answer, gold) == same


@pytest.mark.parametrize(
    ("text", "value", "well_formed"),
    [
        ('{"reasoning": "a\nb", "answer": 42}', 42, True),
        ('{"reasoning": "a {x}", "answer": "1"}', "1", True),
        ('{"reasoning": "it says "no"", "answer": "42"}', "42", False),
        ('{"no": 1} {"answer": 2}', "2}", False),
        ('"answer": 17, and so on', "17", False),
        ("The answer: 17", "17", False),
    ],
)
def test_answers_are_looked_for_in_ever_looser_forms(text, value, well_formed):
    assert find_answer(text) == (value, well_formed)


def test_a_model_answers_every_question_and_its_answers_can_be_scored_again(chats, questions):
    config = {"task": "gsm8k", "data": "questions", "new_tokens": 5, "batch": 2}
    chats.play(Reasoning(ReasoningConfig(**config)), questions=questions)
    samples, answers = chats.of("sample"), chats.of("answer")
    assert [answer["id"] for answer in answers] == [f"gsm8k-main-test-#{place}" for place in range(3)]
    assert chats.mean("no_answer") == chats.mean("malformed") == 1
    assert len({sample["item"] for sample in samples}) == 3
    recording = questions.with_name("events.jsonl")
    recording.write_text("".join(json.dumps(record) + "\n" for record in chats.records))
    chats.records.clear()
    chats.play(Reasoning(ReasoningConfig(**config, answers="recording")), questions=questions, recording=recording)
    assert chats.of("sample") == samples
    assert chats.backend.loaded == 1


def test_what_was_answered_before_a_kill_is_not_answered_again(chats, questions):
    suite = Reasoning(ReasoningConfig(task="gsm8k", data="questions", new_tokens=5, batch=1))
    chats.play(suite, questions=questions)
    before = chats.of("answer")
    (kept,) = (chats.folder / "scratch").glob("*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join([lines[0].replace(b'"text": "', b'"text": "kept'), lines[1], lines[2][:9]]))
    chats.records.clear()
    chats.play(suite, questions=questions)
    after = chats.of("answer")
    changed = [old["id"] for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    assert len(kept.read_bytes().splitlines()) == 3


def test_a_question_that_fills_the_context_has_no_answer_and_is_counted(chats, chatting, questions):
    class Short(chatting.ChatStepper):
        max_context = 500

    long = {"question": "why? " * 200, "answer": "#### 1"}
    questions.write_text(questions.read_text() + json.dumps(long) + "\n")
    chats.backend.make = Short
    chats.play(Reasoning(ReasoningConfig(task="gsm8k", data="questions", new_tokens=5)), questions=questions)
    finishes = [answer["finish"] for answer in chats.of("answer")]
    assert finishes[-1] == "no room"
    facts = {fact["name"]: fact["value"] for fact in chats.of("fact")}
    tokens = facts.pop("tokens of answers")
    assert facts == {"answers": 4, "answers cut short": 4 - finishes.count("stop")}
    assert tokens == sum(answer["tokens"] for answer in chats.of("answer"))
    assert len({sample["item"] for sample in chats.of("sample")}) == 4


def test_texts_may_hold_any_separator_that_json_does_not_escape(tmp_path):
    rows = [{"question": f"a{mark}b", "answer": "#### 1"} for mark in ("\u2028", "\x85", "\u2029", "\x7f")]
    file = tmp_path / "questions.jsonl"
    file.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_records(file) == rows


def test_bad_files_are_named(chats, questions, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    for text, message in (
        ('{"question": "a"}\n', "item 0 lacks the texts question, answer of gsm8k"),
        ("what", "neither a JSON array nor JSON lines"),
        ("[1]", "no JSON object"),
        ('{"question": "a", "answer": "6 times 7 is 42"}', "`answer` of item 0 must end with #### and a number"),
        ('{"question": "a", "answer": "42 #### none"}', "`answer` of item 0 must end with #### and a number"),
    ):
        wrong.write_text(text)
        with pytest.raises(MambabenchError, match=f"{wrong}: .*{message}"):
            read_problems(wrong, "gsm8k")
    wrong.write_text('[{"id": "a", "output": []}]')
    with pytest.raises(MambabenchError, match=f"{wrong}: item 0 is neither an answer by ZeroEval"):
        chats.play(Reasoning(ReasoningConfig(task="gsm8k", answers="wrong")), wrong=wrong)
    record = {"id": "a", "question": "b", "answer": "1", "output": ["c"]}
    wrong.write_text(json.dumps([record, {**record, "output": ["d"]}]))
    with pytest.raises(MambabenchError, match=f"{wrong}: a is in it twice"):
        chats.play(Reasoning(ReasoningConfig(task="gsm8k", answers="wrong")), wrong=wrong)
    wrong.write_text(2 * '{"kind": "answer", "id": "gsm8k-main-test-#0", "text": "c"}\n')
    suite = Reasoning(ReasoningConfig(task="gsm8k", data="questions", answers="wrong"))
    with pytest.raises(MambabenchError, match=f"{wrong}: gsm8k-main-test-#0 is in it twice"):
        chats.play(suite, questions=questions, wrong=wrong)
    with pytest.raises(ValueError, match="data is missing"):
        ReasoningConfig(task="crux")
