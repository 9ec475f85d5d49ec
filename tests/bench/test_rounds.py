"""What the script that takes rounds apart sets beside each other, at a tiny size."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from mambabench.backends.stepper import HybridStepper


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bench_rounds.py"))))


@pytest.fixture(scope="module")
def model(bench: SimpleNamespace) -> HybridStepper:
    return bench.build(bench.TINY | {"mixers": ["mamba2", "attention"]}, "cpu")


def test_products_alone_are_those_of_every_weight_but_the_embedding(
    bench: SimpleNamespace, model: HybridStepper
) -> None:
    found = {weight.untyped_storage().data_ptr() for weight in bench.weights_of(model)}
    named = model.model.named_parameters()
    wanted = {p.untyped_storage().data_ptr() for name, p in named if p.dim() == 2 and "embed_tokens" not in name}
    assert found == wanted
    assert bench.products(model, 3) > 0


def test_every_way_of_taking_tokens_back_does_the_same_and_stands_beside_a_plain_step(
    bench: SimpleNamespace, model: HybridStepper, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench.compare_rollbacks(model, "tiny", 2, 8, 2, 2)
    assert [row["rollback"] for row in rows] == ["plain step", "replay", "snapshots", "re-decoding"]
    held = {row["rollback"]: row["state bytes"] for row in rows}
    assert held["plain step"] < held["replay"] < held["snapshots"]
    assert held["re-decoding"] == 2 * held["plain step"]
    assert all(row["off"] < 0.05 for row in rows[1:])
    assert all(row["seconds"] > 0 and min(row["products"].values()) > 0 for row in rows)
    assert "products alone" in capsys.readouterr().out
