"""Text as windows of tokens: documents packed whole, with positions that keep them apart."""

from __future__ import annotations

import bisect
import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..harness import documents
from ..harness.cache import make_once
from ..harness.interfaces import MambabenchError, Tokenizer
from . import batches
from .losses import IGNORED

Tokens = NDArray[np.int32]
CODE = [Path(str(module)).read_text(encoding="utf-8") for module in (__file__, documents.__file__)]
"""What this process makes windows with, files changing or not."""


@dataclass(frozen=True, slots=True)
class Windows(Dataset[dict[str, Tensor]]):
    """Packed documents, padded at the right. Kept in 32 bits (or what is given): there may be hundreds of millions."""

    ids: Tensor
    """int32 [N, context]"""
    labels: Tensor
    """int32 [N, context], `IGNORED` for prompts, padding and first tokens, which nothing predicts"""
    lengths: Tensor
    """int64 [N]"""
    positions: Tensor
    """int32 [N, context], from 0 in each document; padding continues the last"""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[index],
            "labels": self.labels[index],
            "length": self.lengths[index],
            "position_ids": self.positions[index],
        }


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Stacks windows, cut after the longest, as int64, with what `batches.known` says of them. The mask is for
    counting: causal models need none with padding at the right."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    longest = int(batch["length"].max())
    ids, labels, positions = (batch[key][:, :longest].long() for key in ("input_ids", "labels", "position_ids"))
    mask = (torch.arange(longest) < batch["length"][:, None]).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, **batches.known(labels, positions)}


def read_windows(path: Path, tokenizer: Tokenizer, context: int, cache: Path | None = None) -> Windows:
    """Reads documents into windows; a text begins with the leading token and ends with the end token, if there is one.

    With `cache`, a folder, equal windows are made once and then mapped into memory. Raises MambabenchError where
    nothing is left to learn.
    """
    file = None if cache is None else _file_of(path, tokenizer, context, cache)
    made: list[Windows] = []

    def make() -> Windows:
        encoded = documents.encode_many(documents.read_documents(path), tokenizer, ended=True)
        made.append(pack(map(_learnt, encoded), context, str(path)))
        return made[0]

    if file is not None and make_once(file, lambda out: _write(make(), out)) and not made:
        try:
            found = load_file(file)
            return Windows(*(found[field.name] for field in fields(Windows)))
        except (SafetensorError, KeyError, OSError):
            # Damaged: whoever comes next makes it anew.
            file.unlink(missing_ok=True)
    return made[0] if made else make()


def _write(windows: Windows, file: Path) -> None:
    try:
        save_file({field.name: getattr(windows, field.name) for field in fields(Windows)}, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def pack(rows: Iterable[tuple[Any, Any]], context: int, name: str = "data") -> Windows:
    """Packs documents (ids and labels, equally long sequences) into windows of `context` tokens.

    Longer documents are cut; what fits into a window stays whole, and the fullest window that has room takes the
    longest piece first (best fit decreasing), so that little is padding. Positions begin anew in each, by which a model
    keeps the documents of a window apart.
    """
    arrays = [(np.asarray(ids, np.int32), np.asarray(labels, np.int32)) for ids, labels in rows]
    sizes = np.array([len(ids) for ids, _ in arrays], np.int64)
    ids, labels = (np.concatenate([array[side] for array in arrays] or [np.empty(0, np.int32)]) for side in (0, 1))
    del arrays
    starts, lengths = _pieces(sizes, context)
    labels[starts] = IGNORED
    learnt = np.add.reduceat(labels != IGNORED, starts, dtype=np.int64) > 0 if len(starts) else np.empty(0, bool)
    starts, lengths = starts[learnt], lengths[learnt]
    if not len(starts):
        raise MambabenchError(f"{name}: no text to learn from")
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    windows, columns = _places(lengths.tolist(), context)
    count = max(windows) + 1
    tokens = np.zeros((count, context), np.int32)
    targets = np.full((count, context), IGNORED, np.int32)
    positions = np.empty((count, context), np.int32)
    upwards = np.arange(context, dtype=np.int32)
    filled = np.zeros(count, np.int64)
    for window, column, start, length in zip(windows, columns, starts.tolist(), lengths.tolist(), strict=True):
        tokens[window, column : column + length] = ids[start : start + length]
        targets[window, column : column + length] = labels[start : start + length]
        # To the end: what follows overwrites, and padding goes on from the last piece.
        positions[window, column:] = upwards[: context - column]
        filled[window] = column + length
    return Windows(*map(torch.from_numpy, (tokens, targets, filled, positions)))


def _learnt(encoded: tuple[Sequence[int], int]) -> tuple[Tokens, Tokens]:
    """Ids and labels of a document of which the first tokens are context."""
    ids = np.array(encoded[0], np.int32)
    labels = ids.copy()
    labels[: encoded[1]] = IGNORED
    return ids, labels


def _pieces(sizes: NDArray[np.int64], context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the pieces of documents begin that lie one behind the other, and how long they are: at most `context`."""
    counts = -(-sizes // context)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(sizes) - sizes, counts) + number * context
    return starts, np.minimum(np.repeat(sizes, counts) - number * context, context)


def _places(lengths: Sequence[int], context: int) -> tuple[list[int], list[int]]:
    """Window and first column of each piece, of falling lengths: the fullest window with room, the first of those."""
    windows, columns, count = [], [], 0
    rooms: list[int] = []
    """Rooms that some window has, rising."""
    having: dict[int, list[int]] = {}
    """Room -> heap of the windows that have it."""
    for length in lengths:
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            window = heapq.heappop(having[room])
            if not having[room]:
                del having[room], rooms[place]
        else:
            room, window = context, count
            count += 1
        windows.append(window)
        columns.append(context - room)
        if left := room - length:
            if left not in having:
                having[left] = []
                bisect.insort(rooms, left)
            heapq.heappush(having[left], window)
    return windows, columns


def _file_of(path: Path, tokenizer: Tokenizer, context: int, cache: Path) -> Path | None:
    """Where windows are kept, by a hash of all that decides them; None for a tokenizer that cannot be written down."""
    inner: Any = getattr(tokenizer, "backend_tokenizer", None)
    source = path / "data.jsonl" if path.is_dir() else path
    if inner is None or not source.is_file():
        return None
    with source.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, str(getattr(tokenizer, "chat_template", None))]
    decides = [content, source.suffixes, inner.to_str(), *ends, type(tokenizer).__name__, context, CODE]
    return cache / f"windows-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]}.safetensors"
