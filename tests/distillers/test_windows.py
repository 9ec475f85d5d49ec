"""Windows at the size of a library of books: made without a Python object per token, the same as by the plain rule."""

import bisect
import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.distillers import windows as module
from mambabench.distillers.losses import IGNORED
from mambabench.distillers.tiny.language import tokenizer
from mambabench.distillers.windows import collate, pack, read_windows
from mambabench.harness.documents import encode_ended, read_documents

rows_of_ids = st.lists(
    st.lists(st.integers(0, 9), max_size=40).flatmap(
        lambda ids: st.tuples(st.just(ids), st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    ),
    min_size=1,
    max_size=30,
)


def plainly(rows, context):
    """The rule in words of lists: documents cut, longest piece first, into the fullest window that has room."""
    pieces = []
    for ids, labels in rows:
        for first in range(0, len(ids), context):
            piece = [IGNORED, *labels[first + 1 : first + context]]
            if any(label != IGNORED for label in piece):
                pieces.append((ids[first : first + context], piece))
    pieces.sort(key=lambda piece: -len(piece[0]))
    made, room = [], []
    for ids, labels in pieces:
        place = bisect.bisect_left(room, (len(ids), 0))
        left, window = room.pop(place) if place < len(room) else (context, len(made))
        if window == len(made):
            made.append(([], [], []))
        for part, more in zip(made[window], (ids, labels, range(len(ids))), strict=True):
            part.extend(more)
        if left > len(ids):
            bisect.insort(room, (left - len(ids), window))
    for ids, labels, positions in made:
        padding, last = context - len(ids), positions[-1]
        ids.extend([0] * padding)
        labels.extend([IGNORED] * padding)
        positions.extend(range(last + 1, last + 1 + padding))
    return made


@given(rows_of_ids, st.integers(1, 40))
def test_windows_are_those_of_the_plain_rule(drawn, context):
    rows = [(ids, [id_ if learnt else IGNORED for id_, learnt in zip(ids, on, strict=True)]) for ids, on in drawn]
    expected = plainly(rows, context)
    if not expected:
        return
    windows = pack(rows, context)
    made = zip(windows.ids.tolist(), windows.labels.tolist(), windows.positions.tolist(), strict=True)
    assert list(made) == [tuple(window) for window in expected]
    assert all(tensor.dtype == torch.int32 for tensor in (windows.ids, windows.labels, windows.positions))


def test_batches_have_the_integers_that_models_take():
    batch = collate([pack([([1, 2, 3], [IGNORED, 2, 3])], 4)[0]])
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


@pytest.fixture
def text(write_tiny):
    return write_tiny(documents=40)


def test_many_documents_at_once_are_tokenized_as_one_by_one(text, teacher, monkeypatch):
    words = teacher.backend.tokenizer(teacher.path)
    rows = []
    for document in read_documents(text):
        ids, prompt = encode_ended(document, words)
        rows.append((ids, [IGNORED] * prompt + ids[prompt:]))
    monkeypatch.setattr(module.documents, "TEXT_AT_A_TIME", 300)
    monkeypatch.setattr(module.documents, "TEXT_A_CALL", 100)
    assert_equal(read_windows(text, words, 96), pack(rows, 96))


def assert_equal(one, two):
    for name in ("ids", "labels", "lengths", "positions"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.fixture
def made(monkeypatch):
    """How often text was packed."""
    calls = []
    monkeypatch.setattr(module, "pack", lambda *given: calls.append(given) or pack(*given))
    return calls


def test_equal_windows_are_made_once(text, teacher, tmp_path, made):
    words, cache = teacher.backend.tokenizer(teacher.path), tmp_path / "cache"
    first = read_windows(text, words, 96, cache)
    assert_equal(read_windows(text, teacher.backend.tokenizer(teacher.path), 96, cache), first)
    assert len(made) == 1
    # The same content elsewhere is the same text.
    other = tmp_path / "other.jsonl"
    other.write_bytes((text / "data.jsonl").read_bytes())
    read_windows(other, words, 96, cache)
    assert len(made) == 1
    with other.open("a") as file:
        file.write(json.dumps({"text": "ask coal tea ."}) + "\n")
    read_windows(other, words, 96, cache)
    read_windows(text, words, 64, cache)
    assert len(made) == 3
    words.eos_token = "ask"
    read_windows(text, words, 96, cache)
    assert len(made) == 4
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock"] * 4 + [".safetensors"] * 4


def test_processes_at_once_make_them_once(text, tmp_path, made):
    """Threads stand for processes: a lock is held by whoever opened its file."""
    found = [None] * 4

    def read(place):
        found[place] = read_windows(text, tokenizer(), 96, tmp_path)

    threads = [threading.Thread(target=read, args=(place,)) for place in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    for windows in found:
        assert_equal(windows, found[0])


def test_a_torn_file_and_a_folder_that_cannot_be_written_only_cost_time(text, teacher, tmp_path, made):
    words = teacher.backend.tokenizer(teacher.path)
    first = read_windows(text, words, 96, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    assert_equal(read_windows(text, words, 96, tmp_path / "cache"), first)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert_equal(read_windows(text, words, 96, blocked / "cache"), first)
    assert len(made) == 3
    for _ in range(2):
        assert_equal(read_windows(text, words, 96, tmp_path / "cache"), first)
        assert len(made) == 4


def test_books_are_read_document_by_document(tmp_path, make_job):
    """A text file parts documents by lines of the end token, compressed or not, through the source as directly."""
    import lzma

    from mambabench.distillers.data_configs import DatasetConfig
    from mambabench.distillers.dataset import DatasetSource

    file = tmp_path / "books.txt.xz"
    file.write_bytes(lzma.compress(b"One.\n\nStill one.\n<|endoftext|>\nTwo <|endoftext|> two.\n<|endoftext|>\n"))
    expected = ["One.\n\nStill one.", "Two <|endoftext|> two."]
    assert [document.text for document in read_documents(file)] == expected
    job = make_job(data={"books.txt.xz": file})
    DatasetSource(DatasetConfig(path="books.txt.xz")).write(job)
    assert [document.text for document in read_documents(Path(job.out))] == expected
    few = make_job("few", data={"books.txt.xz": file})
    DatasetSource(DatasetConfig(path="books.txt.xz", first=1, limit=1)).write(few)
    assert [document.text for document in read_documents(Path(few.out))] == expected[1:]
