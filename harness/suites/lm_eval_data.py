"""Where the data of lm-eval's tasks come from: a folder in place of the hub, or the hub where it answers.

lm-eval asks `datasets.load_dataset` for all data. While tasks are loaded that is ours: a hub that does not answer is
given up within seconds, what its cache has still counts, and the working directory is never taken for the hub.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import httpx
from datasets.exceptions import DatasetsError, FileNotFoundDatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import constants

from ..interfaces import MambabenchError

ASK_S = 5.0
"""Seconds that the hub has to answer at all."""
FORMATS = frozenset({".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv"})
LAYOUT = "files named after splits (test.jsonl, train.parquet, …)"
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SCRIPT = "Dataset scripts are no longer supported"
"""How `datasets` says that a data set is a Python script."""


class Missing(FileNotFoundError):
    """Data that another try would not find either."""


class Splits(datasets.DatasetDict):
    """A data set that says which splits it has when asked for another."""

    def __missing__(self, split: str) -> Any:
        raise LookupError(f"no split {split!r}; the data have {', '.join(self)}")


@contextmanager
def data_from(local: Path | None, scratch: Path) -> Iterator[None]:
    """Inside, `datasets.load_dataset` reads what lies on the hub from `local`, or asks the hub only if it answers.

    Raises `Missing` for data that `local` does not have or that are a script, OSError for a hub that cannot be had.
    """
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in _PACKAGED_DATASETS_MODULES or Path(path).is_absolute():
            found = original(path, name, **options)
        elif local is not None:
            options = {key: value for key, value in options.items() if key not in ("revision", "cache_dir")}
            folder, options = in_place_of_hub(local, path, name, options)
            with told(str(folder), local, path, name):
                found = original(str(folder), cache_dir=str(scratch / "datasets"), **options)
        else:
            ask_hub(path)
            with told(path, local, path, name):
                found = original(path, name, **options)
        return Splits(found) if isinstance(found, datasets.DatasetDict) else found

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def in_place_of_hub(local: Path, path: str, name: str | None, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of the data set `path` in `local`, and the options to read the configuration `name` with. A copy of
    the hub's repository knows its configurations by its README.md; any other folder has one sub-folder for each, and
    lies in its own where there are none. Raises `Missing`."""
    folder = next((place for place in (local / path, local / path.rpartition("/")[2]) if place.is_dir()), None)
    if folder is None:
        raise Missing(f"{local} has no folder {path!r}")
    card = folder / "README.md"
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        return folder, {"name": name, **options}
    if not {"data_files", "data_dir"}.isdisjoint(options):
        return folder, options
    if name and (folder / name).is_dir():
        folder = folder / name
    elif name not in (None, "default"):
        # What lies there may be another configuration's.
        script = folder / f"{folder.name}.py"
        scripted = f"; `datasets` no longer runs scripts such as its {script.name}" if script.is_file() else ""
        raise Missing(f"{folder} has no folder {name!r} with {LAYOUT}{scripted}")
    files = by_split(folder)
    return folder, {"data_files": files, **options} if files else options


def by_split(folder: Path) -> dict[str, list[str]]:
    """The data files right in a folder by the splits that they are named after: `datasets` itself would take `dev` for
    `validation`, and a name that it does not know for `train`."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        # Older repositories of the hub keep a description beside the data.
        if FORMATS.intersection(path.suffixes) and path.name != datasets.config.DATASETDICT_INFOS_FILENAME:
            files.setdefault(SHARD.sub("", path.name.partition(".")[0]), []).append(path.name)
    return files


def ask_hub(path: str) -> None:
    """Has only the cache asked from now on if the hub does not answer."""
    if Path(path).exists():
        raise MambabenchError(
            f"lm-eval: the folder {path!r} of the working directory would be read in place of the hub's data set; name "
            "a folder in place of the hub in the option `local`, or run elsewhere"
        )
    if not hub_answers(path):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@contextmanager
def told(where: str, local: Path | None, path: str, name: str | None) -> Iterator[None]:
    """Says of what `datasets` raises whether there are no such data, or data that are wrong."""
    try:
        yield
    except RuntimeError as error:
        if SCRIPT not in str(error):
            raise
        place = "/".join(filter(None, (path, name)))
        folder = f"{local} needs a folder {place}" if local else f"the option `local` names a folder that has {place}"
        raise Missing(f"{where} is a script, which `datasets` no longer runs; {folder} with {LAYOUT}") from error
    except (ValueError, FileNotFoundDatasetsError) as error:
        if local:
            raise Missing(f"{where}: {error}") from error
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(str(error)) from error
        raise
    except DatasetsError as error:
        raise MambabenchError(f"lm-eval: {where} cannot be read as a data set: {error.__cause__ or error}") from error


@functools.lru_cache
def hub_answers(path: str) -> bool:
    """Whether the hub can be reached and tells of a data set, if only that there is none; no, where the environment
    forbids asking. The hub's own client would try again and again, and wait in between."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def ask() -> None:
        # Files and their lists are told by different services.
        for of in (f"datasets/{path}/resolve/main/README.md", f"api/datasets/{path}"):
            try:
                answered.append(not httpx.head(f"{constants.ENDPOINT}/{of}", timeout=ASK_S).is_server_error)
            except httpx.HTTPError:
                return

    # Looking up a name has a timeout of its own, which no client can set.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ASK_S)
    return answered == [True, True]
