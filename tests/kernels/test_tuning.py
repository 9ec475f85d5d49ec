"""The forms of a tuned kernel are compiled at the same time, and all of them are still tried."""

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from mambabench.kernels.tuning import compile_side_by_side, graph_ms, side_by_side

triton = pytest.importorskip("triton")
FORMS = 3


class Kernel:
    """Compiles, as Triton's own do, by the mode that is on; no compilation ends before all have begun."""

    def __init__(self) -> None:
        self.together = threading.Barrier(FORMS)
        self.asked: list[dict[str, Any]] = []

    def run(self, *given: Any, **named: Any) -> None:
        from triton.runtime._async_compile import active_mode

        self.asked.append({"given": given, **named})
        active_mode.get().submit(len(self.asked), self.compile, lambda kernel: None)

    def compile(self) -> str:
        self.together.wait(timeout=5)
        return "compiled"


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Any:
    @triton.jit
    def kernel(x, SIZE: triton.language.constexpr):
        pass

    configs = [triton.Config({"SIZE": size}, num_warps=4) for size in (16, 32, 64)]
    module = types.ModuleType("tuned_kernels")
    module.kernel = triton.autotune(configs, key=["x"])(kernel)
    module.kernel.whole, module.kernel.fn = module.kernel.fn, Kernel()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("mambabench.kernels.tuning.THREADS", FORMS)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(FORMS))
    compile_side_by_side.cache_clear()
    yield module.kernel
    compile_side_by_side.cache_clear()


def test_all_forms_compile_side_by_side_and_are_tried(tuner: Any) -> None:
    compile_side_by_side(("tuned_kernels",))
    tuner.nargs = {"x": 7}
    tried = tuner.prune_configs({"grid": (1,), "warmup": False})
    assert tried == tuner.configs
    assert [asked["SIZE"] for asked in tuner.fn.asked] == [16, 32, 64]
    assert all(asked["given"] == (7,) and asked["warmup"] and asked["grid"] == (1,) for asked in tuner.fn.asked)


def test_a_choice_is_made_once_for_all_processes(tuner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever form is the fastest when it is asked for again."""
    timed: list[Any] = []

    class Target:
        def hash(self) -> str:
            return "a GPU"

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("triton.compiler.compiler.make_backend", lambda target: Target())
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_target=lambda: None))
    monkeypatch.setattr("triton.runtime.autotuner.driver", driver)
    compile_side_by_side(("tuned_kernels",))
    assert tuner.do_bench.keywords == {"warmup": 5, "rep": 25}
    tuner.fn = tuner.whole

    def bench(fastest: int) -> None:
        def run() -> None:
            timed.append(fastest)
            tuner.configs_timings = {c: [abs(c.kwargs["SIZE"] - fastest)] * 3 for c in tuner.configs}
            tuner.cache[("a size",)] = min(tuner.configs_timings, key=tuner.configs_timings.get)

        assert tuner.cache_results
        tuner.check_disk_cache(("a size",), tuner.configs, run)

    bench(fastest=32)
    tuner.cache.clear()
    bench(fastest=64)
    assert timed == [32]
    assert tuner.cache[("a size",)].kwargs == {"SIZE": 32}


def test_a_form_that_does_not_compile_is_left_to_the_autotuner(tuner: Any) -> None:
    tuner.fn.together.abort()
    compile_side_by_side(("tuned_kernels",))
    tuner.nargs = {"x": 7}
    assert tuner.prune_configs({"grid": (1,), "warmup": False}) == tuner.configs


def test_a_kernel_that_prunes_its_forms_itself_is_left_alone(tuner: Any) -> None:
    def own(configs: list[Any], given: dict[str, Any], **named: Any) -> list[Any]:
        return configs[:1]

    tuner.early_config_prune = own
    compile_side_by_side(("tuned_kernels",))
    assert tuner.early_config_prune is own


@pytest.mark.gpu
def test_on_a_gpu_a_graph_is_timed_each_time_that_it_is_started() -> None:
    made = torch.zeros(1 << 20, device="cuda")
    times = graph_ms([lambda: made.add_(1)] * 4, repeats=5)
    assert len(times) == 5
    assert min(times) > 0
    assert float(made[0]) == 3 + 4 * 5


def test_a_kernel_that_does_not_compile_leaves_the_next_ones_alone() -> None:
    def broken() -> None:
        raise ValueError("no such operation")

    def start(work: Any) -> Any:
        from triton.runtime._async_compile import active_mode

        return active_mode.get().submit(work, work, lambda kernel: None)

    with pytest.raises(ValueError, match="no such operation"), side_by_side(ignore_errors=False):
        start(broken)
    with side_by_side(ignore_errors=True):
        start(broken)
    with side_by_side(ignore_errors=False):
        made = start(lambda: "compiled")
    assert made.result() == "compiled"
