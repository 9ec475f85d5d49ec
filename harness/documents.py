"""Reads the documents of a data entry, for suites and distillers alike, without torch.

docs/records.md has the formats: a folder that a source wrote, a text file or a JSON-lines file, the files compressed
with xz or not. Other files and columns are made into these by the source `dataset`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from .environment import cores
from .interfaces import MambabenchError, Tokenizer, Unsupported

Text = TypeVar("Text")
SEPARATOR = "<|endoftext|>"
FORMATS = "a folder with data.jsonl, .txt, .jsonl, .txt.xz or .jsonl.xz"
DOCUMENT = '"text", "ids", "messages", or "prompt" and "completion"'
PREFERENCE = '"prompt", "chosen" and "rejected"'
ROLES = ("system", "user", "assistant", "tool")
ANSWER = "assistant"
TEXT_AT_A_TIME = 32_000_000
"""Characters: enough for the cores to share long documents, and some hundred MB while they are tokenized."""
TEXT_A_CALL = 100_000
"""Characters that a thread tokenizes at a time; a longer document is not cut."""
THREADS = 32


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, or its token ids (then these count), or a chat (then that counts)."""

    text: str
    ids: tuple[int, ...] | None = None
    prompt: int = 0
    """So many of the first ids (without ids: characters of the text) are a prompt: context, neither learnt nor scored.
    """
    messages: tuple[Message, ...] = ()
    """A chat, written by the tokenizer's chat template. The last message, an answer, is learnt; the others are the
    prompt."""
    whole: bool = False
    """All of a chat is learnt and scored, questions and the template's words too."""
    cut: bool = False
    """The text was cut where its writer had not ended."""

    @property
    def asks(self) -> bool:
        """Whether it is a prompt with its answer, rather than a text or ids."""
        return self.ids is None and bool(self.prompt or self.messages)

    @property
    def item(self) -> str:
        """A hash of the content, by which two runs find the same document."""
        content = self.text if self.ids is None else json.dumps(self.ids)
        if self.asks:
            content = json.dumps([self.text, self.prompt, self.messages, *(["whole"] if self.whole else [])])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse continuation."""

    prompt: str
    """Empty for a chat."""
    chosen: str
    rejected: str
    messages: tuple[Message, ...] = ()
    """The prompt of a chat; then both continuations are answers in it."""
    cut: bool = False
    """Both continuations were cut where their writers had not ended."""

    @property
    def item(self) -> str:
        """A hash of the content, by which two runs find the same preference."""
        content = json.dumps([self.prompt, self.chosen, self.rejected, self.messages])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def documents(self) -> tuple[Document, Document]:
        """The chosen and the rejected continuation as documents, for `encode_ended`.

        >>> Preference("1+1=", "2", "3").documents()[0]
        Document(text='1+1=2', ids=None, prompt=4, messages=(), whole=False, cut=False)
        """
        return self._document(self.chosen), self._document(self.rejected)

    def _document(self, answer: str) -> Document:
        if self.messages:
            return _chat((*self.messages, Message(ANSWER, answer)))
        return _continued(self.prompt, answer, cut=self.cut)


def read_documents(path: Path) -> Iterator[Document]:
    """Yields the documents of a file or of a source's folder, in order.

    Raises `MambabenchError` naming the file (and line) for anything that is not as docs/records.md says.
    """
    file = path / "data.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise MambabenchError(f"{file}: no such file (data is {FORMATS})")
    kind = _kind(file)
    if kind == ".jsonl":
        for record, where in _read_jsonl(file):
            yield _document(record, where)
    elif kind == ".txt":
        with open_text(file) as stream:
            yield from _read_text(stream)
    else:
        raise MambabenchError(f"{file}: unknown kind of data (data is {FORMATS})")


def read_preferences(path: Path) -> Iterator[Preference]:
    """Yields the preferences of a JSON-lines file or of a source's folder, in order.

    A line is `{"prompt", "chosen", "rejected"}`, each a text, or each a list of messages (`role`, `content`) with one
    answer in `chosen` and `rejected`; texts with `"cut": true` did not end where they end. Raises
    `MambabenchError` naming file and line for anything else.
    """
    file = path / "data.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise MambabenchError(f"{file}: no such file")
    if _kind(file) != ".jsonl":
        raise MambabenchError(f"{file}: preferences are lines of JSON with {PREFERENCE}")
    for record, where in _read_jsonl(file):
        yield _preference(record, where)


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """Opens a file for reading, compressed with xz or not. Raises `MambabenchError` naming it where it is no text."""
    try:
        packed = file.suffix == ".xz"
        with lzma.open(file, "rt", encoding="utf-8") if packed else file.open(encoding="utf-8") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise MambabenchError(f"{file}: not UTF-8 text (it has a byte {error.object[error.start]:#x})") from None
    except (lzma.LZMAError, EOFError) as error:
        raise MambabenchError(f"{file}: not a whole .xz file ({error})") from None


def leading_token(tokenizer: Tokenizer) -> int | None:
    """What stands before the first token of a text: the beginning-of-text, or the end-of-text of a tokenizer that has
    no beginning."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_document(document: Document, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of a document behind one leading token, and how many of them are context only.

    Without a leading token the first token of the text is context. Ids that begin with it keep it once. Prompt and
    continuation are tokenized apart, as they are when a model continues the prompt. Before a chat only a
    beginning-of-text is put; how else it begins is its template's affair.

    >>> class Letters:
    ...     bos_token_id, eos_token_id = None, 0
    ...     def encode(self, text, add_special_tokens=True): return [ord(c) - 96 for c in text]
    >>> encode_document(Document("abc"), Letters())
    ([0, 1, 2, 3], 1)
    >>> encode_document(Document("abc", prompt=2), Letters())
    ([0, 1, 2, 3], 3)
    >>> encode_document(Document("", ids=(0, 1, 2, 3), prompt=2), Letters())
    ([0, 1, 2, 3], 2)
    """
    texts = _texts(document, tokenizer)
    return _joined(document, tokenizer, [tokenizer.encode(text, add_special_tokens=False) for text in texts])


def encode_ended(document: Document, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """As `encode_document`, with the end token behind a text, if there is one: what a model is to learn.

    Ids are taken as they are, and so is what is marked as `cut`: a document that was cut where its writer had not ended
    must not teach an end. A chat ends as its template says.
    """
    return _ended(document, tokenizer, *encode_document(document, tokenizer))


def encode_many(
    documents: Iterable[Document], tokenizer: Tokenizer, *, ended: bool = False
) -> Iterator[tuple[list[int], int]]:
    """`encode_document` of each (`ended`: `encode_ended`), in order; a fast tokenizer gets many texts at a time, which
    it spreads over all cores. Documents are read no further ahead than that needs."""
    encode = Encoder(tokenizer)
    for group in _parts(documents, TEXT_AT_A_TIME if encode.fast else 0, lambda document: len(document.text)):
        texts = [_texts(document, tokenizer) for document in group]
        encoded = iter(encode([text for of in texts for text in of]))
        for document, of in zip(group, texts, strict=True):
            ids, context = _joined(document, tokenizer, list(itertools.islice(encoded, len(of))))
            yield _ended(document, tokenizer, ids, context) if ended else (ids, context)


def write_chat(messages: tuple[Message, ...], tokenizer: Tokenizer) -> tuple[str, str]:
    """A chat as the tokenizer's chat template writes it: up to where its last answer begins, and that answer.

    Raises `Unsupported` for a tokenizer without a chat template.
    """
    apply: Any = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or not getattr(tokenizer, "chat_template", None):
        raise Unsupported(
            'the tokenizer has no chat template; `{ use = "dataset", chat = "plain" }` writes chats without one'
        )
    turns = [message._asdict() for message in messages]
    before = str(apply(turns[:-1], tokenize=False, add_generation_prompt=True))
    whole = str(apply(turns, tokenize=False))
    if not whole.startswith(before):
        raise Unsupported("the tokenizer's chat template writes a prompt otherwise once its answer follows")
    return before, whole[len(before) :]


def _texts(document: Document, tokenizer: Tokenizer) -> list[str]:
    """What of a document is tokenized: its context, if it has one, and the rest; nothing of a document of ids."""
    if document.ids is not None:
        return []
    before, after = document.text[: document.prompt], document.text[document.prompt :]
    if document.messages:
        before, after = write_chat(document.messages, tokenizer)
        if document.whole:
            before, after = "", before + after
    return [before, after] if before else [after]


def _joined(document: Document, tokenizer: Tokenizer, parts: Sequence[list[int]]) -> tuple[list[int], int]:
    """A document's ids and how many are context, from the ids of its `_texts`."""
    lead = tokenizer.bos_token_id if document.messages else leading_token(tokenizer)
    if document.ids is not None:
        ids, context = list(document.ids), document.prompt
    else:
        ids, context = list(itertools.chain.from_iterable(parts)), len(parts[0]) if len(parts) > 1 else 0
    if lead is not None and ids[:1] != [lead]:
        ids = [lead, *ids]
        context += 1
    return ids, min(max(context, 1), len(ids))


