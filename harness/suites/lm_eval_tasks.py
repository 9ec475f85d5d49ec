"""Where lm-eval's tasks and their data come from: its own, a folder of YAML files, a folder in place of the hub.

lm-eval asks `datasets.load_dataset` for all data. While tasks are loaded that is ours: data of the hub come from a
folder where one is given; a hub that does not answer is given up within seconds, what its cache has still counts.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import httpx
import lm_eval.tasks
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import constants
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from ..interfaces import MambabenchError, Unsupported
from .lm_eval_generation import CONFIGS

ASK_S = 5.0
"""Seconds that the hub has to answer at all."""
DEFINITION = re.compile(r"^(?:task|group):[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*$", re.MULTILINE)


def load_tasks(
    names: Sequence[str], folder: Path | None, scratch: Path, local: Path | None = None
) -> Iterator[tuple[str, str, Any]]:
    """Yields the name that its items are counted under, lm-eval's name and its task object, of each task that `names`
    mean: those of the YAML files in `folder`, or lm-eval's own without one. The tasks of a group whose metrics are
    means over all items are counted as the group. Data of the hub are read from the folder `local` if given.

    Raises `MambabenchError` for an unknown name and `Unsupported` for a task whose data cannot be had.
    """
    for name in names:
        if name in CONFIGS and folder is None:
            yield (
                name,
                name,
                _loaded(name, TaskManager(include_defaults=False), [CONFIGS[name]()], scratch, local)[name],
            )
            continue
        manager = TaskManager(include_path=folder, include_defaults=False) if folder else builtin(name)
        if name not in manager.all_tasks:
            known = (
                f"{folder} has {', '.join(manager.all_tasks) or 'none'}" if folder else "lm-eval has none of this name"
            )
            raise MambabenchError(f"lm-eval: unknown task {name!r}; {known}")
        spec: Any = name if folder is None else list(_local_configs(name, manager, scratch))
        loaded = _loaded(name, manager, spec, scratch, local)
        one = _one_mean(name, manager)
        for own, task in loaded.items():
            yield name if one else own, own, task


def _loaded(name: str, manager: TaskManager, spec: Any, scratch: Path, local: Path | None) -> dict[str, Any]:
    try:
        with data_from(local, scratch):
            return dict(manager.load(spec)["tasks"])
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unsupported(f"lm-eval: the data of task {name!r} cannot be had: {reason}") from error


@functools.lru_cache
def builtin(name: str) -> TaskManager:
    """lm-eval's own tasks: of the families that define `name`, or all where those need others. Reading the YAML of all
    takes some ten seconds, finding the families a fraction of one."""
    families = _families().get(name)
    if families:
        root = Path(lm_eval.tasks.__file__).parent
        manager = TaskManager(include_path=[str(root / family) for family in sorted(families)], include_defaults=False)
        if name in manager.all_tasks and _complete(name, manager):
            return manager
    return _all_builtin()


@functools.lru_cache
def _families() -> Mapping[str, set[str]]:
    """The folders of lm-eval that define a task or group, by its name."""
    root = Path(lm_eval.tasks.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.yaml"):
        for name in DEFINITION.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, set()).add(path.relative_to(root).parts[0])
    return found


@functools.lru_cache
def _all_builtin() -> TaskManager:
    return TaskManager()


def _complete(name: str, manager: TaskManager) -> bool:
    """Whether all that a group names is known."""
    entry = manager.task_index[name]
    if entry.kind is not Kind.GROUP:
        return True
    members = (entry.cfg or load_yaml(entry.yaml_path)).get("task", [])
    names = [member if isinstance(member, str) else member.get("task", "") for member in members]
    return all(isinstance(each, str) and each in manager.all_tasks and _complete(each, manager) for each in names)


def _one_mean(name: str, manager: TaskManager) -> bool:
    """Whether a group has one figure, in which each item counts the same."""
    entry = manager.task_index[name]
    if entry.kind is not Kind.GROUP:
        return False
    metrics = (entry.cfg or load_yaml(entry.yaml_path)).get("aggregate_metric_list") or []
    metrics = metrics if isinstance(metrics, list) else [metrics]
    return bool(metrics) and all(metric.get("weight_by_size", True) for metric in metrics)


@contextmanager
def data_from(local: Path | None, scratch: Path) -> Iterator[None]:
    """Inside, `datasets.load_dataset` reads what lies on the hub from `local`, or asks the hub only if it answers.

    Raises FileNotFoundError for data that `local` does not have.
    """
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in _PACKAGED_DATASETS_MODULES or Path(path).exists():
            return original(path, name, **options)
        if local is not None:
            options = {key: value for key, value in options.items() if key not in ("revision", "cache_dir")}
            found, config = in_place_of_hub(local, path, name)
            return original(str(found), config, cache_dir=str(scratch / "datasets"), **options)
        if not hub_answers():
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        try:
            return original(path, name, **options)
        except ValueError as error:
            if not constants.HF_HUB_OFFLINE:
                raise
            raise FileNotFoundError(str(error)) from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def in_place_of_hub(local: Path, path: str, name: str | None) -> tuple[Path, str | None]:
    """The folder of the data set `path` in `local`, and the configuration to ask it for. A copy of the hub's repository
    knows its configurations by its README.md; any other folder has one sub-folder for each."""
    for folder in (local / path, local / path.rpartition("/")[2]):
        if folder.is_dir():
            card = folder / "README.md"
            if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
                return folder, name
            return (folder / name, None) if name and (folder / name).is_dir() else (folder, None)
    raise FileNotFoundError(f"{local} has no folder {path!r}")


@functools.lru_cache
def hub_answers() -> bool:
    """Whether the hub can be reached; no, where the environment forbids asking."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def ask() -> None:
        try:
            httpx.head(constants.ENDPOINT, timeout=ASK_S)
        except httpx.HTTPError:
            return
        answered.append(True)

    # Looking up a name has a timeout of its own, which no client can set.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ASK_S)
    return bool(answered)


def _local_configs(name: str, manager: TaskManager, scratch: Path) -> Iterator[dict[str, Any]]:
    """The configurations of a task, or of all tasks of a group or tag, with data files found beside their YAML and
    cached in `scratch`.

    lm-eval itself would look for them in the working directory, and copy them into the user's cache.
    """
    entry = manager.task_index[name]
    config = load_yaml(entry.yaml_path) if entry.yaml_path else {}
    members = sorted(entry.tags) if entry.kind is Kind.TAG else config["task"]
    if entry.kind in (Kind.TAG, Kind.GROUP):
        for member in members:
            if member not in manager.all_tasks:
                raise MambabenchError(f"lm-eval: {name!r} names {member!r}, which is no task beside it")
            yield from _local_configs(member, manager, scratch)
        return
    options = dict(config.get("dataset_kwargs") or {})
    local = {key: _beside(options[key], entry.yaml_path.parent) for key in ("data_files", "data_dir") if key in options}
    if local:
        config["dataset_kwargs"] = {"cache_dir": str(scratch / "datasets"), **options, **local}
    yield config


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(of, folder) for split, of in files.items()}
    if isinstance(files, list):
        return [_beside(file, folder) for file in files]
    return files if "://" in files else str(folder / files)
