"""Forms of kernels: compiled side by side, timed in graphs.

Triton's autotuner tries a dozen forms of each kernel and compiles them one after the other, which for the kernels of
a scan's forward and backward takes minutes on a machine that has not met them. Here they compile side by side, and what
was chosen is kept beside what was compiled, since every step of a run is a process of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch

from .support import timing_stream

WARMUP_MS, TIMED_MS = 5, 25
"""A quarter of what Triton takes for each form: still hundreds of calls."""
THREADS = 16
"""At most: beyond it the interpreter's lock is what they wait for."""


@contextlib.contextmanager
def side_by_side(ignore_errors: bool) -> Iterator[None]:
    """Kernels that are started inside with `warmup=True` compile at once, and have when it ends. Raises what one of
    them failed with, unless errors are ignored."""
    import triton

    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as pool:
        # An error that leaves Triton's own block would leave the mode on for the rest of the process.
        mode = triton.AsyncCompileMode(pool, ignore_errors=True)
        with mode:
            yield
    for compiled in () if ignore_errors else mode.raw_futures:
        compiled.result()


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Milliseconds of `calls` one after the other on the current GPU, in a graph, which the host does not slow down;
    of each time that it is started."""
    for call in calls[:3]:
        call()
    graph, stream = torch.cuda.CUDAGraph(), timing_stream(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return times


@functools.cache
def compile_side_by_side(names: tuple[str, ...]) -> None:
    """Has the tuned kernels of these modules compile all their forms at once, before the first is timed; processes to
    come take the choice from the disk, unless a form has a hook. Kernels that already prune their forms are left alone.
    """
    from triton.testing import do_bench

    for name in names:
        for tuner in _tuners(importlib.import_module(name)):
            if tuner.early_config_prune is None:
                tuner.early_config_prune = _Compiled(tuner)
                tuner.do_bench = functools.partial(do_bench, warmup=WARMUP_MS, rep=TIMED_MS)
                tuner.cache_results = True


def _tuners(module: ModuleType) -> list[Any]:
    from triton.runtime.autotuner import Autotuner

    return [found for found in vars(module).values() if isinstance(found, Autotuner) and len(found.configs) > 1]


class _Compiled:
    """Called by the autotuner with the forms to try, whenever it meets new sizes or dtypes."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def __call__(self, configs: list[Any], given: Mapping[str, Any], **named: Any) -> list[Any]:
        named |= {"warmup": True}
        # A form that does not compile is the autotuner's to find out: it counts it as infinitely slow.
        with side_by_side(ignore_errors=True):
            for config in configs:
                self.tuner.fn.run(*given.values(), **named, **config.all_kwargs())
        return configs
