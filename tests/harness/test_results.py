"""Frames of stores: each record once, each failure a state, each store told apart."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from mambabench import MambabenchError
from mambabench.harness.results import FRAMES, WHO, Results
from mambabench.harness.store import Store


@pytest.fixture
def builder(stores, tmp_path):
    made = stores.Builder(tmp_path / "store", seeds=(0, 1))
    made.model("teacher", teacher=True)
    made.model("half", keep=0.5)
    return made


def test_a_step_that_serves_two_seeds_is_counted_once(stores, builder):
    rows = stores.samples(np.random.default_rng(0), items=10)
    for seed in (0, 1):
        builder.step(f"half/-/tasks@seed{seed}", records={"sample": rows}, key="shared")
    results = Results.read([builder.write()])
    assert list(results.cells["label"]) == ["half/-/tasks@seed0", "half/-/tasks@seed1"]
    assert len(results.samples) == 10
    assert set(results.samples["label"]) == {"half/-/tasks@seed0"}


def test_a_step_that_serves_two_models_belongs_to_both(stores, builder):
    rows = stores.samples(np.random.default_rng(0), items=10)
    for model in ("teacher", "half"):
        builder.step(f"{model}/-/tasks@seed0", records={"sample": rows}, key="shared")
    samples = Results.read([builder.write()]).samples
    assert samples.groupby("model").size().to_dict() == {"teacher": 10, "half": 10}


def test_a_file_of_records_whose_bytes_changed_is_named_in_one_line(stores, builder):
    builder.step("half/a@seed0", "train", {"loss": [{"step": step, "tokens": 10, "loss": 2.0} for step in range(50)]})
    store = builder.write()
    (file,) = store.glob("steps/*/losses.parquet")
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(MambabenchError, match=r"losses\.parquet: damaged; delete the folder") as e:
            Results.read([store]).losses  # noqa: B018
        assert "\n" not in str(e.value)


def test_what_did_not_end_well_is_a_state_with_a_reason_and_has_no_records(stores, builder):
    builder.step("half/-/tasks@seed0", state="timeout", reason="longer than 180 s")
    builder.skip("half/lookup/speed@seed0", "too slow here")
    builder.write()
    (builder.path / "run.json").write_text(
        (builder.path / "run.json").read_text().replace('"cells": [', '"cells": [' + NEVER_RUN)
    )
    results = Results.read([builder.path])
    states = results.cells.set_index("label")[["state", "reason"]].to_dict("index")
    assert states == {
        "half/-/late@seed0": {"state": "not run", "reason": ""},
        "half/-/tasks@seed0": {"state": "timeout", "reason": "longer than 180 s"},
        "half/lookup/speed@seed0": {"state": "skipped", "reason": "too slow here"},
    }
    assert results.samples.empty


NEVER_RUN = (
    json.dumps(
        {
            "label": "half/-/late@seed0",
            "key": "none",
            "kind": "measure",
            "model": "half",
            "decoder": "",
            "suite": "late",
            "stage": "",
            "seed": 0,
            "why": "",
        }
    )
    + ","
)


def test_a_damaged_step_has_no_records(stores, builder):
    key = builder.step("half/-/tasks@seed0", records={"sample": stores.samples(np.random.default_rng(0), items=5)})
    store = builder.write()
    with (store / "steps" / key / "samples.parquet").open("ab") as file:
        file.write(b"x")
    results = Results.read([store])
    assert list(results.cells["state"]) == ["interrupted"]
    assert results.samples.empty


def test_records_are_read_after_the_artifact_was_deleted_and_a_run_would_make_it_anew(builder):
    facts = [{"name": "training_tokens", "value": 64, "unit": "tokens"}]
    key = builder.step("half/align@seed0", kind="train", facts=facts, artifact="weights")
    store = builder.write()
    shutil.rmtree(store / "steps" / key / "artifact")
    results = Results.read([store])
    assert list(results.cells["state"]) == ["ok"]
    assert list(results.facts["value"]) == [64]
    assert Store.open(store).state(key) == "interrupted"


def test_frames_without_records_still_have_their_columns(builder):
    results = Results.read([builder.write()])
    for name, columns in FRAMES.items():
        assert list(getattr(results, name).columns) == [*WHO, *columns]
    assert list(results.facts.columns)[-4:] == ["name", "value", "unit", "arm"]


def test_files_whose_columns_differ_are_read_as_one(stores, builder):
    builder.step("half/a@seed0", "train", {"loss": [{"step": 0, "tokens": 10, "loss": 2.0, "kl": 0.5}]})
    builder.step("half/b@seed0", "train", {"loss": [{"step": 0, "tokens": 10, "loss": 3.0}]})
    losses = Results.read([builder.write()]).losses
    assert list(losses["loss"]) == [2.0, 3.0]
    assert losses["kl"].isna().tolist() == [False, True]
    assert list(losses["stage"]) == ["a", "b"]


def test_facts_keep_the_kind_of_their_value(builder):
    facts = [{"name": "tokens", "value": 300, "unit": "tokens"}, {"name": "kernel", "value": "reference"}]
    builder.step("half/align@seed0", "train", facts=facts)
    told = Results.read([builder.write()]).facts
    assert list(told["value"]) == [300, "reference"]
    assert set(told["kind"]) == {"train"}


def test_overhead_is_what_lies_before_the_first_record_and_after_the_last(builder):
    builder.step("half/align@seed0", "train", wall=3.0)
    (overhead,) = Results.read([builder.write()]).cells["overhead_s"]
    assert overhead == pytest.approx(0.75)


def test_operations_that_no_fused_kernel_ran_are_told_with_the_reasons(builder):
    kernels = {
        "conv": {"fused": True, "reasons": ["the kernel has no window in front of packed documents"]},
        "scan": {"fused": False, "reasons": ["mamba-ssm is not installed", "there are no tokens"]},
        "swiglu": {"fused": False, "reasons": ["triton is not installed"]},
    }
    builder.step("half/align@seed0", "train", device="cuda:0", kernels=kernels)
    builder.step("half/tune@seed0", "train")
    assert list(Results.read([builder.write()]).cells["unfused"]) == [
        "scan (mamba-ssm is not installed; there are no tokens), swiglu (triton is not installed)",
        "",
    ]


def test_models_of_several_stores_are_named_by_store(stores, tmp_path):
    paths = []
    for name in ("one", "two"):
        builder = stores.Builder(tmp_path / name)
        builder.environment["torch"] = name
        builder.model("teacher", teacher=True)
        builder.step("teacher/-/tasks@seed0", records={"sample": stores.samples(np.random.default_rng(0), items=4)})
        paths.append(builder.write())
    results = Results.read(paths)
    assert results.teachers == ["one:teacher", "two:teacher"]
    assert results.samples.groupby("model").size().to_dict() == {"one:teacher": 4, "two:teacher": 4}
    assert results.environment["torch"] == "one | two"
    assert results.environment["cpu"] == "a CPU"
    with pytest.raises(MambabenchError, match="given twice"):
        Results.read([paths[0], paths[0]])


def test_a_folder_that_is_no_store_and_a_newer_schema_are_refused(tmp_path, builder):
    with pytest.raises(MambabenchError, match="not a store"):
        Results.read([tmp_path])
    store = builder.write()
    run = json.loads((store / "run.json").read_text())
    (store / "run.json").write_text(json.dumps({**run, "schema": 99}))
    with pytest.raises(MambabenchError, match="schema 99"):
        Results.read([store])


def test_reading_is_independent_of_the_order_of_cells(stores, builder):
    for model in ("teacher", "half"):
        builder.step(f"{model}/-/tasks@seed0", records={"sample": stores.samples(np.random.default_rng(0), items=4)})
    first = Results.read([builder.write()]).samples
    builder.cells.reverse()
    second = Results.read([builder.write()]).samples
    by = ["model", "item"]
    pd.testing.assert_frame_equal(
        first.sort_values(by, ignore_index=True), second.sort_values(by, ignore_index=True), check_like=True
    )
