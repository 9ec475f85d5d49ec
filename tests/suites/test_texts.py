import json

import pytest
from mambabench.harness.documents import Document, encode_document
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.texts import pad, take_prompts


@pytest.fixture
def write(tmp_path):
    def run(*texts):
        file = tmp_path / "text.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    return run


def test_prompts_are_beginnings_of_documents_in_turn(write):
    model = MockStepper()
    texts = ["abcdefg", "gfedcba", "bbbbbbb"]
    prompts = take_prompts(write(*texts), model, 5, (4, 3))
    whole = [encode_document(Document(text), model.tokenizer)[0] for text in texts]
    assert prompts == [tuple(whole[i % 3][: 4 - i % 2]) for i in range(5)]


def test_long_documents_go_on_with_later_passages_before_anything_is_taken_again(write):
    model, size = MockStepper(), 64 * (4 + 4)
    text = "a" * size + "b" * size + "c" * 3
    prompts = take_prompts(write(text, "ggggg"), model, 6, (4,))
    wanted = ["aaa", "ggg", "bbb", "ccc", "aaa", "ggg"]
    assert prompts == [tuple(encode_document(Document(of), model.tokenizer)[0]) for of in wanted]


def test_a_short_document_is_continued_with_the_next(write):
    assert take_prompts(write("ab", "c"), MockStepper(), 2, (4,)) == [(0, 1, 2, 0), (0, 1, 2, 0)]


def test_no_documents_give_no_prompts(write):
    with pytest.raises(MambabenchError, match="no documents to take prompts from"):
        take_prompts(write(), MockStepper(), 1, (2,))


def test_padding_is_to_the_right():
    ids, lengths = pad([[5, 6, 7], [8]], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert lengths.tolist() == [3, 1]
