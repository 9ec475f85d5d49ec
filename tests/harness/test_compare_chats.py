"""Comparing what was judged: the answers may be recorded ones, or none that this machine can have."""

import numpy as np
import pytest
from mambabench.harness.compare import compare
from mambabench.harness.results import Results


def run(base, head):
    return compare(Results.read([base]), Results.read([head]))


@pytest.mark.parametrize(("state", "expected"), [("unsupported", []), ("crashed", ["not comparable"])])
def test_what_waits_for_steps_that_cannot_run_here_was_not_meant_to_be_compared(stores, tmp_path, state, expected):
    builder = stores.Builder(tmp_path / "store")
    builder.model("half", keep=0.5)
    asked = builder.step("half/plain/chat/answer@seed0", "answer", state=state, reason="there is no file")
    builder.step("half/plain/chat@seed0", "judge", subject=asked, state="blocked", reason=f"which is {state}")
    builder.skip("half/plain/talk@seed0", "too long")
    store = builder.write()
    assert [comparison.verdict for comparison in run(store, store)] == expected


def test_recorded_answers_are_compared_item_by_item_whatever_was_trained_since(stores, tmp_path):
    made, recorded = [], {"answers": {"file": "/somewhere/answers.jsonl", "fingerprint": "f1"}}
    for name, right in (("base", 0.8), ("head", 0.4)):
        builder = stores.Builder(tmp_path / name, began=1e6 if name == "base" else 2e6)
        builder.model("half", keep=0.5)
        rows = stores.samples(np.random.default_rng(0), items=400, chance=right)
        builder.step("half/plain/chat@seed0", "judge", {"sample": rows}, subject=None, data=recorded)
        made.append(builder.write())
    assert [each.verdict for each in run(made[0], made[0])] == ["pass"]
    (acc,) = run(*made)
    assert (acc.verdict, acc.reason) == ("fail", "400 items")
