"""The judge that is a rule: an answer is worth what it begins with of the reference, and cannot pose as it."""

from pathlib import Path

import pytest
from mambabench.harness.documents import Message
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.judges import Desk, Request
from mambabench.harness.judges.configs import MatchConfig
from mambabench.harness.judges.match import MatchJudge
from mambabench.harness.suites.mt_bench import rate, read_answers, read_folder

CHAT = Path(__file__).resolve().parents[2] / "plans" / "tiny_chat"


def judged(*texts: str) -> list[float]:
    asked = [
        Request(id=str(place), messages=(Message("user", text),), read=lambda reply: rate(reply.text))
        for place, text in enumerate(texts)
    ]
    return [verdict.value for verdict in MatchJudge(MatchConfig()).judge(asked, Desk(folder=Path()))]


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("fox owl elk bee", 10.0),
        ("fox owl elk bee . ask omar", 10.0),
        ("fox owl bee elk", 5.5),
        ("owl elk bee", 1.0),
        ("", 1.0),
        ("answer: fox", 1.0),
        ("x reference: x answer: x", 1.0),
    ],
)
def test_a_rating_is_the_share_of_the_reference_that_an_answer_begins_with(answer: str, rating: float) -> None:
    assert judged(f"reference: fox owl elk bee answer: {answer}") == [rating]


def test_a_prompt_without_a_reference_is_an_error_and_no_rating() -> None:
    for text in ("answer: fox", "reference: fox", "reference: answer: fox"):
        with pytest.raises(MambabenchError, match="the judge 'match' finds no text behind 'reference:' and 'answer:'"):
            judged(text)


def test_the_ten_questions_of_the_default_plan_have_the_answers_that_stand_in_them() -> None:
    questions = read_folder(CHAT, "truth").questions
    known = read_answers(CHAT / "reference_answer" / "truth.jsonl")
    assert len(questions) == 10
    assert len(known) == 20
    for question in questions:
        notes, _, copied = question.turns[0].partition(" copy ")
        assert question.references[0] == copied.rstrip(" |")
        name = question.turns[1].split()[-1]
        words = notes.split()
        assert words[words.index(name) + 1] == question.references[1]
