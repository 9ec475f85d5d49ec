"""Every hook, called by real commands from a plug-in file."""

import json
import re
from pathlib import Path

import pytest

from .conftest import LISTENER, Finished, Run

pytestmark = pytest.mark.slow


def test_mambabench_components_bring_what_a_plan_may_name(mambabench: Run) -> None:
    listing = mambabench("--plugin", LISTENER, "list", "decoder").stdout
    assert re.search(r"^decoder +refused-here +listener\.py", listing, re.MULTILINE)


def test_mambabench_refuse_makes_a_step_unsupported_with_its_reason(mambabench: Run, finished: Finished) -> None:
    lines = mambabench("show", finished.store).stdout.splitlines()
    refused = [line for line in lines if "/refused/" in line]
    assert refused
    for line in refused:
        assert re.search(r"unsupported +not on a machine with \d+ cores", line)


def test_mambabench_step_started_is_called_once_for_every_step_that_runs(finished: Finished) -> None:
    started = [note for note in finished.notes if note.startswith("started")]
    assert "started suite:distinct bigram/plain/variety@seed0" in started
    assert len(set(started)) == len(started)
    assert not [note for note in started if "/refused/" in note]


def test_an_exception_in_a_hook_is_recorded_and_stops_nothing(finished: Finished) -> None:
    assert re.search(r"listener.* mambabench_step_started\b.*RuntimeError: an exception in a hook", finished.run.stderr)
    ended = [note for note in finished.notes if note.startswith("finished") and "/refused/" not in note]
    assert all(note.endswith(" ok") for note in ended)


def test_mambabench_step_finished_is_told_the_outcome(finished: Finished) -> None:
    assert "finished suite:distinct bigram/plain/variety@seed0 ok" in finished.notes


def test_mambabench_environment_adds_facts_and_overwrites_none(finished: Finished) -> None:
    environment = json.loads((finished.store / "run.json").read_text())["environment"]
    assert environment["laboratory"] == "under the roof"
    assert re.fullmatch(r"3\.\d+\.\d+\S*", environment["python"])


def test_mambabench_verdict_can_only_be_stricter(mambabench: Run, finished: Finished, example: Path) -> None:
    plain = mambabench("compare", finished.store, finished.store, on=[example])
    judged = mambabench("--plugin", LISTENER, "compare", finished.store, finished.store, on=[example])
    assert plain.returncode != 10
    assert judged.returncode == 10
    assert "variety is never good enough" in judged.stdout
    assert "all is well" not in judged.stdout
