"""MT-Bench as FastChat plays it: recorded judgments and prompts, two turns, and verdicts that are none."""

import json
import re
from pathlib import Path

import pytest
from mambabench.harness.answering import read_records, write
from mambabench.harness.interfaces import Choice, MambabenchError, Unsupported
from mambabench.harness.judges import Reply, Verdict
from mambabench.harness.suites import mt_bench
from mambabench.harness.suites.chat_configs import MtBenchConfig
from mambabench.harness.suites.mt_bench import (
    Message,
    MtBench,
    rate,
    read_answers,
    read_folder,
    read_judgments,
    requests,
)

RECORDED = {"mamba_0_5_dpo_ep3": (7.7375, 6.8875), "mamba_0_75_dpo_ep1": (7.41875, 6.65)}
JUDGE = Choice("judge", "openai", None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "questions"
    (folder / "reference_answer").mkdir(parents=True)
    questions = [
        {"question_id": 1, "category": "writing", "turns": ["Write {a} line.", "Shorter, please."]},
        {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And one more?"]},
        {"question_id": 3, "category": "riddles", "turns": ["What has keys?"]},
    ]
    single = "[Question]\n{question}\n[Answer]\n{answer}"
    both = "{question_1}|{answer_1}|{question_2}|{answer_2}"
    prompts = [
        {"name": "single-v1", "system_prompt": "", "prompt_template": single},
        {"name": "single-math-v1", "system_prompt": "Be exact.", "prompt_template": "{ref_answer_1}|" + single},
        {"name": "single-v1-multi-turn", "system_prompt": "Look at turn 2.", "prompt_template": both},
        {
            "name": "single-math-v1-multi-turn",
            "system_prompt": "Look.",
            "prompt_template": "{ref_answer_1}|{ref_answer_2}|" + both,
        },
    ]
    references = [{"question_id": 2, "choices": [{"turns": ["2", "3"]}]}]
    for name, records in (
        ("question", questions),
        ("judge_prompts", prompts),
        ("reference_answer/gpt-4", references),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def judge(monkeypatch):
    """Has verdicts made of these texts, by the request's id; keeps the requests."""
    asked = {}

    def answered(texts):
        def ask(choice, requests, bench):
            asked.update({request.id: request for request in requests})
            return [verdict(request, texts.get(request.id, "Fine. Rating: [[5]]")) for request in requests]

        monkeypatch.setattr(mt_bench, "ask", ask)
        return asked

    return answered


def verdict(request, text):
    try:
        return Verdict(id=request.id, state="ok", value=request.read(Reply(text=text)))
    except ValueError as error:
        return Verdict(id=request.id, state="malformed", reason=str(error))


@pytest.mark.parametrize("model", RECORDED)
def test_recorded_judgments_give_the_published_averages(shared, chats, model):
    folder = shared / "data" / "chat" / "mt_bench"
    suite = MtBench(MtBenchConfig(data="data", judgments="judgments", recorded_as=model))
    chats.play(suite, data=folder, judgments=folder / "gpt-4_single.two_models.jsonl")
    assert (chats.mean("turn 1"), chats.mean("turn 2")) == RECORDED[model]
    assert chats.mean("score") == pytest.approx(sum(RECORDED[model]) / 2, abs=1e-9)
    categories = {record["metric"] for record in chats.of("sample")} - {"score", "turn 1", "turn 2", "no_verdict"}
    assert len(categories) == 8
    assert chats.mean("no_verdict") == chats.backend.loaded == 0


@pytest.mark.parametrize("model", RECORDED)
def test_the_judge_is_asked_in_the_recorded_words_and_its_ratings_are_read_as_recorded(shared, model):
    folder = shared / "data" / "chat" / "mt_bench"
    asked = read_folder(folder, "gpt-4")
    made = requests(asked.questions, read_answers(folder / f"{model}.jsonl"), asked.prompts)
    prompts = {request.id: request.messages[-1].content for request in made}
    records = [record for record in read_records(folder / "gpt-4_single.two_models.jsonl") if record["model"] == model]
    assert len(records) == len(made) == 160
    for record in records:
        assert prompts[mt_bench.name(record["question_id"], record["turn"])] == record["user_prompt"]
        assert rate(record["judgment"]) == record["score"]


def test_ratings_are_looked_for_as_fastchat_looks_for_them():
    package = Path(pytest.importorskip("fastchat").__file__).parent
    # Importing it wants clients of endpoints that nothing here asks.
    source = (package / "llm_judge" / "common.py").read_text()
    theirs = re.findall(r'^one_score_pattern(?:_backup)? = re\.compile\("(.*)"\)$', source, re.MULTILINE)
    assert [form.pattern for form in mt_bench.RATINGS] == theirs


def test_the_second_turn_is_answered_and_judged_with_the_first(chats, folder, judge):
    asked = judge({})
    chats.play(MtBench(MtBenchConfig(data="data", judge=JUDGE, new_tokens=6)), data=folder)
    answers = {answer["id"]: answer["text"] for answer in chats.of("answer")}
    assert list(answers) == ["1/turn 1", "2/turn 1", "3/turn 1", "1/turn 2", "2/turn 2"]
    first, second = answers["2/turn 1"], answers["2/turn 2"]
    assert asked["2/turn 1"].messages == (
        Message("system", "Be exact."),
        Message("user", f"2|[Question]\n1 + 1?\n[Answer]\n{first}"),
    )
    assert asked["2/turn 2"].messages[-1].content == f"2|3|1 + 1?|{first}|And one more?|{second}"
    assert [message.role for message in asked["1/turn 1"].messages] == ["user"]
    assert "Write {a} line." in asked["1/turn 1"].messages[-1].content


def test_words_for_the_judge_decide_nothing_of_the_answers():
    configs = [MtBenchConfig(data="data", judge=JUDGE, reference=name).questions().config for name in ("gpt-4", "me")]
    assert configs[0] == configs[1]
    assert configs[0].data == "data/question.jsonl"
    for recorded in ({"judgments": "file"}, {"judge": JUDGE, "answers": "file"}):
        assert MtBenchConfig(data="data", **recorded).questions() is None


def test_the_same_questions_are_answered_once(chats, folder, judge):
    suite = MtBench(MtBenchConfig(data="data", judge=JUDGE, new_tokens=6))
    judge({})
    chats.play(suite, data=folder, kept_as="of this model")
    answers, scores = chats.of("answer"), chats.of("sample")
    chats.records.clear()
    judge({"1/turn 1": "[[9]]"})
    chats.play(suite, data=folder, kept_as="of this model")
    assert chats.of("answer") == answers
    assert chats.of("sample") != scores
    assert chats.backend.loaded == 1
    chats.records.clear()
    chats.play(suite, data=folder, kept_as="of another model")
    assert chats.backend.loaded == 2


def test_creative_answers_are_drawn_and_exact_ones_are_not(folder):
    questions = read_folder(folder, "gpt-4").questions
    assert [question.temperature for question in questions] == [0.7, 0.0, 0.7]


def test_a_verdict_without_a_rating_is_counted_and_no_score(chats, folder, judge):
    judge({"1/turn 1": "I cannot say.", "1/turn 2": "[[11]]", "2/turn 1": "Rating: [[9]]", "2/turn 2": "[8] is fair"})
    chats.play(MtBench(MtBenchConfig(data="data", judge=JUDGE, new_tokens=6)), data=folder)
    assert chats.mean("score") == (9 + 8 + 5) / 3
    assert chats.mean("turn 2") == 8
    assert chats.mean("no_verdict") == 2 / 5
    assert "writing" not in {record["metric"] for record in chats.of("sample")}


def test_no_verdict_at_all_is_no_result(chats, folder, judge):
    judge(dict.fromkeys(("1/turn 1", "1/turn 2", "2/turn 1", "2/turn 2", "3/turn 1"), "I cannot say."))
    with pytest.raises(MambabenchError, match="mt_bench: the judge gave no verdict on any of 5 answers"):
        chats.play(MtBench(MtBenchConfig(data="data", judge=JUDGE, new_tokens=6)), data=folder)
    assert not chats.of("sample")


def test_recorded_judgments_that_are_none_are_counted(chats, folder):
    file = folder.with_name("judgments.jsonl")
    texts = {(1, 1): "[[7]]", (1, 2): None, (2, 1): 7, (2, 2): "[[0]]", (3, 1): ""}
    records = [
        {"question_id": number, "model": "mock", "turn": turn, "judgment": text}
        for (number, turn), text in texts.items()
    ]
    file.write_text(json.dumps(records))
    chats.play(MtBench(MtBenchConfig(data="data", judgments="judgments")), data=folder, judgments=file)
    assert chats.mean("score") == 7
    assert chats.mean("no_verdict") == 4 / 5


def test_turns_of_a_question_are_one_cluster(chats, folder, judge):
    judge({})
    chats.play(MtBench(MtBenchConfig(data="data", judge=JUDGE, new_tokens=6)), data=folder)
    scores = [record for record in chats.of("sample") if record["metric"] == "score"]
    assert len({record["item"] for record in scores}) == 5
    assert len({record["cluster"] for record in scores}) == 3
    assert {record["unit"] for record in scores} == {"points"}


def test_what_is_missing_is_said_at_once(chats, folder, tmp_path, judge):
    judge({})
    suite = MtBench(MtBenchConfig(data="data", judge=JUDGE))
    with pytest.raises(MambabenchError, match=r"has no question\.jsonl, which MT-Bench needs; .*FastChat"):
        suite.judge(chats.review(data=tmp_path))
    with pytest.raises(MambabenchError, match=r"gpt-5\.jsonl: no such file"):
        MtBench(MtBenchConfig(data="data", judge=JUDGE, reference="gpt-5")).judge(chats.review(data=folder))
    (folder / "reference_answer" / "gpt-4.jsonl").write_text("")
    with pytest.raises(MambabenchError, match=r"gpt-4\.jsonl has no answer to 2/turn 1"):
        suite.judge(chats.review(data=folder))
    (folder / "reference_answer" / "gpt-4.jsonl").write_text('{"question_id": 2, "choices": [{"turns": ["2", "3"]}]}')
    with pytest.raises(MambabenchError, match=r"events\.jsonl: 5 answers are missing, the first of 1/turn 1"):
        suite.judge(chats.review(data=folder))


@pytest.mark.parametrize(
    ("file", "records", "said"),
    [
        ("question", [{"question_id": 1, "category": "a", "turns": "Hi"}], "`turns` of question 1 must be a list"),
        ("question", [{"question_id": 1, "category": "a", "turns": 3}], "`turns` of question 1 must be a list"),
        ("question", [{"question_id": 1, "category": "a", "turns": [3]}], "`turns` of question 1 must be a list"),
        ("question", [{"question_id": 1, "category": "a", "turns": []}], "`turns` of question 1 must be a list"),
        ("question", [{"question_id": 1, "category": None, "turns": ["Hi"]}], "'category' of item 0 is no text"),
        ("question", [{"question_id": 1, "category": "a", "turns": ["Hi"]}] * 2, "question 1 is in it twice"),
        ("reference_answer/gpt-4", [{"question_id": 2, "choices": []}], "`choices` of question 2 must begin with"),
        ("reference_answer/gpt-4", [{"question_id": 2, "choices": [{}]}], "`choices` of question 2 must begin with"),
        ("reference_answer/gpt-4", [{"question_id": 2, "choices": [{"turns": 3}]}], "`choices` of question 2 must"),
        ("reference_answer/gpt-4", [{"question_id": 2, "choices": [{"turns": "ab"}]}], "`choices` of question 2 must"),
        ("reference_answer/gpt-4", [{"question_id": 2, "choices": [{"turns": ["2"]}]}] * 2, "2/turn 1 is in it twice"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named_with_the_item(folder, file, records, said):
    (folder / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(MambabenchError, match=f"{file}.jsonl: {said}") as error:
        read_folder(folder, "gpt-4")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "template", "said"),
    [
        ("single-v1", "{question} {oops}", r"it has \{oops\}; what it may have is \{question\}, \{answer\}"),
        ("single-v1", "{question} {ref_answer_1}", r"it has \{ref_answer_1\}"),
        ("single-v1-multi-turn", "{question}", r"it has \{question\}; .*\{question_1\}, \{answer_1\}, \{question_2\}"),
        ("single-math-v1", "{0}", r"it has \{0\}"),
        ("single-math-v1", "{answer", "its braces do not match"),
    ],
)
def test_a_prompt_with_a_place_for_something_unknown_is_refused(folder, name, template, said):
    file = folder / "judge_prompts.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    (record,) = (record for record in records if record["name"] == name)
    record["prompt_template"] = template
    file.write_text(json.dumps(records))
    with pytest.raises(MambabenchError, match=f"judge_prompts.jsonl: the prompt '{name}': {said}"):
        read_folder(folder, "gpt-4")


def test_two_judgments_of_one_turn_are_refused(folder):
    file = folder.with_name("judgments.jsonl")
    record = {"question_id": 1, "model": "mock", "turn": 1, "judgment": "[[7]]"}
    file.write_text(json.dumps([record, {**record, "judgment": "[[2]]"}]))
    with pytest.raises(MambabenchError, match=r"judgments.jsonl: 1/turn 1 is in it twice"):
        read_judgments(file, "mock")


def test_judgments_of_another_model_are_not_taken(chats, folder):
    file = folder.with_name("judgments.jsonl")
    records = [
        {"question_id": number, "model": model, "turn": turn, "judgment": "[[7]]"}
        for model in ("one", "two")
        for number, turn in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records[:-1]))
    suite = MtBench(MtBenchConfig(data="data", judgments="judgments"))
    with pytest.raises(MambabenchError, match="has judgments of one, two; the model is called 'mock'"):
        chats.play(suite, data=folder, judgments=file)
    suite = MtBench(MtBenchConfig(data="data", judgments="judgments", recorded_as="two"))
    with pytest.raises(MambabenchError, match="1 judgments of 'two' are missing, the first of 3/turn 1"):
        chats.play(suite, data=folder, judgments=file)
    with pytest.raises(Unsupported, match="nothing was recorded of 'mock'"):
        chats.play(MtBench(MtBenchConfig(data="data", judgments="judgments")), data=folder, judgments=folder)


def test_one_source_of_judgments_is_named():
    for options in ({}, {"judge": JUDGE, "judgments": "file"}):
        with pytest.raises(ValueError, match="one of `judge` and `judgments`"):
            MtBenchConfig(data="data", **options)


def test_chats_are_written_by_the_tokenizer_or_by_a_template_of_fschat(chatting):
    tokenizer = chatting.ChatTokenizer("abcdefg", bos=True)
    messages = (Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V"))
    own = write(messages, tokenizer)
    text = "<system>S<end><user>U<end><assistant>A<end><user>V<end><assistant>"
    assert own.ids == (tokenizer.bos_token_id, *tokenizer.encode(text))
    assert own.stop_tokens == (tokenizer.eos_token_id,)
    assert own.stop_strings == ("<end>",)
    pytest.importorskip("fastchat")
    zephyr = write(messages, tokenizer, "zephyr")
    text = "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n"
    assert zephyr.ids == (tokenizer.bos_token_id, *tokenizer.encode(text))
    with pytest.raises(MambabenchError, match=r"'zefyr' is none of fschat's; it has .*zephyr"):
        write(messages, tokenizer, "zefyr")
    tokenizer.chat_template = None
    with pytest.raises(Unsupported, match="no chat template; the option `template`"):
        write(messages, tokenizer)
