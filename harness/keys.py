"""What decides whether a step is done already: hashes of configs, data and code.

Fingerprints of files are cached by path, size and time of change in the user's cache directory, so that planning stays
fast next to large models.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .interfaces import MambabenchError

PACKAGE = __package__.rpartition(".")[0]


def digest(value: Any) -> str:
    """A hash of JSON data, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Fingerprints:
    """Hashes of files and of code, remembered between processes."""

    def __init__(self, cache: Path | None = None) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = cache or base / "mambabench" / "fingerprints.json"
        self._known: dict[str, str] = self._load()
        self._changed = False

    def path(self, path: Path) -> str:
        """A file's content, or a folder's files with their names (hidden ones left out)."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
            return digest(
                [[file.relative_to(path).as_posix(), self._cached(file, "sha256", _sha256)] for file in files]
            )
        if not path.is_file():
            raise MambabenchError(f"{path}: no such file")
        return self._cached(path, "sha256", _sha256)

    def code(self, modules: Iterable[str]) -> str:
        """The code of the rooms (or, outside of this package, the packages) of modules, without docstrings."""
        roots = sorted({_room(module) for module in modules})
        return digest([self._tree(root) for root in roots])

    def save(self) -> None:
        """Writes what was learnt; a cache that cannot be written costs time, not results."""
        if not self._changed:
            return
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.cache.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self._known))
            temporary.replace(self.cache)
        except OSError:
            return
        self._changed = False

    def _tree(self, root: Path) -> list[list[str]]:
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        base = root.parent
        return [[file.relative_to(base).as_posix(), self._cached(file, "code", _code)] for file in files]

    def _cached(self, file: Path, how: str, make: Any) -> str:
        stat = file.stat()
        key = f"{how}:{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = make(file)
            self._changed = True
        return self._known[key]

    def _load(self) -> dict[str, str]:
        try:
            known = json.loads(self.cache.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _code(file: Path) -> str:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _room(module: str) -> Path:
    """Whose code decides what a module does: our room (of harness/, the part), or the whole of another package."""
    top = module.partition(".")[0]
    if module.startswith(f"{PACKAGE}."):
        root = Path(__file__).resolve().parent.parent
        room, _, rest = module.removeprefix(f"{PACKAGE}.").partition(".")
        if room != "harness":
            return root / room
        inner = root / room / rest.partition(".")[0]
        return inner if inner.is_dir() else inner.with_suffix(".py")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise MambabenchError(f"the code of {module} cannot be found")
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin
