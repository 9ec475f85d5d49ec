"""How well a model predicts given documents: one negative log-likelihood per document, per token and per byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..documents import Document, encode_many, read_documents
from ..interfaces import Bench, MambabenchError, Stepper, Tokenizer
from .configs import DivergenceConfig, PerplexityConfig
from .texts import check_room, pad


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document: its tokens from place `context` on are scored."""

    document: int
    ids: Sequence[int]
    context: int


class Perplexity:
    """Documents are scored each by itself behind the beginning-of-text token. One that is longer than `context` tokens
    is cut into windows; each window after the first has the token before it as its only context."""

    def __init__(self, config: PerplexityConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        model = bench.subject.load()
        check_room("perplexity", model, self.config.context - 1)
        for group in groups(bench, self.config):
            self._measure(group, model, bench)

    def _measure(self, group: Sequence[Document], model: Stepper, bench: Bench) -> None:
        encoded = list(encode_many(group, model.tokenizer))
        nll = [0.0] * len(group)
        for chosen in batches(encoded, self.config):
            scores = model.score(*pad([window.ids for window in chosen], model.device))
            for row, window in enumerate(chosen):
                scored = scores.logprob[row, window.context - 1 : len(window.ids) - 1]
                nll[window.document] -= float(scored.double().sum())
        for document, (ids, context), value in zip(group, encoded, nll, strict=True):
            if len(ids) == context:
                continue
            weights = {
                "nll_per_token": len(ids) - context,
                "nll_per_byte": scored_bytes(document, ids, context, model.tokenizer),
            }
            for metric, weight in weights.items():
                bench.emit(
                    "sample",
                    task=self.config.data,
                    item=document.item,
                    metric=metric,
                    value=value,
                    weight=weight,
                    better="lower",
                )


def scored_bytes(document: Document, ids: Sequence[int], context: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that is scored: all of a document's text, or what the ids behind the context add to it.

    The text of some tokens alone would lack the space before them, and special tokens are no text.
    """
    if document.ids is None and not document.messages:
        return len(document.text[document.prompt :].encode())
    # A character that the context's end cuts into is scored.
    before = tokenizer.decode(ids[:context], skip_special_tokens=True).rstrip("\ufffd")
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode()) - len(before.encode())


def groups(bench: Bench, config: PerplexityConfig | DivergenceConfig) -> Iterator[list[Document]]:
    """The documents of a suite's data, so many at a time that records keep coming, with progress as they are done.

    Raises MambabenchError where there are none."""
    documents = read_documents(bench.data[config.data])
    if config.limit:
        documents = itertools.islice(documents, config.limit)
    done = 0
    bench.emit("progress", done=0, total=config.limit, unit="documents")
    while group := list(itertools.islice(documents, 16 * config.batch)):
        yield group
        done += len(group)
        bench.emit("progress", done=done, total=config.limit or done, unit="documents")
    if not done:
        raise MambabenchError(f"{bench.data[config.data]}: no documents to score")


def batches(
    encoded: Iterable[tuple[list[int], int]], config: PerplexityConfig | DivergenceConfig
) -> Iterator[list[Window]]:
    """The windows of documents (ids, and how many of them are context), those of similar length side by side."""
    windows = [
        window for number, (ids, context) in enumerate(encoded) for window in cut(number, ids, context, config.context)
    ]
    windows.sort(key=lambda window: len(window.ids))
    for first in range(0, len(windows), config.batch):
        yield windows[first : first + config.batch]


def cut(document: int, ids: Sequence[int], context: int, longest: int) -> Iterator[Window]:
    """Cuts a document into windows of at most `longest` tokens, which score every token from place `context` on once.

    >>> [(w.ids, w.context) for w in cut(0, [0, 1, 2, 3, 4, 5], 1, 4)]
    [([0, 1, 2, 3], 1), ([3, 4, 5], 1)]
    >>> [(w.ids, w.context) for w in cut(0, [0, 1, 2, 3, 4, 5], 5, 4)]
    [([3, 4, 5], 2)]
    """
    for start in range(0, len(ids) - 1, longest - 1):
        end = min(start + longest, len(ids))
        if end > context:
            yield Window(document, ids[start:end], max(context - start, 1))
