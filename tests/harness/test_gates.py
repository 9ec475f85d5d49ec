"""Gates that a file declares: one that judges nothing is told."""

import numpy as np
from mambabench.harness.compare import compare
from mambabench.harness.gates import read_gates
from mambabench.harness.results import Results


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
