"""The store of a run: a folder that survives `kill -9` at any moment and never shows half a step as a whole one.

A finished step is a folder in `steps/`, put there by one rename after everything in it is on disk. It counts only while
its `outcome.json` parses, says `ok`, and every file that it lists still has the size it had. Everything else lives in
`partial/`. A kill between the outcome and the rename loses nothing: the next run completes the step. docs/records.md
describes the files. Nothing here imports pandas or torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .interfaces import STATES, MambabenchError, Outcome
from .locks import Lock

SCHEMA = 1
"""Version of the layout. Raised when an older mambabench would misread a store."""

UNLISTED = frozenset({"outcome.json", "log.txt"})
"""Files that the outcome of a finished step does not vouch for: itself, and the log that may still grow."""

LOCKS = "locks"
TEMPORARY = ".tmp"
"""How files end that a killed write may have left."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a step stands: `ok`, `absent`, `running`, `interrupted`, or the state of its last failed attempt."""

    state: str
    reason: str = ""
    record: Mapping[str, Any] | None = None
    """outcome.json, where there is a whole one."""


class Linked(Protocol):
    """What a store uses of a planned step."""

    key: str

    @property
    def all_inputs(self) -> Iterable[str]: ...


class Store:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Opens an existing store; refuses one written by a newer mambabench."""
        store = cls(Path(path))
        with disk_errors(store.path, "read"):
            if not store.run_file.is_file():
                raise MambabenchError(f"{store.path}: not a store of results (it has no run.json)")
        store.run()
        return store

    @classmethod
    def create(cls, path: Path | str) -> Store:
        """Opens the store at `path`, making it if there is none. Several processes may do so at once."""
        store = cls(Path(path))
        with disk_errors(store.path):
            if store.path.exists() and not store.path.is_dir():
                raise MambabenchError(f"{store.path}: a file, where the folder of a store would be right")
            store.path.mkdir(parents=True, exist_ok=True)
            # Listed before run.json is looked for: what another process makes meanwhile comes with a run.json.
            others = [entry.name for entry in store.path.iterdir() if not _left_by_creation(entry.name)]
            if others and not store.run_file.exists():
                raise MambabenchError(f"{store.path}: neither empty nor a store of results (it has no run.json)")
            if store.run_file.exists():
                return cls.open(path)
        with store.holding_run():
            if not store.run_file.exists():
                store.write_run({})
        return cls.open(path)

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    def run(self) -> dict[str, Any]:
        """What run.json says; refuses a schema that this version does not know."""
        run = read_json(self.run_file)
        schema = run.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise MambabenchError(f"{self.run_file}: schema = {schema!r}, where a whole number from 1 would be right")
        if schema > SCHEMA:
            raise MambabenchError(
                f"{self.run_file}: written in schema {schema}, this mambabench reads up to {SCHEMA}; "
                "update mambabench, or choose another folder with --store"
            )
        return run

    def write_run(self, run: Mapping[str, Any]) -> None:
        write_json(self.run_file, {"schema": SCHEMA, **run})

    @contextmanager
    def holding_run(self) -> Iterator[None]:
        """Keeps other processes from writing run.json between a look at it and the next `write_run`."""
        held = Lock.take(self.path / LOCKS / "run", wait=True)
        assert held is not None
        try:
            yield
        finally:
            held.release()

    @property
    def cache(self) -> Path:
        """What steps keep for each other; nothing of it is a result."""
        return self.path / "cache"

    def finished(self, key: str) -> Path:
        """The folder of a step that ended well."""
        return self.path / "steps" / key

    def partial(self, key: str) -> Path:
        """The folder of a step that runs, or that ended in any state but ok."""
        return self.path / "partial" / key

    def artifact(self, key: str) -> Path:
        """What a finished step made."""
        return self.finished(key) / "artifact"

    def folder(self, key: str) -> Path:
        """Wherever the step's files are now."""
        return self.finished(key) if self.finished(key).is_dir() else self.partial(key)

    def records(self, key: str, name: str) -> Path | None:
        """A file of a finished step's records, if it has it. Raises MambabenchError where its bytes have changed."""
        file = self.finished(key) / name
        if not file.is_file():
            return None
        told = read_json(file.with_name("outcome.json")).get("sha256", {}).get(name)
        with disk_errors(file, "read"):
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        if told not in (None, found):
            raise MambabenchError(f"{file}: damaged; delete the folder {file.parent}, and `run --retry` does it again")
        return file

    def keys(self) -> tuple[str, ...]:
        """Every step that ended well."""
        folder = self.path / "steps"
        found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        return tuple(key for key in found if self.state(key) == "ok")

    def step(self, key: str) -> dict[str, Any]:
        """What was asked of a step (step.json)."""
        return read_json(self.folder(key) / "step.json")

    def state(self, key: str) -> str:
        return self.status(key).state

    def outcome(self, key: str, *, artifacts: bool = True) -> Mapping[str, Any] | None:
        """How the last attempt ended (outcome.json), or None where none did or what it left is not whole."""
        return self.status(key, artifacts=artifacts).record

    def status(self, key: str, *, artifacts: bool = True) -> Status:
        """Where a step stands, with the reason; a damaged step counts as interrupted, never as done.

        Without `artifacts` only its records must be whole: they are read after models and data were deleted as well.
        """
        folder = self.folder(key)
        whole = folder == self.finished(key)
        if not whole and not (folder / "outcome.json").exists():
            if folder.is_dir() and Lock.is_held(self.child_lock(key)):
                return Status("running")
            if (folder / "events.jsonl").exists():
                return Status("interrupted", "the run was stopped in the middle of this step")
            return Status("absent")
        try:
            record = read_json(folder / "outcome.json")
            outcome = outcome_of(record, folder / "outcome.json")
        except MambabenchError as error:
            return Status("interrupted", str(error))
        if whole:
            damage = (
                damaged(folder, record, artifacts) if outcome.state == "ok" else f"{folder}: in state {outcome.state}"
            )
            return Status("interrupted", damage) if damage else Status("ok", "", record)
        if outcome.state == "ok":
            return Status("interrupted", f"{folder}: ended well, but was stopped before it was moved to steps/")
        return Status(outcome.state, outcome.reason, record)

    def done(self, steps: Sequence[Linked]) -> dict[str, Status]:
        """Those of the steps, given inputs first, that need not run again. One whose artifact was deleted, or left
        behind when the store was copied, need not if what the artifact was made for has run."""
        found: dict[str, Status] = {}
        used: set[str] = set()
        inputs = {key for step in steps for key in step.all_inputs}
        for step in reversed(steps):
            status = self.status(step.key, artifacts=step.key in used or step.key not in inputs)
            if status.state == "ok":
                found[step.key] = status
            else:
                used |= set(step.all_inputs)
        return found

    def claim(self, key: str) -> Lock | None:
        """Takes the right to run a step, or returns None while another run of this store has it or its child lives."""
        claim = Lock.take(self.path / LOCKS / key)
        if claim is None:
            return None
        if Lock.is_held(self.child_lock(key)):
            claim.release()
            return None
        return claim

    def child_lock(self, key: str) -> Path:
        """What a step's child holds as long as it lives, so that no second child works in the same folder."""
        return self.path / LOCKS / f"{key}.child"

    def prepare(self, key: str, step: Mapping[str, Any]) -> Path:
        """Makes the folder in which a step runs and writes step.json; scratch/ of an earlier attempt stays."""
        partial = self.partial(key)
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / "step.json", step)
        return partial

    def begin(self, key: str) -> None:
        """Clears what earlier attempts left, except scratch/, the events and the log. Called by the child."""
        partial = self.partial(key)
        self._look_anew(key)
        with disk_errors(partial):
            (partial / "outcome.json").unlink(missing_ok=True)
            if self.finished(key).is_dir():
                shutil.rmtree(self.finished(key))
            for name in ("samples", "timings", "rounds", "losses"):
                (partial / f"{name}.parquet").unlink(missing_ok=True)
            if (partial / "artifact").exists():
                shutil.rmtree(partial / "artifact")
            (partial / "artifact").mkdir()
            (partial / "scratch").mkdir(exist_ok=True)

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Writes the outcome of an attempt that did not end well."""
        write_json(self.partial(key) / "outcome.json", record)

    def forget(self, key: str) -> None:
        """Drops the outcome of an attempt that says nothing of the next; what it left otherwise stays."""
        partial = self.partial(key)
        with disk_errors(partial):
            (partial / "outcome.json").unlink(missing_ok=True)

    def finish(self, key: str, record: Mapping[str, Any]) -> None:
        """Makes a step whole: everything on disk, the outcome with its list of files, then one rename."""
        partial, finished = self.partial(key), self.finished(key)
        artifact = partial / "artifact"
        with disk_errors(partial):
            if artifact.is_dir() and not any(artifact.iterdir()):
                artifact.rmdir()
            files = sync_tree(partial, leave_out="scratch")
            finished.parent.mkdir(parents=True, exist_ok=True)
            records = [*partial.glob("events.jsonl"), *partial.glob("*.parquet")]
            hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in records}
        write_json(partial / "outcome.json", {**record, "files": files, "sha256": hashes})
        self._move(key)

    def complete(self, key: str) -> bool:
        """Moves a step into place that ended well and was stopped before the rename. For who holds its claim. Returns
        whether it is whole now."""
        partial = self.partial(key)
        self._look_anew(key)
        if not (partial / "outcome.json").is_file():
            return self.state(key) == "ok"
        try:
            record = read_json(partial / "outcome.json")
        except MambabenchError:
            return False
        if record.get("state") != "ok" or damaged(partial, record):
            return False
        self._move(key)
        return True

    def _look_anew(self, key: str) -> None:
        """Has a network file system ask what other machines did: it may go by what it knew of a folder for a minute,
        unless the folder is opened."""
        for folder in (self.finished(key).parent, self.partial(key).parent, self.partial(key)):
            with disk_errors(folder, "read"), suppress(FileNotFoundError):
                os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))

    def _move(self, key: str) -> None:
        partial, finished = self.partial(key), self.finished(key)
        # Not before the outcome is on disk: until then it is what a killed step goes on from.
        shutil.rmtree(partial / "scratch", ignore_errors=True)
        with disk_errors(finished):
            os.rename(partial, finished)
            sync_folder(finished.parent)
            sync_folder(partial.parent)


def inputs_of(step: Mapping[str, Any]) -> frozenset[str]:
    """Keys of all steps that must be done before one, of its step.json."""
    named = [*step.get("data", {}).values(), *step.get("models", {}).values()]
    return frozenset(step.get("inputs", {}).values()) | {entry["step"] for entry in named if "step" in entry}


def outcome_of(record: Mapping[str, Any], source: Path) -> Outcome:
    """Reads the fields of `Outcome` out of an outcome.json."""
    state = record.get("state")
    if state not in STATES:
        raise MambabenchError(f"{source}: state = {state!r} is none of {', '.join(STATES)}")
    try:
        return Outcome(
            state=state,
            reason=str(record.get("reason", "")),
            attempt=int(record.get("attempt", 1)),
            wall_s=float(record.get("wall_s", 0.0)),
            detail={**record.get("detail", {}), "facts": record.get("facts", [])},
        )
    except (TypeError, ValueError) as error:
        raise MambabenchError(f"{source}: not an outcome ({error})") from error


def damaged(folder: Path, record: Mapping[str, Any], artifacts: bool = True) -> str:
    """Why a finished step's files, or those beside its artifact, are not what its outcome lists; empty if they are."""
    files = record.get("files")
    if not isinstance(files, Mapping):
        return f"{folder / 'outcome.json'}: lists no files"
    for name, size in files.items():
        if not artifacts and name.startswith("artifact/"):
            continue
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{folder / name}: missing"
        if found != size:
            return f"{folder / name}: {found} bytes, where {size} were written"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, or raises one line that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise MambabenchError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise MambabenchError(f"{path}: not whole JSON ({error})") from error
    if not isinstance(value, dict):
        raise MambabenchError(f"{path}: holds a {type(value).__name__}, where an object would be right")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same of any text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{TEMPORARY}")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _left_by_creation(name: str) -> bool:
    """Whether a file may stand in a folder that is to become a store: what `Store.create` leaves if it is killed."""
    return name == LOCKS or (name.startswith(".run.json.") and name.endswith(TEMPORARY))


def sync_tree(folder: Path, leave_out: str) -> dict[str, int]:
    """Writes all below `folder` but `leave_out` out to disk; returns the sizes of those that an outcome vouches for."""
    files: dict[str, int] = {}
    for root, folders, names in os.walk(folder):
        if Path(root) == folder and leave_out in folders:
            folders.remove(leave_out)
        for name in sorted(names):
            path = Path(root, name)
            if path.is_symlink():
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                relative = path.relative_to(folder).as_posix()
                if relative not in UNLISTED:
                    files[relative] = os.fstat(file.fileno()).st_size
        sync_folder(Path(root))
    return files


class disk_errors:  # noqa: N801  (used like a function)
    """Turns errors of files and disks into one line."""

    FULL = (errno.ENOSPC, errno.EDQUOT)
    ADVICE = "the disk is full; free some space and run again with --retry"

    def __init__(self, path: Path, what: str = "written") -> None:
        self.path, self.what = path, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in self.FULL
            advice = self.ADVICE if full else error.strerror or error
            raise MambabenchError(f"{self.path}: cannot be {self.what}, {advice}") from error
