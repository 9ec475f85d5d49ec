"""Reads the documents of a data entry, for suites and distillers alike, without torch.

docs/records.md has the formats: a folder that a source wrote, a text file or a JSON-lines file, the files compressed
with xz or not.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .interfaces import MambabenchError, Tokenizer

SEPARATOR = "<|endoftext|>"
FORMATS = "a folder with data.jsonl, .txt, .jsonl, .txt.xz or .jsonl.xz"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, or its token ids, or both (then the ids count)."""

    text: str
    ids: tuple[int, ...] | None = None
    prompt: int = 0
    """So many of the first ids are a prompt: context, neither learnt nor scored."""

    @property
    def item(self) -> str:
        """A hash of the content, by which two runs find the same document."""
        content = self.text if self.ids is None else json.dumps(self.ids)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_documents(path: Path) -> Iterator[Document]:
    """Yields the documents of a file or of a source's folder, in order.

    Raises `MambabenchError` naming the file (and line) for anything that is not as docs/records.md says.
    """
    file = path / "data.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise MambabenchError(f"{file}: no such file (data is {FORMATS})")
    suffixes = file.suffixes[-2:] if file.suffix == ".xz" else file.suffixes[-1:]
    with _open(file) as stream:
        if suffixes[:1] == [".jsonl"]:
            yield from _read_jsonl(stream, file)
        elif suffixes[:1] == [".txt"]:
            yield from _read_text(stream)
        else:
            raise MambabenchError(f"{file}: unknown kind of data (data is {FORMATS})")


def leading_token(tokenizer: Tokenizer) -> int | None:
    """What stands before the first token of a text: the beginning-of-text, or the end-of-text of a tokenizer that has
    no beginning."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_document(document: Document, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of a document behind one leading token, and how many of them are context only.

    Without a leading token the first token of the text is context. Ids that begin with it keep it once.

    >>> class Letters:
    ...     bos_token_id, eos_token_id = None, 0
    ...     def encode(self, text, add_special_tokens=True): return [ord(c) - 96 for c in text]
    >>> encode_document(Document("abc"), Letters())
    ([0, 1, 2, 3], 1)
    >>> encode_document(Document("", ids=(0, 1, 2, 3), prompt=2), Letters())
    ([0, 1, 2, 3], 2)
    """
    ids = list(document.ids) if document.ids is not None else tokenizer.encode(document.text, add_special_tokens=False)
    lead = leading_token(tokenizer)
    context = document.prompt
    if lead is not None and ids[:1] != [lead]:
        ids = [lead, *ids]
        context += 1
    return ids, min(max(context, 1), len(ids))


def _open(file: Path) -> TextIO:
    if file.suffix == ".xz":
        return io.TextIOWrapper(lzma.open(file), encoding="utf-8")
    return file.open(encoding="utf-8")


def _read_text(stream: TextIO) -> Iterator[Document]:
    lines: list[str] = []
    for line in stream:
        if line.rstrip("\n") != SEPARATOR:
            lines.append(line)
            continue
        if text := "".join(lines).strip("\n"):
            yield Document(text)
        lines = []
    if text := "".join(lines).strip("\n"):
        yield Document(text)


def _read_jsonl(stream: TextIO, file: Path) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MambabenchError(f"{file}:{number}: not JSON: {error.msg}") from None
        yield _document(record, f"{file}:{number}")


def _document(record: object, where: str) -> Document:
    if not isinstance(record, dict) or not ({"text", "ids"} & record.keys()):
        raise MambabenchError(f'{where}: a document is an object with "text" or "ids"')
    text, ids, prompt = record.get("text", ""), record.get("ids"), record.get("prompt", 0)
    if not isinstance(text, str):
        raise MambabenchError(f'{where}: "text" must be a string')
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise MambabenchError(f'{where}: "ids" must be a list of token ids')
    if type(prompt) is not int or not 0 <= prompt <= len(ids or ()):
        raise MambabenchError(f'{where}: "prompt" must be a number of ids, from 0 to {len(ids or ())}')
    return Document(text, None if ids is None else tuple(ids), prompt)
