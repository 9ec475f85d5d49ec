"""The forms of a tuned kernel are compiled at the same time, and all of them are still tried."""

import errno
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mambabench.kernels import tuning
from mambabench.kernels.tuning import compile_side_by_side, fastest, graph_ms, settled, side_by_side

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


@pytest.fixture
def clock(timed_by: Callable[..., None]) -> list[str]:
    """Calls say how many milliseconds they take. Returns the forms that graphs were started of, in order."""
    timed_by(lambda calls: calls[0]())
    return []


def test_the_first_form_is_taken_that_is_as_fast_as_any(clock: list[str]) -> None:
    """At its best: other work on a device makes any form slow at times."""

    def way(name: str, *times: float) -> list[Callable[[], float]]:
        turns = iter(times * tuning.ROUNDS)

        def call() -> float:
            clock.append(name)
            return next(turns)

        return [call]

    ways = {"slow": way("slow", 1.1), "near": way("near", 5.0, 1.01), "best": way("best", 1.0, 7.0)}
    assert fastest(ways) == "near"
    assert clock == ["slow", "near", "best"] * tuning.ROUNDS


def test_a_form_that_does_not_fit_on_the_device_is_left_out(clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(calls: list[Callable[[], float]], pool: object) -> list[Callable[[], float]]:
        if calls[0]() < 1:
            raise triton.TritonError("too much shared memory")
        return calls

    monkeypatch.setattr(tuning, "recorded", recorded)
    assert fastest({"large": [lambda: 0.5], "small": [lambda: 1.0]}) == "small"
    with pytest.raises(triton.TritonError, match="too much shared memory"):
        fastest({"large": [lambda: 0.5], "larger": [lambda: 0.4]})


def test_forms_are_settled_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is the fastest when it is asked for again, on another GPU of that name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU {device.index // 2}")
    monkeypatch.setattr(tuning, "begins_early", lambda device: True)
    forms, found = ["one", "two", None], []

    def asked(*kind: object, choice: str | None, forms: list[str | None] = forms) -> str | None:
        def choose() -> str | None:
            found.append(choice)
            return choice

        return settled(kind, forms, choose, usual="none")

    first, same, other = (torch.device("cuda", index) for index in range(3))
    assert asked(7, first, choice="two") == "two"
    assert asked(7, same, choice=None) == "two"
    assert asked(7, first, choice="one") == "two"
    assert found == ["two"]
    assert asked(8, first, choice="one") == "one"
    assert asked(7, other, choice=None) is None
    assert asked(7, other, choice="one") is None
    assert asked(7, first, choice="one", forms=["one", None]) == "one"
    monkeypatch.setattr(tuning, "_sources", lambda: "other kernels")
    assert asked(7, first, choice="one") == "one"
    assert found == ["two", "one", None, "one", "one"]


def settle(choose: Callable[[], str]) -> str:
    return settled(("kind",), ["one", "two"], choose, usual="usual")


def test_of_two_processes_that_choose_at_once_one_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def choose() -> str:
        settle(lambda: "two")
        return "one"

    assert settle(choose) == "two"


@pytest.mark.parametrize(
    "damaged", ["", '{"form": 1', "[1]", "{}", '{"form": 2}', '{"form": -1}', '{"form": null}', "\udcff"]
)
def test_a_choice_that_is_damaged_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert settle(lambda: "one") == "one"
    (kept,) = tmp_path.rglob(tuning.CHOICE)
    kept.write_text(damaged, errors="surrogateescape")
    assert settle(lambda: "two") == "two"
    assert settle(lambda: "one") == "two"


@pytest.mark.parametrize("where", ["full", "not a folder"])
def test_a_choice_that_cannot_be_kept_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / where))
    (tmp_path / "not a folder").touch()

    def put(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("triton.runtime.cache.FileCacheManager.put", put)
    assert settle(lambda: "two") == "two"
    assert settle(lambda: "one") == "one"
    reason = "No space left on device" if where == "full" else "Not a directory"
    for told in caplog.messages:
        assert "so that other processes may choose another" in told
        assert reason in told
    assert len(caplog.messages) == 2


def test_what_a_choice_fails_with_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def choose() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        settle(choose)


def test_without_memory_for_a_choice_the_usual_form_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This process alone: others may have memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def choose() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING):
        assert settle(choose) == "usual"
    assert ["memory" in told for told in caplog.messages] == [True]
    assert settle(lambda: "two") == "two"
    assert settle(choose) == "two"


@pytest.mark.gpu
def test_on_a_gpu_a_form_with_less_to_do_is_the_fastest() -> None:
    few, many = (torch.zeros(1 << size, device="cuda") for size in (20, 26))
    assert fastest({"many": [lambda: many.add_(1)] * 4, "few": [lambda: few.add_(1)] * 4}) == "few"


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
