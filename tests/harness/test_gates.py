"""Gates that a file declares: one that judges nothing is told."""

import re
from pathlib import Path

import numpy as np
from mambabench.harness.compare import compare
from mambabench.harness.gates import read_gates
from mambabench.harness.results import Results

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"


def test_a_gate_that_fits_nothing_is_named(mambabench, stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    rows = stores.samples(np.random.default_rng(0), items=20)
    builder.step("teacher/-/tasks@seed0", records={"sample": rows}, artifact="weights")
    store, file = builder.write(), tmp_path / "gates.toml"
    file.write_text(
        '[[gate]]\nmetric = "acc"\nmargin = 0.5\n[[gate]]\nmetric = "accuracy"\nmargin = 0.0\n'
        '[[gate]]\nlabels = "teacher/*"\nignore = true\n'
    )
    gates = read_gates(file)
    assert compare(Results.read([store]), Results.read([store]), gates) == []
    assert gates.idle == [1]
    said = mambabench("compare", store, store, "--gates", file).stderr
    assert said.splitlines() == [f"mambabench: warning: {file}: gate.1 fits nothing that was compared"]


def test_the_documented_gates_say_what_is_documented(tmp_path):
    file = tmp_path / "gates.toml"
    file.write_text(re.search(r"```toml\n(\[default\].*?)```", DOCUMENT.read_text(), re.DOTALL)[1])
    gates = read_gates(file)
    assert gates.rule("half/-/tasks@seed0", "lookup/acc", "quality").margin == 0.02
    assert gates.rule("quarter/-/tasks@seed0", "lookup/acc", "quality").margin == 0.01
    assert gates.rule("half/lookup/speed@seed0", "tpot batch 1", "latency").noise == 0.05
    assert gates.rule("half/lookup/speed@seed0", "reference tpot batch 1", "latency").noise is None
    assert gates.rule("half/lookup/speed@seed0", "reference ttft batch 1", "latency").ignore
    assert gates.idle == []
