"""How near a step of decoding comes to what memory allows: the bytes that it must move, and how fast memory is copied,
and how fast it is read where next to nothing is written. Steps read weights and caches and write little."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..interfaces import Stepper

SIZES = {"cuda": 1 << 31, "cpu": 1 << 27}
"""Bytes of the buffer by kind of device, far more than caches hold. Half of it is copied onto the other half."""
ROW = 1 << 12
"""Numbers of which a sum, a maximum or a product is left."""
TURNS = 3
"""Of all ways, of each of which the fastest counts: what others take of the device meanwhile is no limit of it."""
PASSES = {"cuda": 4, "cpu": 1}
"""Of a way in one of its turns, by kind of device, behind one that is not timed."""


def step_bytes(model: Stepper, batch: int, context: int) -> int | None:
    """Least bytes of one plain step: weights, live caches, states read and written. None for a model with a loop of its
    own, of whose caches and states nothing is known."""
    if "generate" in model.traits:
        return None
    cost = model.cost(batch, context, 1)
    return cost.weight_bytes + cost.kv_bytes + cost.state_bytes


def bandwidths(device: str) -> dict[str, float]:
    """Bytes a second of a `copy`, reads and writes counted, and of the fastest of a few ways to `read` only; on a CPU
    of one process among others, with as many threads as torch has. Nothing where a GPU has no room for it."""
    size = SIZES[torch.device(device).type]
    if device.startswith("cuda") and torch.cuda.mem_get_info(device)[0] < size + size // 2:
        return {}
    buffer = torch.zeros(size // 4, device=device)
    one, two = buffer.chunk(2)
    rows, vector = buffer.view(-1, ROW), torch.ones(ROW, device=device)
    ways: tuple[Callable[[], object], ...] = (
        lambda: torch.add(one, 0, out=two),
        lambda: buffer.sum(),
        lambda: rows.sum(dim=1),
        lambda: rows.amax(dim=1),
        lambda: rows.mv(vector),
    )
    turns = [[_seconds(device, way) for way in ways] for _ in range(TURNS)]
    copying, *reading = map(min, zip(*turns, strict=True))
    return {"copy": size / copying, "read": size / min(reading)}


def _seconds(device: str, work: Callable[[], object]) -> float:
    """Of one of several passes."""
    kind = torch.device(device).type
    passes = PASSES[kind]
    work()
    if kind == "cpu":
        before = time.perf_counter()
        for _ in range(passes):
            work()
        return (time.perf_counter() - before) / passes
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(passes):
        work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / passes
