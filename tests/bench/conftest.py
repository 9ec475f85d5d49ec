"""Benchmarks of kernels on a GPU: what a call takes there when its inputs are not in the cache.

The calls of a round are in a CUDA graph, so that the host costs nothing, and have inputs of their own that together are
several times the second-level cache. pytest-benchmark has the times of rounds; a table at the end and `extra_info` have
those of single calls, beside what a copy and the tensor cores allow.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mambabench.distillers import flops as operations
from mambabench.kernels.support import timing_stream

SWEEP = 4
"""How often all inputs together would fill the second-level cache."""
CALLS = 8
"""Of a round, at least."""
ROUNDS = 20
MEASURED: list[dict[str, Any]] = []
"""What was measured, for the table."""
SHARES = (("share of copy", "of a copy's bandwidth"), ("share of peak", "of the tensor cores' FLOP/s"))

Make = Callable[[], Callable[[], object]]


class Cold:
    """`cold(make, moved=bytes, flops=FLOPs)`: `make()` gives a call with inputs of its own, that moves so many bytes
    and needs so many operations at least."""

    def __init__(self, benchmark: Any, copied: float, name: str) -> None:
        self.benchmark, self.copied, self.name = benchmark, copied, name

    def __call__(self, make: Make, moved: float = 0, flops: float = 0) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        if not self.benchmark.enabled:
            self.benchmark(make())
            return
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        calls = [make() for _ in range(max(1, min(64, math.ceil(SWEEP * cache / max(moved, 1)))))]
        calls = list(itertools.islice(itertools.cycle(calls), max(CALLS, len(calls))))
        graph, stream = torch.cuda.CUDAGraph(), timing_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize(device)

        self.benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=3)
        seconds = statistics.median(self.benchmark.stats.stats.data) / len(calls)
        found: dict[str, Any] = {"calls": len(calls), "us": seconds * 1e6}
        if moved:
            found |= {"bytes": moved, "share of copy": moved / seconds / self.copied}
        if flops and (most := operations.peak(torch.cuda.get_device_name(device))):
            found |= {"FLOPs": flops, "share of peak": flops / seconds / most}
        self.benchmark.extra_info.update(found)
        MEASURED.append({"name": self.name, **found})


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
def cold(benchmark: Any, copied: float, request: pytest.FixtureRequest) -> Iterator[Cold]:
    """Times a call whose inputs are in no cache."""
    yield Cold(benchmark, copied, request.node.name)
    torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a call takes, as a table."""
    if not MEASURED:
        return
    width = max(len(row["name"]) for row in MEASURED)
    terminalreporter.write_sep("-", "device time of a call, inputs not in the cache")
    for row in MEASURED:
        shares = [f"{row[what]:7.1%} {of}" for what, of in SHARES if what in row]
        terminalreporter.write_line(f"{row['name']:{width}} {row['us']:10.2f} us {'  '.join(shares)}")
