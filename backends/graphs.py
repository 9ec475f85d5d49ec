"""CUDA graphs of the stepping engine: what a call launches is recorded once and started as a whole from then on.

A decoding step of a small batch is hundreds of kernels of a few microseconds, which the host could not launch as fast
as they run. A recorded call reads its tokens and positions from buffers of its own, so that one recording serves all
that a shape can be called with. A decoder records whole rounds (`interfaces.Recording`), of which calls become a part.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VARIABLE = "MAMBABENCH_GRAPHS"
"""`off` in this environment variable has every kernel launched by itself, to find faults."""

PROMPTS = 8
"""Recordings of prompts that a state keeps, of the lengths used last."""
ASKED = 8192
"""Tokens of all rows of a recorded prompt, at most: beyond, the host is faster than the device, and what lies between
kernels is large."""

Work = Callable[[Tensor, Tensor], Tensor]
"""ids [B, T] and start (of prompts: lengths) [B] -> logits [B, T, V] (of prompts: [B, V]), without a look at what is on
the device."""


def wanted(device: torch.device) -> bool:
    """Whether calls on this device are recorded."""
    return device.type == "cuda" and os.environ.get(VARIABLE) != "off"


def bucket(longest: int) -> int:
    """The length to which prompts are padded, so that one recording serves several lengths.

    >>> [bucket(longest) for longest in (1, 33, 128, 129, 1920)]
    [32, 64, 128, 256, 1920]
    """
    each = 32 if longest <= 128 else 128
    return -(-longest // each) * each


def capturing(tensor: Tensor) -> bool:
    """Whether the caller is recording a graph of its own, of which this call becomes a part."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Unrecorded:
    """How many blocks of `Graphs.unrecorded` are open."""

    count = 0


def alone(tensor: Tensor) -> bool:
    """Whether a call must start no graph of its own."""
    return _Unrecorded.count > 0 or capturing(tensor)


@dataclass(slots=True)
class _Call:
    ids: Tensor
    start: Tensor
    logits: Tensor | None = None
    replay: Callable[[], None] | None = None
    """None before the second call."""


class Recorder:
    """Records for all states of a model. The graphs share the memory of what lies between their kernels, since they
    never run at the same time.

    cuBLAS's memory is a stream's, and torch gives it back with any graph that was recorded on that stream. So nobody
    else records on a recorder's.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = self.prompts = 0
        """Recordings, and those of prompts among them."""
        self.seconds = 0.0
        """Spent recording."""
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """Those that there still are."""

    def record(self, work: Work, ids: Tensor, start: Tensor) -> tuple[Callable[[], None], Tensor]:
        """What starts the recorded call, and its logits, which every start overwrites."""
        found: list[Tensor] = []
        replay = self.capture(lambda: found.append(work(ids, start)))
        return replay, found[0]

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What starts the work again."""
        began = time.perf_counter()
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            if not self._graphs:
                # One whose graphs have all gone cannot be joined: torch asserts that somebody uses it.
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        self._graphs.add(graph)
        self.count += 1
        self.seconds += time.perf_counter() - began
        return graph.replay


class Graphs:
    """The recorded calls on one state's memory, by tokens a row and whether they settle, those of prompts, by tokens a
    row, and what decoders recorded.

    The first call of a kind runs as it is, which loads and tunes its kernels; the second is recorded.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._calls: dict[tuple[int, bool], _Call] = {}
        self._met: set[int] = set()
        self._prompts: dict[int, _Call] = {}
        """By tokens a row, the one used last at the end."""
        self.room: float = math.inf
        """Tokens a row of prompts beyond which a recording found no memory."""
        self.kept: dict[Hashable, Any] = {}
        """The callers': it lives as long as the memory."""

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Calls are launched kernel by kernel meanwhile, whatever the model."""
        _Unrecorded.count += 1
        try:
            yield
        finally:
            _Unrecorded.count -= 1

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records work with calls on this memory among it, which has run `unrecorded` before."""
        return self._recorder.capture(work)

    def run(self, work: Work, ids: Tensor, start: Tensor, settle: bool) -> Tensor:
        """Logits [B, T, V] of `work`, the caller's to keep."""
        kind = ids.shape[1], settle
        call = self._calls.get(kind)
        if call is None:
            call = _Call(ids.clone(), start.clone())
            logits = work(call.ids, call.start)
            self._calls[kind] = call
            return logits
        return self._start(call, work, ids, start)

    def read(self, work: Work, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, V] of prompts, the caller's to keep."""
        width = ids.shape[1]
        if width not in self._met:
            logits = work(ids, lengths)
            self._met.add(width)
            return logits
        call = self._prompts.pop(width, None)
        if call is None:
            while len(self._prompts) >= PROMPTS:
                del self._prompts[next(iter(self._prompts))]
            call = _Call(ids.clone(), lengths.clone())
        before = self._recorder.count
        try:
            logits = self._start(call, work, ids, lengths)
        except torch.OutOfMemoryError:
            self.room = width - 1
        else:
            self._prompts[width] = call
            self._recorder.prompts += self._recorder.count - before
            return logits
        # Not before here: while the error is handled, its traceback holds what was made before it.
        return work(ids, lengths)

    def _start(self, call: _Call, work: Work, ids: Tensor, start: Tensor) -> Tensor:
        call.ids.copy_(ids)
        call.start.copy_(start)
        if call.replay is None or call.logits is None:
            call.replay, call.logits = self._recorder.record(work, call.ids, call.start)
        call.replay()
        return call.logits.clone()
