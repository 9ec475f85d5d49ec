"""How well a model predicts given documents: one negative log-likelihood per document, per token and per byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ..documents import Document, encode_many, read_documents
from ..interfaces import Bench, MambabenchError, Stepper, Tokenizer
from .configs import AgreementConfig, DivergenceConfig, PerplexityConfig
from .texts import check_room, pad
from .windows import Encoded, Window, batches, disjoint, packed, sliding

PACKED_TOGETHER = 256
"""Documents that are packed into common windows: so many, whatever is scored at a time."""


class Perplexity:
    """Documents are scored behind the beginning-of-text token (the end-of-text one of a tokenizer without it), which is
    never scored itself; where there is neither, a document's first token is context. A text's end is not scored."""

    def __init__(self, config: PerplexityConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        model = bench.subject.load()
        check_room(f"perplexity: context = {self.config.context}", model, self.config.context - 1)
        together = PACKED_TOGETHER if self.config.windows == "packed" else 0
        for group in groups(bench, self.config, together):
            self._measure(group, model, bench)

    def _measure(self, group: Sequence[Document], model: Stepper, bench: Bench) -> None:
        encoded = list(encode_many(group, model.tokenizer))
        nll = [0.0] * len(group)
        for chosen in batches(windows(encoded, self.config), self.config.batch):
            scores = model.score(*pad([window.ids for window in chosen], model.device))
            for row, window in enumerate(chosen):
                for place, begin, end in window.pieces:
                    nll[place] -= float(scores.logprob[row, begin - 1 : end - 1].double().sum())
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


def windows(encoded: Sequence[Encoded], config: PerplexityConfig) -> Iterator[Window]:
    """The windows of documents, as the config says."""
    if config.windows == "packed":
        yield from packed(encoded, config.context)
        return
    stride = config.stride or config.context // 2
    for number, (ids, context) in enumerate(encoded):
        if config.windows == "sliding":
            yield from sliding(number, ids, context, config.context, stride)
        else:
            yield from disjoint(number, ids, context, config.context)


def groups(
    bench: Bench, config: PerplexityConfig | DivergenceConfig | AgreementConfig, together: int = 0
) -> Iterator[list[Document]]:
    """The documents of a suite's data, so many at a time that records keep coming (or `together`), with progress as
    they are done: of `limit`, until all of fewer are, or of a number that is not known before.

    Raises MambabenchError where there are none."""
    documents = read_documents(bench.data[config.data])
    if config.limit:
        documents = itertools.islice(documents, config.limit)
    done = 0
    bench.emit("progress", done=0, total=config.limit, unit="documents")
    while group := list(itertools.islice(documents, together or 16 * config.batch)):
        if done:
            bench.emit("progress", done=done, total=config.limit, unit="documents")
        yield group
        done += len(group)
    if not done:
        raise MambabenchError(f"{bench.data[config.data]}: no documents to score")
    bench.emit("progress", done=done, total=done, unit="documents")
