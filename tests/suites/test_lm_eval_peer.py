"""Our class and lm-eval's own HFLM, both handed to `simple_evaluate`, on real items: the same figures for each."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

ITEMS = 12
NAMES = ("arc_easy", "arc_easy_shots", "openbookqa", "piqa", "winogrande", "lambada", "lambada_generate")


@pytest.fixture(scope="module")
def both(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    if not (shared / "data" / "eval").is_dir():
        pytest.skip("the items of evaluations are not at hand")
    bench = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "bench" / "bench_lm_eval.py")))
    folder, model = tmp_path_factory.mktemp("tasks"), shared / "models" / "stories-260k"
    bench.write_tasks(shared / "data" / "eval", folder, NAMES, ITEMS)
    lm = bench.stepper_lm(model, "cpu", "float32", 8)
    peer = bench.HFLM(pretrained=str(model), batch_size=8, device="cpu", dtype="float32")
    own, others = (bench.measure(each, folder, NAMES)[0] for each in (lm, peer))
    return SimpleNamespace(own=own, peer=others, compare=bench.compare, lm=lm)


@pytest.mark.parametrize("name", NAMES)
def test_every_item_has_the_figures_of_lm_evals_own_class(both: SimpleNamespace, name: str) -> None:
    found = both.compare(both.own[name], both.peer[name], name)
    assert found["items"] == ITEMS
    assert found.get("largest difference", 0.0) < 1e-3
    assert found.get("other greedy", 0) == found.get("other texts", 0) == 0
    assert found["metrics"]
    for metric, (own, peer) in found["metrics"].items():
        assert own == pytest.approx(peer, rel=1e-5), metric


def test_examples_that_all_items_share_are_run_once_a_batch(both: SimpleNamespace) -> None:
    assert both.lm.model.saved > 500
