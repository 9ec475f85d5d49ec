"""Text as windows of tokens: documents packed whole, with positions that keep them apart."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..harness.documents import encode_ended, read_documents
from ..harness.interfaces import MambabenchError, Tokenizer
from .losses import IGNORED


@dataclass(frozen=True, slots=True)
class Windows(Dataset[dict[str, Tensor]]):
    """Packed documents, padded at the right."""

    ids: Tensor
    """int64 [N, context]"""
    labels: Tensor
    """int64 [N, context], `IGNORED` for prompts, padding and first tokens, which nothing predicts"""
    lengths: Tensor
    """int64 [N]"""
    positions: Tensor
    """int64 [N, context], from 0 in each document; padding continues the last"""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[index],
            "labels": self.labels[index],
            "length": self.lengths[index],
            "position_ids": self.positions[index],
        }


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks windows, cut after the longest. The mask is for counting: causal models need none with padding at the
    right."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    longest = int(batch["length"].max())
    return {
        "input_ids": batch["input_ids"][:, :longest],
        "labels": batch["labels"][:, :longest],
        "position_ids": batch["position_ids"][:, :longest],
        "attention_mask": (torch.arange(longest) < batch["length"][:, None]).long(),
    }


def read_windows(path: Path, tokenizer: Tokenizer, context: int) -> Windows:
    """Reads documents into windows; a text begins with the leading token and ends with the end token, if there is one.

    Raises MambabenchError where nothing is left to learn.
    """
    rows = []
    for document in read_documents(path):
        ids, prompt = encode_ended(document, tokenizer)
        rows.append((ids, [IGNORED] * prompt + ids[prompt:]))
    return pack(rows, context, str(path))


def pack(documents: Iterable[tuple[list[int], list[int]]], context: int, name: str = "data") -> Windows:
    """Packs documents (ids and labels) into windows of `context` tokens.

    Longer documents are cut; what fits into a window stays whole, and the fullest window that has room takes the
    longest piece first (best fit decreasing), so that little is padding. Positions begin anew in each, by which a model
    keeps the documents of a window apart.
    """
    pieces = []
    for ids, labels in documents:
        for first in range(0, len(ids), context):
            piece = [IGNORED, *labels[first + 1 : first + context]]
            if any(label != IGNORED for label in piece):
                pieces.append((ids[first : first + context], piece))
    if not pieces:
        raise MambabenchError(f"{name}: no text to learn from")
    pieces.sort(key=lambda piece: -len(piece[0]))
    rows: list[tuple[list[int], list[int], list[int]]] = []
    room: list[tuple[int, int]] = []
    for ids, labels in pieces:
        place = bisect.bisect_left(room, (len(ids), 0))
        if place < len(room):
            left, row = room.pop(place)
            rows[row][0].extend(ids)
            rows[row][1].extend(labels)
            rows[row][2].extend(range(len(ids)))
        else:
            left, row = context, len(rows)
            rows.append((list(ids), list(labels), list(range(len(ids)))))
        if left > len(ids):
            bisect.insort(room, (left - len(ids), row))
    lengths = torch.tensor([len(ids) for ids, _, _ in rows])
    for ids, labels, positions in rows:
        padding, last = context - len(ids), positions[-1]
        ids.extend([0] * padding)
        labels.extend([IGNORED] * padding)
        positions.extend(range(last + 1, last + 1 + padding))
    tokens, targets, places = (torch.tensor(part) for part in zip(*rows, strict=True))
    return Windows(tokens, targets, lengths, places)
