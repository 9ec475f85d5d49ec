"""How benchmarks time calls on a GPU, on a stand-in for one."""

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CACHE = 1000


class Gpu:
    """Counts what is asked of it. Every graph takes a millisecond."""

    def __init__(self) -> None:
        self.allocated = self.replays = self.waits = self.recording = 0
        self.recorded: list[int] = []

    def replay(self) -> None:
        self.replays += 1
        time.sleep(1e-3)

    @contextlib.contextmanager
    def record(self, graph: object, **options: object) -> Any:
        self.recording += 1
        yield
        self.recording -= 1

    def synchronize(self, device: object = None) -> None:
        self.waits += 1


class Benchmark:
    """What of pytest-benchmark is used, for a round of which counts are kept."""

    enabled = True

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.extra_info, self.stats = gpu, {}, SimpleNamespace(stats=SimpleNamespace(median=1e-6))

    def pedantic(self, call: Any, rounds: int, iterations: int, warmup_rounds: int) -> None:
        self.iterations = iterations
        before = self.gpu.replays, self.gpu.waits
        for _ in range(iterations):
            call()
        self.replays, self.waits = self.gpu.replays - before[0], self.gpu.waits - before[1]


@pytest.fixture
def gpu(cold, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu, nothing = Gpu(), SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "memory_allocated": lambda device: gpu.allocated,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=CACHE),
        "get_device_name": lambda device: "NVIDIA H200",
        "synchronize": gpu.synchronize,
        "CUDAGraph": lambda: gpu,
        "graph": gpu.record,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: nothing,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setitem(type(cold).__call__.__globals__, "timing_stream", lambda device: nothing)
    return gpu


@pytest.mark.parametrize(
    ("held", "inputs", "calls"),
    [(8 * CACHE, 1, 16), (3 * CACHE, 3, 16), (100 * CACHE, 1, 16), (CACHE // 8, 64, 64), (0, 6000, 6000)],
)
def test_calls_take_turns_over_just_enough_inputs(cold, gpu: Gpu, held: int, inputs: int, calls: int) -> None:
    benchmark, made = Benchmark(gpu), []

    def make() -> tuple[int]:
        made.append(len(made))
        gpu.allocated += held
        return (made[-1],)

    def run(which: int) -> torch.Tensor:
        if gpu.recording:
            gpu.recorded.append(which)
        return torch.tensor(which)

    given = {"benchmark": benchmark, "group": "", "copied": 1e12}
    named = SimpleNamespace(name="a benchmark")
    request = SimpleNamespace(
        config=SimpleNamespace(getoption=lambda *_: True), getfixturevalue=given.__getitem__, node=named
    )
    timed = type(cold)(request, torch.device("cuda", 0), [])
    assert timed(make, run, moved=5e5, flops=2e6) == 0
    assert len(made) == inputs
    assert gpu.recorded == [call % inputs for call in range(calls)]
    assert benchmark.iterations == benchmark.replays * calls
    assert benchmark.waits == 1
    assert benchmark.extra_info["share of copy"] == pytest.approx(0.5)
    assert benchmark.extra_info["of the cache"] == inputs * max(1, held) / CACHE


def test_nothing_is_timed_unless_asked_for(cold) -> None:
    assert cold.inputs(lambda: (torch.rand(3),))[0].equal(*cold.inputs(lambda: (torch.rand(3),)))
    cold.asked, made = False, []
    assert cold(lambda: (made.append(1), 2), lambda _, other: other + 1) == 3
    assert made == [1]
