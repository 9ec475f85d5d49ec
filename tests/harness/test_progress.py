"""A terminal gets live bars, a log gets plain lines, and progress is read without rereading."""

import io
import json
from pathlib import Path

from mambabench.harness.interfaces import Outcome
from mambabench.harness.progress import Bars, Lines, Tail, progress_for
from rich.console import Console


def test_a_file_gets_lines_only() -> None:
    out = io.StringIO()
    progress = progress_for(out)
    assert isinstance(progress, Lines)
    progress.begin(total=3, done=1)
    progress.started("k", "half/align@seed0", attempt=2)
    progress.moved("k", 1, 10, "tokens")
    progress.finished("k", "half/align@seed0", Outcome(state="ok", wall_s=1.25), final=True)
    progress.close()
    assert out.getvalue() == "[1/3] start half/align@seed0 (attempt 2)\n[2/3] ok half/align@seed0 in 1.2 s\n"


def test_bars_show_what_runs_and_print_what_ended() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bars = Bars(console)
    bars.begin(total=2, done=0)
    bars.started("k", "half/align@seed0", attempt=1)
    bars.moved("k", 30, 100, "tokens")
    bars.tick()
    assert "30/100" in console.file.getvalue()
    bars.finished("k", "half/align@seed0", Outcome(state="error", wall_s=2.0, reason="[red] is text"), final=True)
    bars.note("a note")
    bars.close()
    assert "error half/align@seed0 in 2.0 s: [red] is text" in console.file.getvalue()
    assert "1/2" in console.file.getvalue()


def test_a_tail_gives_the_newest_whole_record_once(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    tail = Tail(events)
    assert tail.latest() is None

    def line(done: int) -> str:
        record = {"kind": "progress", "t": 0.1, "done": done, "total": 9, "unit": "blocks"}
        return json.dumps(record, separators=(",", ":")) + "\n"

    events.write_text(line(1) + line(2) + '{"kind":"loss","t":1}\n' + line(3)[:30])
    assert tail.latest() == (2, 9, "blocks")
    assert tail.latest() is None
    with open(events, "a") as file:
        file.write(line(3)[30:])
    assert tail.latest() == (3, 9, "blocks")


def test_a_damaged_record_stops_no_progress(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    whole = b'{"kind":"progress","t":1.0,"done":3,"total":9,"unit":"tokens"}\n'
    for damaged in (b'{"kind":"progress","t":1.0,"do{"kind":"fact"}\n', b'{"kind":"progress","t":1.0}\n'):
        file.write_bytes(whole + damaged)
        assert Tail(file).latest() == (3, 9, "tokens")
    assert Tail(tmp_path).latest() is None
