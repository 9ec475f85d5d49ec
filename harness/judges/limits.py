"""How fast an endpoint may be asked: so many requests and tokens a minute, shared by all processes that ask it.

Requests are spaced evenly, so that no minute has more than it may. Each takes its turn by moving two times on, the
next request's and the next token's, in a small file under a lock, and then waits for its turn; nobody polls.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path

from ..locks import Lock
from ..store import disk_errors


class Pace:
    """The turns at one endpoint. Limits of 0 are none; `file` holds the times, in seconds since 1970."""

    def __init__(
        self,
        file: Path,
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.file = file
        self._request_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._token_s = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock = clock

    def turn(self, tokens: int) -> float:
        """Takes a turn for a request of about `tokens` tokens; returns in how many seconds it is."""
        if not self._request_s and not self._token_s:
            return self.held()

        def take(times: dict[str, float], now: float) -> float:
            at = max(now, times["hold"], times["request"], times["token"])
            times["request"] = at + self._request_s
            times["token"] = at + tokens * self._token_s
            return at - now

        return self._change(take)

    def settle(self, expected: int, tokens: int) -> None:
        """Corrects a turn by the tokens that it took in truth."""

        def correct(times: dict[str, float], now: float) -> float:
            times["token"] += (tokens - expected) * self._token_s
            return 0.0

        if self._token_s:
            self._change(correct)

    def hold(self, seconds: float) -> None:
        """Lets nobody have a turn for so long, as the endpoint asked."""

        def stop(times: dict[str, float], now: float) -> float:
            times["hold"] = max(times["hold"], now + seconds)
            return 0.0

        self._change(stop)

    def held(self) -> float:
        """For how many seconds yet nobody may ask: for those who had their turn before the endpoint said so."""
        return max(self._read()["hold"] - self._clock(), 0.0)

    def _change(self, how: Callable[[dict[str, float], float], float]) -> float:
        lock = Lock.take(self.file.with_suffix(".lock"), wait=True)
        assert lock is not None
        try:
            times = self._read()
            result = how(times, self._clock())
            with disk_errors(self.file):
                unfinished = self.file.with_suffix(".new")
                unfinished.write_text(json.dumps(times))
                unfinished.replace(self.file)
        finally:
            lock.release()
        return result

    def _read(self) -> dict[str, float]:
        """The times; those of a file that is not there or damaged are long past."""
        times = {"hold": 0.0, "request": 0.0, "token": 0.0}
        try:
            return {name: float(json.loads(self.file.read_bytes())[name]) for name in times}
        except (OSError, ValueError, KeyError, TypeError):
            return times


def retry_after(headers: dict[str, str], now: float) -> float | None:
    """Seconds to wait, of an answer's headers (names in lower case); None where it does not say.

    >>> retry_after({"retry-after-ms": "1500", "retry-after": "9"}, now=0)
    1.5
    >>> retry_after({"retry-after": "2"}, now=0)
    2.0
    >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=20)
    40.0
    >>> retry_after({"retry-after": "soon"}, now=0)
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if not math.isnan(seconds):
            return max(seconds, 0.0)
    date = parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(float(mktime_tz(date)) - now, 0.0)
