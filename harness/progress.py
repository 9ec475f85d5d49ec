"""What a run shows while it runs: live bars on a terminal, one plain line per start and end elsewhere."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from .interfaces import Outcome


class Progress(Protocol):
    """What the runner tells."""

    live: bool
    """Whether it wants `moved` and redraws itself in `tick`."""

    def begin(self, total: int, done: int) -> None: ...

    def started(self, key: str, label: str, attempt: int) -> None: ...

    def moved(self, key: str, done: float, total: float, unit: str) -> None: ...

    def finished(self, key: str, label: str, outcome: Outcome, final: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def tick(self) -> None: ...

    def close(self) -> None: ...


class Lines:
    """Plain lines, for logs and CI."""

    live = False

    def __init__(self, out: IO[str] | None = None) -> None:
        self.out = out or sys.stderr
        self.total = self.done = 0

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def started(self, key: str, label: str, attempt: int) -> None:
        self._line(f"start {label}" + (f" (attempt {attempt})" if attempt > 1 else ""))

    def moved(self, key: str, done: float, total: float, unit: str) -> None:
        """Says nothing: a log wants starts and ends."""

    def finished(self, key: str, label: str, outcome: Outcome, final: bool) -> None:
        self.done += final
        self._line(describe(label, outcome))

    def note(self, text: str) -> None:
        self._line(text)

    def tick(self) -> None:
        """Says nothing."""

    def close(self) -> None:
        self.out.flush()

    def _line(self, text: str) -> None:
        print(f"[{self.done}/{self.total}] {text}", file=self.out, flush=True)


class Bars:
    """Live bars: all steps, and each running one with its own count."""

    live = True

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Live

        self.console = console or Console(stderr=True)
        self.bars = Live(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            auto_refresh=False,
        )
        self.tasks: dict[str, Any] = {}

    def begin(self, total: int, done: int) -> None:
        self.bars.start()
        self.all = self.bars.add_task("steps", total=total, completed=done, unit="")
        self.bars.refresh()

    def started(self, key: str, label: str, attempt: int) -> None:
        text = label + (f" (attempt {attempt})" if attempt > 1 else "")
        self.tasks[key] = self.bars.add_task(f"  {text}", total=None, unit="")
        self.bars.refresh()

    def moved(self, key: str, done: float, total: float, unit: str) -> None:
        self.bars.update(self.tasks[key], completed=int(done), total=int(total) or None, unit=unit)

    def finished(self, key: str, label: str, outcome: Outcome, final: bool) -> None:
        if key in self.tasks:
            self.bars.remove_task(self.tasks.pop(key))
        if final:
            self.bars.advance(self.all)
        style = "green" if outcome.state == "ok" else "yellow" if outcome.state == "unsupported" else "red"
        self.console.print(describe(label, outcome), style=style, markup=False, highlight=False)
        self.bars.refresh()

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def tick(self) -> None:
        self.bars.refresh()

    def close(self) -> None:
        self.bars.stop()


class Silent:
    """Shows nothing."""

    live = False

    def begin(self, total: int, done: int) -> None: ...

    def started(self, key: str, label: str, attempt: int) -> None: ...

    def moved(self, key: str, done: float, total: float, unit: str) -> None: ...

    def finished(self, key: str, label: str, outcome: Outcome, final: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def tick(self) -> None: ...

    def close(self) -> None: ...


def progress_for(out: IO[str]) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if out.isatty() else Lines(out)


def describe(label: str, outcome: Outcome) -> str:
    """One line about how a step ended."""
    took = f" in {outcome.wall_s:.1f} s" if outcome.wall_s else ""
    return f"{outcome.state} {label}{took}" + (f": {outcome.reason}" if outcome.reason else "")


class Tail:
    """Follows the progress records of a running step, reading only what is new."""

    def __init__(self, events: Path) -> None:
        self.events, self.offset = events, 0

    def latest(self) -> tuple[float, float, str] | None:
        """(done, total, unit) of the newest progress record since the last call, if there is one."""
        try:
            with open(self.events, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return None
        whole, newline, _ = data.rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        for line in reversed(whole.split(b"\n")):
            if line.startswith(b'{"kind":"progress"'):
                # What is damaged is for the step to tell, not for who watches it.
                with suppress(ValueError, KeyError):
                    event = json.loads(line)
                    return event["done"], event["total"], str(event.get("unit", ""))
        return None