def _ended(document: Document, tokenizer: Tokenizer, ids: list[int], context: int) -> tuple[list[int], int]:
    end, open_ended = tokenizer.eos_token_id, document.cut or document.ids is not None or bool(document.messages)
    if not open_ended and end is not None and ids[-1:] != [end]:
        ids.append(end)
    return ids, context


class Encoder:
    """Tokenizes many texts, each as `tokenizer.encode` would; a fast tokenizer on many cores.

    Every thread has a copy of its own: threads that share one wait for its cache of merges, so that many are no faster
    than one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self._copies: list[Any] = []

    def __call__(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """With `special`, also the tokens that the tokenizer puts around a text."""
        parts = list(_parts(texts, TEXT_A_CALL, len)) if self.fast else []
        if len(parts) < 2:
            # Little text is not worth a copy, which for a large vocabulary takes a second.
            return [self.tokenizer.encode(text, add_special_tokens=special) for text in texts]
        self._copy(min(len(parts), THREADS, cores()))
        free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for copy in self._copies:
            free.put(copy)

        def encode(part: list[str]) -> list[list[int]]:
            copy = free.get()
            try:
                return [encoding.ids for encoding in copy.encode_batch_fast(part, add_special_tokens=special)]
            finally:
                free.put(copy)

        with ThreadPoolExecutor(len(self._copies)) as pool:
            return list(itertools.chain.from_iterable(pool.map(encode, parts)))

    def _copy(self, count: int) -> None:
        inner = self.tokenizer.backend_tokenizer
        written = inner.to_str() if len(self._copies) < count else ""
        while len(self._copies) < count:
            copy = type(inner).from_str(written)
            copy.no_truncation()
            copy.no_padding()
            copy.encode_special_tokens = inner.encode_special_tokens
            self._copies.append(copy)


def _parts(texts: Iterable[Text], characters: int, size_of: Callable[[Text], int]) -> Iterator[list[Text]]:
    """Texts, or documents, of at least so many characters together; the last part may have fewer."""
    part: list[Text] = []
    size = 0
    for text in texts:
        part.append(text)
        size += size_of(text)
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def _kind(file: Path) -> str:
    suffixes = file.suffixes[-2:] if file.suffix == ".xz" else file.suffixes[-1:]
    return suffixes[0] if suffixes else ""


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


def _read_jsonl(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise MambabenchError(f"{where}: not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise MambabenchError(f"{where}: a document is an object with {DOCUMENT}")
            yield record, where


def _document(record: Mapping[str, Any], where: str) -> Document:
    if "chosen" in record and "rejected" in record:
        raise MambabenchError(f"{where}: a preference, where documents with {DOCUMENT} are read")
    if "messages" in record:
        chat = _chat(_messages(record["messages"], f'{where}: "messages"'), where)
        return replace(chat, whole=_flag(record, "whole", where))
    if "completion" in record:
        return _continued(_text(record, "prompt", where), _text(record, "completion", where))
    if not {"text", "ids"} & record.keys():
        raise MambabenchError(f"{where}: a document is an object with {DOCUMENT}")
    text, ids, prompt = _text(record, "text", where, default=""), record.get("ids"), record.get("prompt", 0)
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise MambabenchError(f'{where}: "ids" must be a list of token ids')
    if type(prompt) is not int or not 0 <= prompt <= len(ids or ()):
        raise MambabenchError(f'{where}: "prompt" must be a number of ids, from 0 to {len(ids or ())}')
    return Document(text, None if ids is None else tuple(ids), prompt)


def _preference(record: Mapping[str, Any], where: str) -> Preference:
    if not {"prompt", "chosen", "rejected"} <= record.keys():
        raise MambabenchError(f"{where}: a preference is an object with {PREFERENCE}")
    if isinstance(record["prompt"], str):
        prompt, chosen, rejected = (_text(record, key, where) for key in ("prompt", "chosen", "rejected"))
        return Preference(prompt, chosen, rejected, cut=_flag(record, "cut", where))
    messages = _messages(record["prompt"], f'{where}: "prompt"')
    answers = []
    for key in ("chosen", "rejected"):
        answer = _messages(record[key], f'{where}: "{key}"')
        if len(answer) != 1 or answer[0].role != ANSWER:
            raise MambabenchError(f'{where}: "{key}" must be one message of the {ANSWER}')
        answers.append(answer[0].content)
    return Preference("", answers[0], answers[1], messages)


def _text(record: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    text = record.get(key, default)
    if not isinstance(text, str):
        raise MambabenchError(f'{where}: "{key}" must be a string')
    return text


def _flag(record: Mapping[str, Any], key: str, where: str) -> bool:
    flag = record.get(key, False)
    if not isinstance(flag, bool):
        raise MambabenchError(f'{where}: "{key}" must be true or false')
    return flag


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise MambabenchError(f"{where} must be a list of messages")
    messages = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            raise MambabenchError(f'{where}: a message has a "content" and a "role": {", ".join(ROLES)}')
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)


def _chat(messages: tuple[Message, ...], where: str = "") -> Document:
    if len(messages) < 2 or messages[-1].role != ANSWER:
        raise MambabenchError(f"{where}: a chat to learn from has a message and ends with one of the {ANSWER}")
    return Document("\n\n".join(message.content for message in messages), messages=messages)


def _continued(prompt: str, completion: str, cut: bool = False) -> Document:
    return Document(prompt + completion, prompt=len(prompt), cut=cut)
