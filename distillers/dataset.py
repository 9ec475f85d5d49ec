"""Data from outside: files of JSON, parquet or text, folders, and Hugging Face data sets, made into documents.

Files are read as they are; only folders and data sets of the hub need the package `datasets`, which streams them, so
that nothing is copied. Of the hub, what is in the local cache is taken without asking the network.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..harness.documents import open_text, read_documents
from ..harness.interfaces import Job, MambabenchError, Unsupported
from .data_configs import DatasetConfig, MixConfig, cached_snapshot, find_commit
from .rows import Reader, Row

EVERY = 10_000
"""Rows between records of progress."""
FILES = (".json", ".jsonl", ".parquet", ".txt")


class DatasetSource:
    """The source `dataset`."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        """Writes `data.jsonl`. Emits how many documents came of how many rows, and of how many none came.

        Raises Unsupported where a data set is neither at hand nor to be had from the hub.
        """
        config = self.config
        rows = read_file_or_folder(job.data[config.path], config) if config.path else self._hub(job)
        rows = itertools.islice(rows, config.first, config.first + config.limit if config.limit else None)
        where = config.path or f"hf:{config.name}"
        reader: Reader | None = None
        taken = empty = documents = 0
        with (job.out / "data.jsonl").open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows, config.first + 1):
                reader = reader or Reader(config, list(row), where)
                records = list(reader.records(row, number))
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                taken, empty, documents = taken + 1, empty + (not records), documents + len(records)
                if taken % EVERY == 0:
                    job.emit("progress", done=taken, total=config.limit, unit="rows")
        if not documents:
            raise MambabenchError(f"{where}: no documents in {taken} rows")
        for name, value in (("rows", taken), ("rows_left_out", empty), ("documents", documents)):
            job.emit("fact", name=name, value=value)

    def _hub(self, job: Job) -> Iterator[Row]:
        config = self.config
        folder = cached_snapshot(config.name, config.revision) or fetch(config.name, config.revision)
        job.emit("fact", name="data_commit", value=folder.name)
        yield from read_folder(folder, config)


class Mix:
    """The source `mix`: several data as one, in an order that a seed decides."""

    def __init__(self, config: MixConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        import random

        lines: list[str] = []
        for name in self.config.data:
            path = job.data[name]
            if path.is_dir():
                lines += (path / "data.jsonl").read_text(encoding="utf-8").splitlines()
            elif path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".xz"]:
                with open_text(path) as file:
                    lines += [line.strip() for line in file if not line.isspace()]
            else:
                lines += [json.dumps({"text": document.text}) for document in read_documents(path)]
        random.Random(self.config.seed).shuffle(lines)
        (job.out / "data.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        job.emit("fact", name="documents", value=len(lines))


def fetch(name: str, revision: str) -> Path:
    """Fetches a data set from the hub into its local cache. Raises Unsupported where it cannot be had."""
    commit = find_commit(name, revision)
    if not commit:
        raise Unsupported(f"hf:{name}: not in the local cache, and the hub cannot be reached")
    import httpx
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision or commit))
    except (httpx.HTTPError, OSError) as error:
        raise Unsupported(f"hf:{name}: fetching it from the hub failed: {error}") from None


def read_file_or_folder(path: Path, config: DatasetConfig) -> Iterator[Row]:
    """Rows of a file, or of a folder's files or split."""
    return read_folder(path, config) if path.is_dir() else read_file(path)


def read_file(file: Path) -> Iterator[Row]:
    """Rows of a .json (a list of objects), .jsonl, .txt or .parquet file; all but the last may be .xz."""
    kind = Path(file.stem).suffix if file.suffix == ".xz" else file.suffix
    match kind:
        case ".txt":
            yield from ({"text": document.text} for document in read_documents(file))
        case ".json":
            with open_text(file) as stream:
                yield from _objects(_json(file, stream.read()), file)
        case ".jsonl":
            with open_text(file) as stream:
                for number, line in enumerate(stream, 1):
                    if not line.isspace():
                        yield from _objects([_json(f"{file}:{number}", line)], f"{file}:{number}")
        case ".parquet":
            yield from _parquet(file)
        case _:
            raise MambabenchError(f"{file}: unknown kind of data (known: {', '.join(FILES)}, all but parquet also .xz)")


def read_folder(folder: Path, config: DatasetConfig) -> Iterator[Row]:
    """Rows of one split of a folder: as `save_to_disk` left it, or of files as the hub has them."""
    try:
        import datasets
    except ImportError:
        raise Unsupported(
            f"{folder}: folders are read by the package `datasets` (pip install mambabench[train])"
        ) from None
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(str(folder))
            if isinstance(found, dict) and config.split not in found:
                raise MambabenchError(f"{folder}: no split {config.split!r}; there are {', '.join(found)}")
            found = found[config.split] if isinstance(found, dict) else found
        else:
            found = datasets.load_dataset(str(folder), config.subset or None, split=config.split, streaming=True)
        yield from found
    except (ValueError, OSError, RuntimeError) as error:
        raise MambabenchError(f"{folder}: {' '.join(str(error).split())[:300]}") from None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise MambabenchError(f"{file}: not parquet: {' '.join(str(error).split())[:300]}") from None


def _json(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MambabenchError(f"{where}: not JSON: {error.msg} in line {error.lineno}") from None


def _objects(value: Any, where: object) -> Iterable[Row]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise MambabenchError(f"{where}: rows are JSON objects, in a list or one a line")
    return value
