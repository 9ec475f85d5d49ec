"""The tensors of a checkpoint folder: which file holds each, read one at a time, written in shards.

Headers are read without weights, so that a folder is refused before anything is loaded or copied; tensors are views of
mapped files, so that a model of any size can be copied from folder to folder with a shard's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..harness.interfaces import MambabenchError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5_000_000_000
"""Largest file that is written, in bytes, where no single tensor is larger."""


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, in the order of its files. Raises MambabenchError for a folder without any."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for path in shards(folder):
            self._opened[path] = _open(path)
            self.files.update(dict.fromkeys(self._opened[path].keys(), path))

    def __getitem__(self, name: str) -> Tensor:
        """On CPU, a view of the mapped file."""
        tensor: Tensor = self._opened[self.files[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' name of the dtype, without reading the tensor."""
        part = self._opened[self.files[name]].get_slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())


def shards(folder: Path) -> list[Path]:
    """The files of a folder's weights: those that its index lists, or the single one."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise MambabenchError(f"{index}: has no weight_map")
        return [folder / name for name in sorted(set(listed.values()))]
    if single.is_file():
        return [single]
    raise MambabenchError(f"{folder}: no {SINGLE} and no {INDEX}")


def write(out: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes `model.safetensors`, or shards of at most `SHARD` bytes and their index. Holds one shard in memory."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[list[str]] = []
    part: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(part, out / _shard(len(written) + 1, 0), metadata={"format": "pt"})
        written.append(list(part))
        part.clear()

    for name, tensor in tensors:
        if part and size + tensor.nbytes > SHARD:
            flush()
            size = 0
        part[name] = tensor.detach().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    count = len(written)
    names = {number: _shard(number, count) if count > 1 else SINGLE for number in range(1, count + 1)}
    for number, name in names.items():
        (out / _shard(number, 0)).replace(out / name)
    if count > 1:
        where = {tensor: names[number] for number, held in enumerate(written, 1) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MambabenchError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise MambabenchError(f"{path}: not a JSON object")
    return raw


def _shard(number: int, count: int) -> str:
    """transformers' name of a shard; a count of 0 stands until it is known."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise MambabenchError(f"{path}: the file is missing, but the index names it") from None
    except SafetensorError as error:
        raise MambabenchError(f"{path}: not a whole safetensors file ({error})") from None
