"""How a written answer is matched with choices: labels as labels, other choices by the longest that is said."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("lm_eval", reason="mambabench[eval] is not installed")

from mambabench.harness.suites.twins import match, twin_metrics

LABELS = ["A", "B", "C", "D"]
choices = st.lists(
    st.text("aAbB15 .,+-#!'", min_size=1).map(lambda text: " ".join(text.split())).filter(bool),
    min_size=2,
    max_size=6,
    unique=True,
).filter(lambda found: not all(len(choice) == 1 and choice.isalpha() for choice in found))


@pytest.mark.parametrize(
    ("answer", "choices", "wanted"),
    [
        (" Sunlight. It is", ["sun", "sunlight"], 1),
        ("the sun", ["sun", "moon"], 0),
        ("sun or moon", ["moon", "sun"], 1),
        ("it is sun or moon", ["moon", "sun"], None),
        ("it is red wine", ["red", "red wine"], 1),
        ("either red wine or cats", ["red wine!", "cats"], None),
        ("", ["moon", "sun"], None),
        ("yes", ["yes", "Yes!"], 0),
        ("+ 3", ["+ 3", "- 3"], 0),
        ("?!", ["?!", "!?"], 0),
        ("-5", ["-5", "5"], 0),
        ("-5 degrees", ["5", "-5"], 1),
        ("It is -5.", ["5", "-5"], 1),
        ("-5", ["5", "6"], None),
        ("5.5", ["5", "6"], None),
        ("C++", ["C++", "C", "C#"], 0),
        ("C", ["C++", "C", "C#"], 1),
        ("They wrote it in C++, I think", ["C++", "C", "C#"], 0),
        ("Aa", ["AA", "Aa", "aa"], 1),
        ("aA", ["AA", "Aa", "aa"], None),
        ("the red wine", ["The", "The red wine."], 1),
        ("anything", [], None),
    ],
)
def test_the_longest_choice_that_is_said_is_the_answer(answer, choices, wanted):
    assert match(answer, choices) == wanted


@given(choices=choices, data=st.data())
def test_every_choice_is_matched_with_itself(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    assert match(choices[place], choices) == place
    assert match(f"\n {choices[place]} ", choices) == place


@given(choices=choices, rest=st.text("xyz ", min_size=1), data=st.data())
def test_what_follows_an_answer_changes_nothing(choices, rest, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    assert match(f"{choices[place]} {rest}", choices) == place


@given(words=st.lists(st.sampled_from(["fox", "owl", "elk", "bee"]), min_size=2, max_size=4, unique=True))
def test_two_answers_behind_something_else_are_none(words):
    assert match(f"either {words[0]} or {words[1]}", words) is None
    assert match(f"surely {words[1].upper()}!", words) == 1


@pytest.mark.parametrize(
    "form",
    ["{}", " {}\n", "{}.", "({})", "({}) Paris", "{}) Paris", "{}. Paris", "{}: a dog", "{}, because", '"{}"', "**{}**",
     "{} is right", "{} - Paris", "The answer is {}", "The answer is {}.", "The correct answer is option {}",
     "It's {}.", "Answer: ({})", "I choose **{}**", "Of all of them I like ({}) best"],
)  # fmt: skip
@given(place=st.integers(0, 3))
def test_a_label_is_read_in_the_usual_forms(form, place):
    assert match(form.format(LABELS[place]), LABELS) == place
    assert match(form.format(LABELS[place].lower()), LABELS) is None


@pytest.mark.parametrize(
    "answer",
    ["It is a dog", "A dog", "a", '"A small dog', "A-frame", "The answer is a dog", "The answer is A dog", "B cells",
     "A or B", "A, B and C", "A; B", "A. B. C. D.", "Vitamin C.", "ABC", "I'm sorry, little", "E", "", "A 9 a.m. train",
     "first (A), then (B)"],
)  # fmt: skip
def test_articles_and_other_letters_are_no_labels(answer):
    assert match(answer, LABELS) is None


@given(st.text("abcd xyz.,!'\"()", max_size=30))
def test_text_in_lower_case_gives_no_label(text):
    assert match(text, LABELS) is None


@given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=5))
def test_any_text_is_matched_or_not(answer, choices):
    place = match(answer, choices)
    assert place is None or 0 <= place < len(choices)


@given(words=st.lists(st.sampled_from(["the", "red", "fox", "owl"]), max_size=6), place=st.integers(0, 3))
def test_an_article_makes_no_right_answer(words, place):
    text = " ".join(["a", *words])
    assume(text.strip())
    sample = {"target": place, "metrics": ["acc"], "acc": 1.0}
    assert twin_metrics(sample, text, LABELS, "acc") == {"generated": 0.0, "no_answer": 1.0, "gap": 1.0}
    right = twin_metrics(sample, LABELS[place], LABELS, "acc")
    assert right == {"generated": 1.0, "no_answer": 0.0, "gap": 0.0}
