"""The rules of the tiny world judge what MT-Bench and AlpacaEval really ask, and nothing that they do not know."""

import pytest
from mambabench.distillers.plugin import TinyJudgeConfig
from mambabench.distillers.tiny.instructions import read_chat, solve
from mambabench.distillers.tiny.judge import DOUBT, TinyJudge
from mambabench.distillers.tiny.judge import reply as judged
from mambabench.harness.documents import Message
from mambabench.harness.judges import Desk, Request
from mambabench.harness.suites.alpaca_eval import Evaluator, read_rows
from mambabench.harness.suites.mt_bench import name, rate, read_folder, requests


@pytest.fixture
def chat(write_tiny):
    return write_tiny(part="chat")


def ask(requests, tmp_path):
    return {verdict.id: verdict for verdict in TinyJudge(TinyJudgeConfig()).judge(requests, Desk(folder=tmp_path))}


def right(turns):
    return " ".join(solve(read_chat(turns)))


def test_ratings_of_mt_bench_are_the_share_of_right_words_in_the_last_answer(chat, tmp_path):
    folder = read_folder(chat, "none")
    assert len(folder.questions) == 10
    assert all(len(question.turns) == 2 for question in folder.questions)
    good = {
        name(question.number, turn): right(question.turns[:turn]) for question in folder.questions for turn in (1, 2)
    }
    verdicts = ask(requests(folder.questions, good, folder.prompts), tmp_path)
    assert {verdict.value for verdict in verdicts.values()} == {10.0}
    # A first answer that is wrong, or empty, leaves the second turn's rating alone.
    bad = {key: text if key.endswith("2") else "" for key, text in good.items()}
    verdicts = ask(requests(folder.questions, bad, folder.prompts), tmp_path)
    assert all(verdict.value == (10.0 if key.endswith("2") else 1.0) for key, verdict in verdicts.items())
    half = {key: f"{text} {text}" for key, text in good.items()}
    assert {verdict.value for verdict in ask(requests(folder.questions, half, folder.prompts), tmp_path).values()} == {
        5.5
    }


def test_alpaca_eval_prefers_the_answer_with_more_right_words_wherever_it_stands(chat, tmp_path):
    pytest.importorskip("alpaca_eval")
    evaluator, rows = Evaluator("weighted_alpaca_eval_gpt4_turbo"), read_rows(chat)
    assert len(rows) == 10
    assert [row.output == right([row.instruction]) for row in rows] == [False, True] * 5
    for switched in (False, True):
        verdicts = ask([evaluator.request(row, right([row.instruction]), switched) for row in rows], tmp_path)
        values = [verdicts[row.id].value for row in rows]
        assert values == pytest.approx([2 - DOUBT, 1.5] * 5)
        verdicts = ask([evaluator.request(row, "", switched) for row in rows[1::2]], tmp_path)
        assert [verdict.value for verdict in verdicts.values()] == pytest.approx([1 + DOUBT] * 5)


def test_what_the_rules_do_not_know_fails_and_gets_no_score(tmp_path):
    asked = "[Question]\nWho was Ada?\n\n[The Start of Assistant's Answer]\nx\n[The End of Assistant's Answer]"
    texts = {"a": "What do you think?", "b": asked}
    verdicts = ask(
        [
            Request(id=key, messages=(Message("user", text),), read=lambda reply: rate(reply.text))
            for key, text in texts.items()
        ],
        tmp_path,
    )
    assert {verdict.state for verdict in verdicts.values()} == {"failed"}
    assert "neither FastChat's prompt nor AlpacaEval's" in verdicts["a"].reason
    assert "no instruction of the tiny world" in verdicts["b"].reason
    assert rate(judged(asked.replace("Who was Ada?", "first of x y z")).text) == 10
