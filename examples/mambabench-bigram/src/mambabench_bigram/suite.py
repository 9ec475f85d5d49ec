"""Counts different n-grams: a decoder that loops writes few."""

from __future__ import annotations

from itertools import islice

from mambabench import Bench, Limits, Prompt
from mambabench.harness.documents import encode_document, read_documents

from .plugin import DistinctConfig


class Distinct:
    """The suite `distinct`: per prompt and n, different n-grams (value) among all n-grams (weight) of the new text."""

    def __init__(self, config: DistinctConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        model, config = bench.subject.load(), self.config
        documents = list(islice(read_documents(bench.data[config.data]), config.prompts))
        prompts = [
            Prompt(tuple(encode_document(document, model.tokenizer)[0][: config.prompt_tokens]), sequence)
            for sequence, document in enumerate(documents)
        ]
        assert bench.subject.decoder is not None
        answers = bench.subject.decoder.generate(
            model, prompts, Limits(new_tokens=config.new_tokens, seed=bench.seed), lambda kind, /, **fields: None
        )
        for document, answer in zip(documents, answers, strict=True):
            for n in config.n:
                grams = [answer.ids[i : i + n] for i in range(len(answer.ids) - n + 1)]
                if grams:
                    bench.emit(
                        "sample",
                        task="distinct",
                        item=document.item,
                        metric=f"distinct_{n}",
                        value=float(len(set(grams))),
                        weight=float(len(grams)),
                    )
