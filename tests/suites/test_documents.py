import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.harness.documents import (
    Document,
    Message,
    Preference,
    encode_document,
    encode_ended,
    leading_token,
    read_documents,
    read_preferences,
)
from mambabench.harness.interfaces import MambabenchError, Unsupported, silent
from mambabench.harness.mockmodel import MockTokenizer


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "some.more.jsonl.xz"])
def test_each_format_gives_the_same_documents(tmp_path, name):
    texts = ["one\ntwo", "three", "ünï"]
    content = (
        "\n<|endoftext|>\n".join(texts) + "\n"
        if ".txt" in name
        else "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    ).encode()
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    assert [document.text for document in read_documents(tmp_path / name)] == texts


def test_the_folder_of_a_source_is_read(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "ab", "ids": [1, 2], "prompt": 1}\n')
    assert list(read_documents(tmp_path)) == [Document("ab", (1, 2), 1)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", '"text", "ids"'),
        ('{"question": "?"}', '"text", "ids"'),
        ('{"text": 3}', '"text" must be a string'),
        ('{"ids": [1, "2"]}', '"ids" must be a list of token ids'),
        ('{"ids": [1, true]}', '"ids" must be a list of token ids'),
        ('{"ids": [1], "prompt": 2}', '"prompt" must be a number of ids, from 0 to 1'),
        ('{"text": "ab", "prompt": 1}', '"prompt" must be a number of ids, from 0 to 0'),
        ('{"prompt": 1, "completion": "a"}', '"prompt" must be a string'),
        ('{"messages": []}', '"messages" must be a list of messages'),
        ('{"messages": [{"role": "me", "content": "a"}]}', 'a "content" and a "role": system, user'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends with one of the assistant"),
        (
            json.dumps({"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")], "whole": 1}),
            '"whole" must',
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "a preference, where documents"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(MambabenchError) as error:
        list(read_documents(file))
    assert str(error.value).startswith(f"{file}:2: ")
    assert complaint in str(error.value)


@pytest.mark.parametrize("name", ["absent.txt", "data.csv", "data.xz"])
def test_what_is_no_data_is_refused_by_name(tmp_path, name):
    if name != "absent.txt":
        (tmp_path / name).write_bytes(lzma.compress(b"a") if name.endswith("xz") else b"a")
    with pytest.raises(MambabenchError, match=name):
        list(read_documents(tmp_path / name))


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), max_size=6), st.integers(0, 6), st.booleans())
def test_a_document_is_encoded_behind_one_leading_token(ids, prompt, bos):
    tokenizer = MockTokenizer("abc", bos=bos)
    lead = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    prompt = min(prompt, len(ids))
    encoded, context = encode_document(Document("", tuple(ids), prompt), tokenizer)
    assert encoded == [lead, *ids]
    assert context == prompt + 1
    assert encode_document(Document("", tuple(encoded), context), tokenizer) == (encoded, context)
    assert encode_document(Document(tokenizer.decode(ids)), tokenizer) == (encoded, 1)


def test_texts_begin_with_the_first_token_that_a_tokenizer_has_for_it():
    with_bos, without = MockTokenizer("abc", bos=True), MockTokenizer("abc")
    assert leading_token(with_bos) == with_bos.bos_token_id
    assert leading_token(without) == without.eos_token_id
    without.eos_token_id = None
    assert leading_token(without) is None


def test_a_silent_emit_takes_any_record():
    assert silent("burst", row=1, at_s=0.5, name="free") is None


def test_items_are_told_apart_by_content():
    assert Document("ab").item == Document("ab").item
    assert len({Document("ab").item, Document("ba").item, Document("", (1, 2)).item, Document("", (12,)).item}) == 4


class Chatty(MockTokenizer):
    """Writes each message between brackets, as chat templates do."""

    chat_template = "…"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt=False):
        assert not tokenize
        return "".join(f"{turn['role'][0]}[{turn['content']}]" for turn in turns) + "a[" * add_generation_prompt


def write_lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


CHAT = [{"role": "user", "content": "bb"}, {"role": "assistant", "content": "cab"}]


@pytest.mark.parametrize(
    ("record", "before", "after"),
    [
        ({"prompt": "ab", "completion": "cc"}, "ab", "cc$"),
        ({"prompt": "", "completion": "cc"}, "", "cc$"),
        ({"messages": CHAT}, "u[bb]a[", "cab]"),
        ({"messages": CHAT, "whole": False}, "u[bb]a[", "cab]"),
    ],
)
@pytest.mark.parametrize("bos", [True, False])
def test_only_the_answer_is_learnt(tmp_path, record, before, after, bos):
    tokenizer = Chatty("abcu[]", bos=bos)
    (document,) = read_documents(write_lines(tmp_path / "a.jsonl", record))
    ids, context = encode_ended(document, tokenizer)
    lead = "^" if bos else "" if "messages" in record else "$"
    assert tokenizer.decode(ids) == lead + before + after
    assert tokenizer.decode(ids[:context]) == lead + before


def test_all_of_a_whole_chat_is_learnt_but_its_first_token(tmp_path):
    tokenizer = Chatty("abcu[]")
    records = [{"messages": CHAT}, {"messages": CHAT, "whole": True}]
    answer, whole = read_documents(write_lines(tmp_path / "a.jsonl", *records))
    assert encode_ended(whole, tokenizer) == (encode_ended(answer, tokenizer)[0], 1)
    assert whole.item != answer.item


def test_a_chat_without_a_template_is_unsupported():
    with pytest.raises(Unsupported, match="no chat template"):
        encode_document(Document("", messages=(Message("user", "a"), Message("assistant", "b"))), MockTokenizer("ab"))


def test_preferences_are_read_as_texts_and_as_chats(tmp_path):
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    chat = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "a"}]}
    first, second = read_preferences(write_lines(tmp_path / "a.jsonl", plain, chat))
    assert first == Preference("a", "b", "c")
    assert second == Preference("", "cab", "a", (Message("user", "bb"),))
    tokenizer = Chatty("abcu[]")
    for preference, texts in ((first, ("$ab$", "$ac$")), (second, ("u[bb]a[cab]", "u[bb]a[a]"))):
        encoded = [encode_ended(document, tokenizer) for document in preference.documents()]
        assert tuple(tokenizer.decode(ids) for ids, _ in encoded) == texts
        assert len({context for _, context in encoded}) == 1


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, '"prompt", "chosen" and "rejected"'),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, '"rejected" must be a string'),
        ({"prompt": CHAT[:1], "chosen": CHAT, "rejected": CHAT[1:]}, '"chosen" must be one message of the assistant'),
    ],
)
def test_a_bad_preference_is_named(tmp_path, record, complaint):
    file = write_lines(tmp_path / "a.jsonl", record)
    with pytest.raises(MambabenchError) as error:
        list(read_preferences(file))
    assert str(error.value).startswith(f"{file}:1: ")
    assert complaint in str(error.value)
