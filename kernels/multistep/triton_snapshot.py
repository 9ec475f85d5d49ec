"""A state for every token of a Mamba-2 layer, by a kernel: a program has some rows of a head's state in registers and
goes from token to token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 2048
"""Numbers of a state that a program holds."""


@triton.jit
def _snapshot(  # type: ignore[no-untyped-def]
    x, b, dt, c, A, D, states, start, y,
    heads, x_heads, b_heads, c_heads, width, size, slots, ring,
    x_row, x_slot, b_row, b_slot, dt_row, dt_slot, c_row, c_token,
    COUNT: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    some, whole = place < width, column < size
    inside = some[:, None] & whole[None, :]
    cell = place[:, None] * size + column[None, :]
    first = tl.load(start + row)
    decay = tl.load(A + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    now = tl.load(states + ((row * slots + first % slots) * heads + head) * width * size + cell, mask=inside, other=0.0)
    for token in tl.static_range(COUNT):
        at = (first + token) % ring
        value = tl.load(x + row * x_row + at * x_slot + head // x_heads * width + place, mask=some, other=0.0)
        value = value.to(tl.float32)
        key = tl.load(b + row * b_row + at * b_slot + head // b_heads * size + column, mask=whole, other=0.0)
        query = tl.load(c + row * c_row + token * c_token + head // c_heads * size + column, mask=whole, other=0.0)
        size_of_step = tl.load(dt + row * dt_row + at * dt_slot + head)
        now = now * tl.exp(size_of_step * decay) + (size_of_step * value)[:, None] * key.to(tl.float32)[None, :]
        slot = row * slots + (first + token + 1) % slots
        tl.store(states + (slot * heads + head) * width * size + cell, now, mask=inside)
        out = tl.sum(now * query.to(tl.float32)[None, :], 1) + skip * value
        tl.store(y + ((row * COUNT + token) * heads + head) * width + place, out.to(y.dtype.element_ty), mask=some)


def snapshot_multistep(
    x: Tensor, B: Tensor, dt: Tensor, C: Tensor, A: Tensor, D: Tensor, states: Tensor, start: Tensor
) -> Tensor:
    """Arguments as in the room's `snapshot_ring_multistep`, those of the ring by themselves."""
    batch, slots, heads, width, size = states.shape
    count = C.shape[1]
    y = torch.empty(batch, count, heads, width, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(size)
    rows = min(triton.next_power_of_2(width), max(CELLS // columns, 1))
    _snapshot[(heads, batch, triton.cdiv(width, rows))](
        x, B, dt, C, A, D, states, start, y,
        heads, heads // x.shape[2], heads // B.shape[2], heads // C.shape[2], width, size, slots, dt.shape[1],
        x.stride(0), x.stride(1), B.stride(0), B.stride(1), dt.stride(0), dt.stride(1), C.stride(0), C.stride(1),
        COUNT=count, ROWS=rows, SIZE=columns,
    )  # fmt: skip
    return y
