"""The table of rounds taken apart."""

import pytest
from mambabench.harness.results import Results
from mambabench.reports.options import NoOptions
from mambabench.reports.rounds import Rounds

PARTS = {"draft kernels": 1.0, "target kernels": 6.0, "picks and bookkeeping": 0.5, "between kernels": 2.0}


def facts(batch, scale, kernels=None, arm="subject", prompt=None):
    told = {**PARTS, "waiting for the host": 0.5, "whole": 10.0}
    at = f"batch {batch}" + (f", prompt {prompt}" if prompt else "")
    named = [{"name": f"round, {at}: {what}", "value": scale * ms / 1e3} for what, ms in told.items()]
    named.append({"name": f"round, {at}: not in draft or target, share", "value": 0.3})
    if kernels is not None:
        named.append({"name": f"round, {at}: kernels", "value": kernels})
    return [{**fact, "arm": arm} for fact in named]


def frame(stores, folder, **told):
    builder = stores.Builder(folder / "store", seeds=(0, 1))
    builder.model("half", 0.5)
    for label, given in told.items():
        decoder, seed = label.split("_")
        builder.step(f"half/{decoder}/speed@seed{seed}", facts=[{"name": "weights", "value": 1.0}, *given])
    return Rounds(NoOptions()).frame(Results.read([builder.write()]))


def test_shares_are_of_the_whole_round(stores, tmp_path):
    told = {"lookup_0": [*facts(1, 1.0, 400), *facts(12, 2.0, 410)], "lookup_1": facts(1, 3.0, 402)}
    table = frame(stores, tmp_path, **told, plain_0=facts(1, 0.5, 90))
    assert table[["decoder", "batch"]].values.tolist() == [["plain", 1], ["lookup", 1], ["lookup", 12]]
    assert table["round ms"].tolist() == pytest.approx([5, 20, 20])
    assert table["kernels"].tolist() == [90, 401, 410]
    for name, share in zip(("draft %", "target %", "picks %", "between %", "host %"), (10, 60, 5, 20, 5), strict=True):
        assert table[name].tolist() == pytest.approx([share] * 3)
    assert table["not draft or target %"].tolist() == pytest.approx([30] * 3)


def test_rounds_of_the_reference_are_the_first_decoder_s(stores, tmp_path):
    told = [[*facts(1, 1.0), *facts(1, scale, arm="reference")] for scale in (0.25, 0.75)]
    table = frame(stores, tmp_path, lookup_0=told[0], lookup_1=told[1])
    assert table[["decoder", "batch"]].values.tolist() == [["plain", 1], ["lookup", 1]]
    assert table["round ms"].tolist() == pytest.approx([5, 10])


def test_rounds_of_several_lengths_of_prompts_have_rows_of_their_own(stores, tmp_path):
    told = [*facts(1, 1.0, prompt=512), *facts(1, 2.0, prompt=2048), *facts(8, 3.0, prompt=512)]
    table = frame(stores, tmp_path, lookup_0=told, plain_0=facts(1, 0.5))
    assert table[["batch", "prompt"]].values.tolist() == [[1, None], [1, 512], [1, 2048], [8, 512]]
    assert table["round ms"].tolist() == pytest.approx([5, 10, 20, 30])


def test_rounds_of_several_temperatures_have_rows_of_their_own(stores, tmp_path):
    told = [
        {**fact, "name": fact["name"].replace("batch 1", f"batch 1, temperature {at}")}
        for at, scale in (("0", 1.0), ("0.8", 2.0))
        for fact in facts(1, scale)
    ]
    table = frame(stores, tmp_path, lookup_0=told)
    assert table["temperature"].tolist() == [0, 0.8]
    assert table["round ms"].tolist() == pytest.approx([10, 20])


def test_without_a_gpu_no_kernels_are_counted(stores, tmp_path):
    assert "kernels" not in frame(stores, tmp_path, plain_0=facts(1, 1.0))


def test_a_decoder_that_names_other_parts_has_no_row(stores, tmp_path):
    own = [{"name": "round, batch 1: my part", "value": 1.0, "arm": "subject"}]
    table = frame(stores, tmp_path, own_0=own, lookup_0=facts(1, 1.0))
    assert table["decoder"].tolist() == ["lookup"]


def test_where_nothing_was_taken_apart_there_is_no_table(stores, tmp_path):
    assert frame(stores, tmp_path, plain_0=[]) is None
