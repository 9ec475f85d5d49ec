"""Replies on disk, by a hash of what was asked: whatever was answered once is not asked again.

One file for each reply, written whole and then renamed: a `kill -9` leaves a reply or none. Locks keep processes that
share a folder from asking the same at once. The folder is a recording as it is; so are the `judgment` records in a
step's `events.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..interfaces import MambabenchError
from ..keys import digest
from ..locks import Lock
from ..store import disk_errors, write_json
from . import Reply, Request

SCHEMA = 1


def question(request: Request, model: str, options: Mapping[str, Any], again: int = 0) -> dict[str, Any]:
    """All that decides a reply: the body of the request to the endpoint, which draw it is, and how often the same was
    asked before because of malformed replies. In `options`, None takes a parameter out of the body."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": role, "content": _valid(content)} for role, content in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    body = {name: value for name, value in {**body, **options}.items() if value is not None}
    return {"body": body, "draw": request.draw, "again": again}


class Kept:
    """A folder of replies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, asked: Mapping[str, Any]) -> Path:
        key = digest(asked)
        return self.folder / key[:2] / f"{key}.json"

    def find(self, asked: Mapping[str, Any]) -> Reply | None:
        """The reply to a question. A file that is damaged or holds another question counts as none."""
        path = self.path(asked)
        try:
            record = json.loads(path.read_bytes())
            return reply_of(record["reply"]) if record["question"] == asked else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MambabenchError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError):
            return None

    def keep(self, asked: Mapping[str, Any], reply: Reply) -> None:
        """Writes a reply; it is on disk when this returns."""
        path = self.path(asked)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, "question": asked, "reply": asdict(reply)})

    def lock(self, asked: Mapping[str, Any]) -> Lock:
        """Waits until nobody else, thread or process, asks the same."""
        path = self.path(asked)
        lock = Lock.take(path.with_name(f".{path.stem}.lock"), wait=True)
        assert lock is not None
        return lock


def reply_of(record: Any) -> Reply:
    """A reply as it was kept. Raises ValueError, KeyError or TypeError for anything else."""
    if not isinstance(record["text"], str):
        raise ValueError("a reply without a text")
    return Reply(**{**record, "top_logprobs": tuple(record.get("top_logprobs", ()))})


def recorded(path: Path) -> Iterator[tuple[dict[str, Any], Reply]]:
    """The questions and replies of a recording: a folder of replies, or a `.jsonl` file with `judgment` records, such
    as a step's `events.jsonl`. Raises `MambabenchError` for a record that is damaged."""
    if path.is_dir():
        for file in sorted(path.glob("??/*.json")):
            with disk_errors(file, "read"):
                yield _pair(file.read_bytes(), str(file))
        return
    with disk_errors(path, "read"), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                raise MambabenchError(f"{where}: not JSON") from None
            if isinstance(record, dict) and record.get("kind") == "judgment":
                for one in record.get("replies", ()):
                    yield _pair(json.dumps(one).encode(), where)


def cleaned(texts: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], ...]:
    """Log-probabilities as JSON can hold them: infinite ones are left out."""
    return tuple({_valid(token): value for token, value in each.items() if math.isfinite(value)} for each in texts)


def _pair(text: bytes, where: str) -> tuple[dict[str, Any], Reply]:
    try:
        record = json.loads(text)
        return dict(record["question"]), reply_of(record["reply"])
    except (ValueError, KeyError, TypeError) as error:
        raise MambabenchError(f"{where}: not a judgment that was kept ({type(error).__name__}: {error})") from None


def _valid(text: str) -> str:
    """A text without halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
