"""The forms of a tuned kernel are compiled at the same time, and all of them are still tried."""

import sys
import threading
import types
from typing import Any

import pytest
from mambabench.kernels.tuning import compile_side_by_side

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
    module.kernel.fn = Kernel()
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
