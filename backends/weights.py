"""The tensors of a checkpoint folder: which file holds each, read one at a time, written in shards.

Headers are read without weights, so that a folder is refused before anything is loaded or copied; tensors are views of
mapped files, so that a model of any size can be copied from folder to folder with a shard's memory. Safetensors are
read, or else PyTorch's own files, of which nothing but tensors is taken; safetensors are written.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..harness.interfaces import MambabenchError

SINGLE, PICKLED = "model.safetensors", "pytorch_model.bin"
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""safetensors' names of dtypes."""
SHARD = 5_000_000_000
"""Largest file that is written, in bytes, where no single tensor is larger."""


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, in the order of its files. Raises MambabenchError for a folder without any."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        paths, index, where = _listing(folder)
        for path in paths:
            self._opened[path] = _open(path)
            self.files.update(dict.fromkeys(self._opened[path].keys(), path))
        for name, path in self.files.items():
            if where is not None and name not in where:
                raise MambabenchError(f"{index}: weight_map lacks tensor {name}, which {path.name} has")

    def __getitem__(self, name: str) -> Tensor:
        """On CPU, a view of the mapped file."""
        file = self._opened[self.files[name]]
        tensor: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' name of the dtype, without reading the tensor."""
        file = self._opened[self.files[name]]
        if isinstance(file, dict):
            return tuple(file[name].shape), KINDS.get(file[name].dtype, str(file[name].dtype))
        part = file.get_slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())


def index_of(single: Path) -> Path:
    """Where the index of shards stands, if there are some in place of a single file."""
    return single.with_name(f"{single.name}.index.json")


def shards(folder: Path) -> list[Path]:
    """The files of a folder's weights: those that its index lists, or the single one."""
    return _listing(folder)[0]


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
        listed = {"metadata": {"total_size": total}, "weight_map": where}
        index_of(out / SINGLE).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MambabenchError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise MambabenchError(f"{path}: not a JSON object")
    return raw


def _listing(folder: Path) -> tuple[list[Path], Path, Mapping[str, str] | None]:
    """The files of a folder's weights, and the index that says which of them has each tensor, if there is one."""
    for single in (folder / SINGLE, folder / PICKLED):
        index = index_of(single)
        if index.is_file():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict):
                raise MambabenchError(f"{index}: has no weight_map")
            for name, file in where.items():
                if not isinstance(file, str):
                    raise MambabenchError(f"{index}: weight_map names {file!r} as the file of tensor {name}")
            return [folder / file for file in sorted(set(where.values()))], index, where
        if single.is_file():
            return [single], single, None
    raise MambabenchError(f"{folder}: no {SINGLE} and no {index_of(folder / SINGLE).name}, nor {PICKLED}")


def _shard(number: int, count: int) -> str:
    """transformers' name of a shard; a count of 0 stands until it is known."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _open(path: Path) -> Any:
    if not path.is_file():
        raise MambabenchError(f"{path}: the file is missing, but the index names it")
    if path.suffix == ".bin":
        return _unpickle(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise MambabenchError(f"{path}: not a whole safetensors file ({error})") from None


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped where its format allows it. Nothing in it is run."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MambabenchError(f"{path}: not a whole file of tensors alone ({reason})") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise MambabenchError(f"{path}: not a mapping of names to tensors")
    return loaded
