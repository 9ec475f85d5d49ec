"""How near a step of decoding comes to what memory allows: the bytes that it must move, and how fast a copy is."""

from __future__ import annotations

import torch

from ..interfaces import Stepper

SIZE = 1 << 30
"""Bytes of a buffer that is copied: far more than caches hold."""
COPIES = 8


def step_bytes(model: Stepper, batch: int, context: int) -> int | None:
    """Least bytes of one plain step: weights, live caches, states read and written. None for a model with a loop of its
    own, of whose caches and states nothing is known."""
    if "generate" in model.traits:
        return None
    cost = model.cost(batch, context, 1)
    return cost.weight_bytes + cost.kv_bytes + cost.state_bytes


def copy_bandwidth(device: str) -> float | None:
    """Bytes a second of a copy by a kernel on a GPU, reads and writes counted; None on a CPU, whose memory is shared,
    and where there is no room for it."""
    if not device.startswith("cuda"):
        return None
    if torch.cuda.mem_get_info(device)[0] < 3 * SIZE:
        return None
    one, two = (torch.zeros(SIZE // 4, device=device) for _ in range(2))
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for place in range(COPIES + 2):
        if place == 2:
            began.record()
        torch.add(one, 0, out=two)
    ended.record()
    torch.cuda.synchronize()
    return COPIES * 2 * SIZE / (began.elapsed_time(ended) / 1e3)
