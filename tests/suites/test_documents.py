import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.harness.documents import Document, encode_document, leading_token, read_documents
from mambabench.harness.interfaces import MambabenchError, silent
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
        ("[]", '"text" or "ids"'),
        ('{"question": "?"}', '"text" or "ids"'),
        ('{"text": 3}', '"text" must be a string'),
        ('{"ids": [1, "2"]}', '"ids" must be a list of token ids'),
        ('{"ids": [1, true]}', '"ids" must be a list of token ids'),
        ('{"ids": [1], "prompt": 2}', '"prompt" must be a number of ids, from 0 to 1'),
        ('{"text": "ab", "prompt": 1}', '"prompt" must be a number of ids, from 0 to 0'),
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
