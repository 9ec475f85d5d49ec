"""Forms of kernels: compiled side by side, timed in graphs, chosen once.

Triton's autotuner tries a dozen forms of each kernel and compiles them one after the other, which for the kernels of
a scan's forward and backward takes minutes on a machine that has not met them. Here they compile side by side, and what
was chosen is kept beside what was compiled, since every step of a run is a process of its own: of two forms that are
about as fast, each process would else take another, with other roundings and other times."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .support import begins_early, timing_stream

LOG = logging.getLogger("mambabench.kernels")
F = TypeVar("F")

WARMUP_MS, TIMED_MS = 5, 25
"""A quarter of what Triton takes for each form: still hundreds of calls."""
THREADS = 16
"""At most: beyond it the interpreter's lock is what they wait for."""
ROUNDS = 6
"""In which forms take turns."""
MARGIN = 1.015
"""A form that is listed before others is taken though they are faster by this."""
CHOICE = "form.json"


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


def measurable(read: Tensor, least: int) -> bool:
    """Whether what calls read is of so many bytes that their form matters, and can be timed now."""
    return read.nbytes >= least and read.is_cuda and not torch.cuda.is_current_stream_capturing()


def settled(kind: Iterable[object], forms: Sequence[F], choose: Callable[[], F], usual: F) -> F:
    """What `choose` finds to be the fastest of `forms` for this kind of calls, in which a device stands for all GPUs of
    its name. It is asked once for all processes that share a cache of what Triton compiled: until a source of the
    kernels changes. Where there is no memory to find that out, the `usual` one serves."""
    import triton
    from triton.runtime.cache import get_cache_manager

    asked = [triton.__version__, torch.__version__, _sources(), *map(_named, kind), *map(repr, forms)]
    key = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    of = asked[3 : -len(forms)]
    kept = _kept(key, len(forms))
    if kept is not None:
        return forms[kept]
    try:
        found = choose()
    except torch.OutOfMemoryError:
        LOG.warning("no memory is left to time %d forms, so that %s is taken for %s", len(forms), usual, of)
        return usual
    LOG.debug("of %d forms %s is the fastest for %s", len(forms), found, of)
    # Another process may have found one meanwhile.
    if _kept(key, len(forms)) is None:
        choice = json.dumps({"form": forms.index(found), "asked": asked[3:]})
        try:
            get_cache_manager(key).put(choice, CHOICE, binary=False)
        except OSError as error:
            LOG.warning("a choice cannot be kept, so that other processes may choose another form: %s", error)
    kept = _kept(key, len(forms))
    return found if kept is None else forms[kept]


def _kept(key: str, count: int) -> int | None:
    """Which of so many forms a process has chosen, unless none has, or what it left cannot be read."""
    from triton.runtime.cache import get_cache_manager

    try:
        path = get_cache_manager(key).get_file(CHOICE)
        form = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["form"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return form if form in range(count) else None


def _named(part: object) -> str:
    if isinstance(part, torch.device) and part.type == "cuda":
        return f"{torch.cuda.get_device_name(part)}, {'early' if begins_early(part) else 'late'}"
    return repr(part)


@functools.cache
def _sources() -> str:
    """Of all kernels."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def fastest(ways: Mapping[F, Sequence[Callable[[], object]]]) -> F:
    """The first form that is as fast as any but for MARGIN. Each has calls to make, one after the other; forms take
    turns, so that nothing that changes meanwhile is one form's alone. What does not fit on the device is left out;
    where nothing does, the last form's error says why."""
    import triton

    graphs, pool, last = {}, torch.cuda.graph_pool_handle(), [*ways][-1]
    for form, calls in ways.items():
        try:
            graphs[form] = recorded(calls, pool)
        except triton.TritonError:
            if form is last and not graphs:
                raise
    times = dict(zip(graphs, map(min, started_ms([*graphs.values()], ROUNDS)), strict=True))
    return next(form for form, ms in times.items() if ms <= MARGIN * min(times.values()))


def recorded(calls: Sequence[Callable[[], object]], pool: Any = None) -> torch.cuda.CUDAGraph:
    """`calls` one after the other as a graph of the current GPU."""
    for call in calls[:3]:
        call()
    graph, stream = torch.cuda.CUDAGraph(), timing_stream(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph


def started_ms(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int) -> list[list[float]]:
    """Milliseconds of each graph in each round, in which one is started after the other. The host waits at the end
    alone: the next one is always there, so that no time is the host's, but of the first few."""
    marks = []
    for _ in range(rounds):
        for graph in graphs:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            marks.append((before, after))
    marks[-1][1].synchronize()
    times = [before.elapsed_time(after) for before, after in marks]
    return [times[i :: len(graphs)] for i in range(len(graphs))]


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Milliseconds of `calls` one after the other on the current GPU, in a graph, which the host does not slow down;
    of each time that it is started."""
    return started_ms([recorded(calls)], repeats)[0]


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
