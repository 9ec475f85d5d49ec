"""Where lm-eval's tasks come from: its own, or a folder of YAML files."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.tasks
from jinja2.exceptions import UndefinedError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from ..interfaces import MambabenchError, Unsupported
from .lm_eval_data import Missing, data_from
from .lm_eval_generation import CONFIGS

DEFINITION = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*$", re.MULTILINE)


class NoData(Unsupported):
    """A task whose data another try would not find either: a step may do without it, and say so."""


def load_tasks(
    name: str, folder: Path | None, scratch: Path, local: Path | None = None
) -> Iterator[tuple[str, str, Any]]:
    """Yields the name that its items are counted under, lm-eval's name and its task object, of each task that `name`
    means: of the YAML files in `folder`, or lm-eval's own without one. The tasks of a group whose metrics are
    means over all items are counted as the group. Data of the hub are read from the folder `local` if given.

    Raises `MambabenchError` for an unknown name and for what is wrong in a YAML file, `Unsupported` for a task whose
    data cannot be had.
    """
    if name in CONFIGS and folder is None:
        own = _loaded(name, TaskManager(include_defaults=False), CONFIGS[name](), scratch, local)
        yield name, name, own[name]
        return
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else builtin(name)
    if name not in manager.all_tasks:
        known = f"{folder} has {', '.join(manager.all_tasks) or 'none'}" if folder else "lm-eval has none of this name"
        raise MambabenchError(f"lm-eval: unknown task {name!r}; {known}")
    manager._factory = Factory(scratch if folder else None, manager.all_tasks)
    one = _one_mean(name, manager)
    for each, task in _loaded(name, manager, name, scratch, local).items():
        yield name if one else each, each, task


def _loaded(name: str, manager: TaskManager, spec: Any, scratch: Path, local: Path | None) -> dict[str, Any]:
    try:
        with data_from(local, scratch):
            return dict(manager.load(spec)["tasks"])
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = NoData if isinstance(error, Missing) else Unsupported
        raise kind(f"lm-eval: the data of task {name!r} cannot be had: {reason}") from error


class Factory(TaskFactory):
    """lm-eval's own way from YAML to tasks, with data files found beside the YAML and cached in `scratch` if given, and
    one line for what is wrong. lm-eval itself looks for them in the working directory, and copies them into the user's
    cache."""

    def __init__(self, scratch: Path | None, known: Sequence[str]) -> None:
        super().__init__()
        self.scratch, self.known = scratch, known

    def build(self, entry: Entry, *, overrides: dict[str, Any] | None = None, registry: dict[str, Entry]) -> Any:
        # Tasks that a group defines itself are built on the way.
        with _told(entry):
            return super().build(entry, overrides=overrides, registry=registry)

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        with _told(entry):
            return super()._build_task(entry, overrides)

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if self.scratch is None or entry.yaml_path is None:
            return config
        return self._local(config, entry.name, entry.yaml_path.parent, self.scratch)

    def _local(self, config: dict[str, Any], name: str, folder: Path, scratch: Path) -> dict[str, Any]:
        members = config.get("task")
        if isinstance(members, list):
            inline = [self._member(member, name, folder, scratch) for member in members]
            return {**config, "task": inline}
        options = dict(config.get("dataset_kwargs") or {})
        files = {key: _beside(options[key], folder) for key in ("data_files", "data_dir") if key in options}
        if files:
            return {**config, "dataset_kwargs": {"cache_dir": str(scratch / "datasets"), **options, **files}}
        return config

    def _member(self, member: Any, name: str, folder: Path, scratch: Path) -> Any:
        """What a group names, or defines on the spot."""
        own = {"task": member} if isinstance(member, str) else member
        if not isinstance(own, Mapping) or not {"task", "group"} & own.keys():
            raise ValueError(
                f"a member of `task` is {member!r}; the name of a task, or a mapping with `task`, is right"
            )
        defined = "dataset_path" in own or isinstance(own.get("task"), list)
        if not defined and own.get("group", own.get("task")) not in self.known:
            raise MambabenchError(f"lm-eval: {name!r} names {own.get('task')!r}, which is no task beside it")
        return member if isinstance(member, str) else self._local(dict(own), name, folder, scratch)


@contextmanager
def _told(entry: Entry) -> Iterator[None]:
    """Has every exception that a task's configuration causes name the YAML file, the task and, if it can, the key."""
    try:
        yield
    except (MambabenchError, OSError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        quoted = re.findall(r"'([^']+)'", text)
        # The words of an exception that a template raises end with the name that items lack.
        word = quoted[-1 if isinstance(error, UndefinedError) else 0] if quoted else ""
        keys = dict.fromkeys(key for key, value in _strings(_config(entry)) if word and _names(value, word))
        where = f"task {entry.name!r}" + "".join(f", `{key}`" for key in keys)
        what = f"{text}: its items have no such field" if isinstance(error, UndefinedError) else text
        raise MambabenchError(f"lm-eval: {entry.yaml_path or 'tasks'}: {where}: {what}") from error


def _strings(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a configuration, each with the key that it stands behind."""
    if isinstance(config, str):
        yield key, config
    elif isinstance(config, Mapping):
        for name, value in config.items():
            yield from _strings(value, str(name))
    elif isinstance(config, list):
        for value in config:
            yield from _strings(value, key)


def _names(value: str, word: str) -> bool:
    """Whether a text is a word, or a template that holds it."""
    return value == word or ("{" in value and re.search(rf"\b{re.escape(word)}\b", value) is not None)


def _config(entry: Entry) -> Mapping[str, Any]:
    return load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}


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


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(of, folder) for split, of in files.items()}
    if isinstance(files, list):
        return [_beside(file, folder) for file in files]
    return files if "://" in files else str(folder / files)
