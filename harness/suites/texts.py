"""What suites need of documents: prompts of a given length, and padded batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..documents import Document, encode_document, read_documents
from ..interfaces import Answer, MambabenchError, Stepper, Unsupported


def pad(texts: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """Token ids as int64 [B, L], right-padded with 0, and their lengths, int32 [B]."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    # All of them at once: a tensor of each takes longer than running a small model on it.
    real = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    ids[real] = torch.tensor(list(itertools.chain.from_iterable(texts)), dtype=torch.int64)
    return ids.to(device), lengths.to(device)


def take_prompts(path: Path, model: Stepper, count: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """The beginnings of `count` documents; their lengths in tokens go round in `lengths`.

    A document that is too short is continued with the next one. Where data run out, long texts go on with later
    passages, and then all is taken again from the beginning. Raises `MambabenchError` if there is no document.
    """
    # Only this much is needed at a time, and documents can be books; no token is this long on average.
    characters = 64 * (max(lengths) + 4)
    encoded = (encode_document(document, model.tokenizer)[0] for document in _passages(path, characters, rounds=count))
    needed = [lengths[number % len(lengths)] for number in range(count)]
    source = itertools.cycle(ids for ids in encoded if ids)
    prompts = []
    for length in needed:
        prompt: list[int] = []
        while len(prompt) < length:
            part = next(source, None)
            if part is None:
                raise MambabenchError(f"{path}: no documents to take prompts from")
            prompt += part
        prompts.append(tuple(prompt[:length]))
    return prompts


def _passages(path: Path, characters: int, rounds: int) -> Iterator[Document]:
    """The beginning of every document, then what follows of those that are longer texts, and so on."""
    longer: list[Document] = []
    for document in read_documents(path):
        text = document.text
        yield dataclasses.replace(document, text=text[:characters])
        if document.ids is None and not document.asks and len(text) > characters:
            longer.append(dataclasses.replace(document, text=text[characters : rounds * characters]))
    while longer:
        for document in longer:
            yield dataclasses.replace(document, text=document.text[:characters])
        longer = [dataclasses.replace(of, text=of.text[characters:]) for of in longer if len(of.text) > characters]


def check_whole(suite: str, decoder: str, answers: Sequence[Answer], new_tokens: int) -> None:
    """Raises `MambabenchError` where a text that nothing may end early has not as many tokens as were asked for."""
    for answer in answers:
        if len(answer.ids) != new_tokens:
            wrong = f"yielded {len(answer.ids)} tokens, not the {new_tokens} asked for"
            raise MambabenchError(f"{suite}: decoder {decoder!r} {wrong}")


def check_room(what: str, model: Stepper, tokens: int) -> None:
    """Raises `Unsupported` where a model has too few positions for what an option of a suite asks."""
    if tokens > model.max_context:
        raise Unsupported(f"{what} needs {tokens} positions, the model has {model.max_context}")
