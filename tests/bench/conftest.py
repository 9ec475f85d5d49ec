"""Benchmarks of kernels on a GPU: what a call takes there when its inputs are not in the cache.

The calls of a round are in a CUDA graph, so that the host costs nothing, and go over as many inputs as together are
several times the second-level cache. pytest-benchmark has the times of calls; a table at the end and `extra_info` have
them beside what a copy and the tensor cores allow. Without `--benchmark-enable` each is run once and not timed, on a
CPU at a tiny size: so every run of the tests checks what is timed.
"""

import itertools
import math
import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mambabench.distillers import flops as operations
from mambabench.kernels.support import timing_stream
from torch.utils import _pytree as trees

SWEEP = 8
"""How often all inputs together would fill the second-level cache."""
MOST = 6000
"""Inputs of a benchmark, of which the smallest do not get there."""
CALLS = 16
"""In a graph, unless there are more inputs, or so many take longer than `GRAPH`."""
GRAPH, ROUND, WHOLE = 0.02, 0.002, 0.4
"""Seconds: of a graph, of a round at least, of all rounds."""
ROUNDS = range(5, 21)
MEASURED: list[dict[str, Any]] = []
"""What was measured, for the table."""
SHARES = (("share of copy", "of a copy's bandwidth"), ("share of peak", "of the tensor cores' FLOP/s"))

Make = Callable[[], tuple[Any, ...]]


class Cold:
    """`cold(make, run)` times `run(*make())`, and returns what the first such call did. See `__call__`."""

    def __init__(self, request: pytest.FixtureRequest, device: torch.device, measured: list[dict[str, Any]]) -> None:
        self.request, self.device, self.measured = request, device, measured
        self.asked = request.config.getoption("benchmark_enable", False)

    def inputs(self, make: Make) -> tuple[Any, ...]:
        """Those of the first call, made anew: all written, which a kernel that begins early does not wait for."""
        torch.manual_seed(0)
        made = make()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return made

    def __call__(
        self, make: Make, run: Callable[..., Any], moved: float = 0, flops: float = 0, calls: int = CALLS
    ) -> Any:
        """`make()` makes inputs of a call, which moves `moved` bytes and needs `flops` operations at least. There are
        at least `calls` calls in a graph, if they are short: `run` is called anew for each."""
        if not self.asked:
            return run(*self.inputs(make))
        benchmark = self.request.getfixturevalue("benchmark")
        if not benchmark.enabled:  # several processes share the machine
            return benchmark(run, *self.inputs(make))
        benchmark.group = self.request.getfixturevalue("group")
        if self.device.type == "cpu":
            found = run(*self.inputs(make))
            benchmark.pedantic(run, args=make(), rounds=ROUNDS.start)
            return found
        before = torch.cuda.memory_allocated(self.device)
        first = self.inputs(make)
        held = max(1, torch.cuda.memory_allocated(self.device) - before)
        found = trees.tree_map_only(torch.Tensor, torch.clone, run(*first))
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        several = [first, *(make() for _ in range(min(MOST, math.ceil(SWEEP * cache / held)) - 1))]
        fit = min(calls, math.ceil(GRAPH / self._seconds(lambda: run(*first))))
        turns = list(itertools.islice(itertools.cycle(several), max(len(several), fit)))
        self._time(benchmark, self._recorded(run, turns), len(turns))
        seconds = benchmark.stats.stats.median
        row = {"us": seconds * 1e6, "inputs": len(several), "of the cache": len(several) * held / cache}
        if moved:
            row |= {"bytes": moved, "share of copy": moved / seconds / self.request.getfixturevalue("copied")}
        if flops and (most := operations.peak(torch.cuda.get_device_name(self.device))):
            row |= {"FLOPs": flops, "share of peak": flops / seconds / most}
        benchmark.extra_info.update(row)
        self.measured.append({"name": self.request.node.name, **row})
        return found

    def _recorded(self, run: Callable[..., Any], turns: list[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), timing_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for given in turns:
                run(*given)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for given in turns:
                run(*given)
        return graph

    def _seconds(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize(self.device)
        before = time.perf_counter()
        work()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - before

    def _time(self, benchmark: Any, graph: torch.cuda.CUDAGraph, calls: int) -> None:
        """To pytest-benchmark a round is many calls: the first of every `calls` starts the graph, which makes them all,
        and the last waits for the end. So what it reports is the time of one call, however many a round has."""
        self._seconds(graph.replay)
        seconds = self._seconds(graph.replay)
        several = math.ceil(ROUND / seconds)
        turn = itertools.cycle(range(several * calls))

        def call() -> None:
            place = next(turn)
            if place % calls == 0:
                graph.replay()
            if place == several * calls - 1:
                torch.cuda.synchronize(self.device)

        rounds = min(ROUNDS.stop - 1, max(ROUNDS.start, int(WHOLE / (seconds * several))))
        benchmark.pedantic(call, rounds=rounds, iterations=several * calls, warmup_rounds=1)
        torch.cuda.synchronize(self.device)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU for benchmarks that are marked so, and the CPU for others."""
    if request.node.get_closest_marker("gpu"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@pytest.fixture(scope="session")
def copied() -> float:
    """Bytes per second of a copy by a kernel, read and written."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(12):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        target.copy_(source)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return 2 * source.nbytes / statistics.median(times[2:])


@pytest.fixture
def cold(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Cold]:
    """Times a call whose inputs are in no cache."""
    yield Cold(request, device, MEASURED)
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def group(request: pytest.FixtureRequest) -> str:
    """Under what pytest-benchmark shows a benchmark: all forms of one size are together."""
    given = {of: value for of, value in request.node.callspec.params.items() if isinstance(value, str | int)}
    name = request.node.originalname.removeprefix("test_").replace("_", " ")
    return ", ".join([name, *(f"{of} {value}" for of, value in given.items() if of != "form")])


@pytest.fixture(scope="session")
def inputs() -> SimpleNamespace:
    """The inputs of decoding kernels; by path, as the scripts have them, since this folder must not be importable."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("inputs.py"))))


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """Fails unless tensors are as near to others, in the norm of their difference, as results in bf16 should be."""

    def check(found: Any, wanted: Any, within: float = 2.0**-7) -> None:
        pairs = list(zip(trees.tree_leaves(found), trees.tree_leaves(wanted), strict=True))
        assert pairs
        for one, other in pairs:
            assert one.shape == other.shape
            exact = other.detach().double()
            assert float((one.detach().double() - exact).norm()) <= within * float(exact.norm())

    return check


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a call takes, as a table."""
    if not MEASURED:
        return
    width = max(len(row["name"]) for row in MEASURED)
    terminalreporter.write_sep("-", "device time of a call, inputs in turns")
    for row in MEASURED:
        shares = [f"{row[what]:7.1%} {of}" for what, of in SHARES if what in row]
        terminalreporter.write_line(
            f"{row['name']:{width}} {row['us']:10.2f} us, inputs {row['of the cache']:5.1f} caches  {'  '.join(shares)}"
        )
